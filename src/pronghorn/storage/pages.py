"""Listings in pages, each beginning after a row of the one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import sqlalchemy as sa

Item = TypeVar("Item")


class Page(NamedTuple, Generic[Item]):
    """Some of a listing, and whether more follows."""

    items: list[Item]
    has_more: bool


def read_page(
    connection: sa.Connection,
    table: sa.Table,
    owner: sa.ColumnElement[bool],
    item_of: Callable[[sa.RowMapping], Item],
    *,
    limit: int,
    after: str | None,
    query: sa.Select[Any] | None = None,
    newest_first: bool = True,
) -> Page[Item] | None:
    """Return up to `limit` of an owner's rows, after the one with id `after`; None if the owner has no such row.

    `query` finds some of the table's rows; without it, it is all of them.
    """
    order = table.c.order
    query = (table.select() if query is None else query).where(owner)
    if after is not None:
        place = connection.scalar(sa.select(order).where(table.c.id == after, owner))
        if place is None:
            return None
        query = query.where(order < place if newest_first else order > place)
    query = query.order_by(order.desc() if newest_first else order).limit(limit + 1)
    rows = connection.execute(query).mappings().all()
    return Page([item_of(row) for row in rows[:limit]], len(rows) > limit)
