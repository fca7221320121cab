"""What the system remembers of webhooks: where events go, and every event on its way.

An event is recorded by the transaction that ends its batch, so no crash loses one or makes one up. A delivery's state
moves by compare-and-set on its state and its count of attempts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from pronghorn.domain.model import Batch, BatchStatus
from pronghorn.domain.webhooks import (
    Delivery,
    DeliveryState,
    Event,
    EventType,
    Verdict,
    WebhookEndpoint,
    event_of,
)
from pronghorn.ids import RandomIds
from pronghorn.storage.database import Database
from pronghorn.storage.pages import Page, read_page
from pronghorn.storage.tables import webhook_deliveries as deliveries
from pronghorn.storage.tables import webhook_endpoints as endpoints

# Every event is written once for each endpoint within the transaction that ends a batch.
ENDPOINTS_PER_ACCOUNT_MAX = 100
# Old deliveries forgotten in one go: a look at so many rows costs a few milliseconds.
FORGOTTEN_MAX = 1000
# A 410 can end very many deliveries; a person who reads the log looks at the endpoint, too.
_ENDED_BY_410 = "not sent: the receiver had answered 410 Gone, and the endpoint is disabled"

_IDS = RandomIds()


class Due(NamedTuple):
    """A delivery to attempt now, and where it goes."""

    delivery: Delivery
    endpoint: WebhookEndpoint


def enqueue_event(connection: sa.Connection, batch: Batch, status: BatchStatus, now: int) -> None:
    """Record that a batch has entered `status`, for every endpoint of its account that is told of it."""
    event_type = event_of(status)
    if event_type is None:
        return
    account = endpoints.c.account_id == batch.account_id, endpoints.c.disabled_at.is_(None)
    rows = connection.execute(endpoints.select().where(*account).order_by(endpoints.c.order)).mappings().all()
    event_id = _IDS.new("evt_")
    told = [
        {
            "id": _IDS.new("wh_"),
            "account_id": batch.account_id,
            "endpoint_id": endpoint.id,
            "event_id": event_id,
            "event_type": event_type.value,
            "event_at": now,
            "batch_id": batch.id,
            "state": DeliveryState.PENDING.value,
            "next_attempt_at": now,
        }
        for endpoint in map(_endpoint, rows)
        if event_type in endpoint.event_types
    ]
    if told:
        connection.execute(deliveries.insert(), told)


class Webhooks:
    """Endpoints and deliveries, over one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Endpoints

    async def add_endpoint(self, endpoint: WebhookEndpoint) -> bool:
        """Remember a new endpoint; return False, and do not, when the account has as many as it may."""

        def write(connection: sa.Connection) -> bool:
            count = sa.select(sa.func.count()).where(endpoints.c.account_id == endpoint.account_id)
            if (connection.scalar(count) or 0) >= ENDPOINTS_PER_ACCOUNT_MAX:
                return False
            values = msgspec.structs.asdict(endpoint) | {"event_types": _joined(endpoint.event_types)}
            connection.execute(endpoints.insert().values(**values))
            return True

        return await self._database.write(write)

    async def endpoint(self, endpoint_id: str, account_id: str) -> WebhookEndpoint | None:
        """Return an endpoint of this account; another account's is as good as none."""
        return await self._database.read(lambda c: _find(c, endpoint_id, account_id))

    async def list_endpoints(
        self, account_id: str, *, limit: int, after: str | None = None
    ) -> Page[WebhookEndpoint] | None:
        """Return up to `limit` endpoints, newest first, after the one with id `after`; None if that is unknown."""
        ours = endpoints.c.account_id == account_id
        return await self._database.read(lambda c: read_page(c, endpoints, ours, _endpoint, limit=limit, after=after))

    async def update_endpoint(
        self,
        endpoint_id: str,
        account_id: str,
        now: int,
        *,
        name: str | None = None,
        url: str | None = None,
        event_types: Sequence[EventType] | None = None,
    ) -> WebhookEndpoint | None:
        """Change what is given and return the endpoint as it is then; None if there is no such endpoint.

        Naming a URL, be it the same one, enables an endpoint that a 410 has disabled.
        """

        def write(connection: sa.Connection) -> WebhookEndpoint | None:
            before = _find(connection, endpoint_id, account_id)
            if before is None:
                return None
            after = msgspec.structs.replace(
                before,
                name=before.name if name is None else name,
                url=before.url if url is None else url,
                event_types=before.event_types if event_types is None else tuple(event_types),
                held_until=before.held_until if url is None else None,
                disabled_at=before.disabled_at if url is None else None,
            )
            return _replace(connection, before, after, now)

        return await self._database.write(write)

    async def rotate_secret(
        self, endpoint_id: str, account_id: str, secret: str, now: int, *, keep_old_s: int
    ) -> WebhookEndpoint | None:
        """Sign with `secret` from now on, and with the one before it for `keep_old_s` more; None if there is none."""

        def write(connection: sa.Connection) -> WebhookEndpoint | None:
            before = _find(connection, endpoint_id, account_id)
            if before is None:
                return None
            old_secret, until = (before.secret, now + keep_old_s) if keep_old_s else (None, None)
            after = msgspec.structs.replace(before, secret=secret, old_secret=old_secret, old_secret_until=until)
            return _replace(connection, before, after, now)

        return await self._database.write(write)

    async def delete_endpoint(self, endpoint_id: str, account_id: str) -> bool:
        """Forget an endpoint and everything on its way there; tell whether there was one."""

        def write(connection: sa.Connection) -> bool:
            if _find(connection, endpoint_id, account_id) is None:
                return False
            connection.execute(deliveries.delete().where(deliveries.c.endpoint_id == endpoint_id))
            connection.execute(endpoints.delete().where(endpoints.c.id == endpoint_id))
            return True

        return await self._database.write(write)

    # Deliveries

    async def list_deliveries(self, endpoint_id: str, *, limit: int, after: str | None = None) -> Page[Delivery] | None:
        """Return up to `limit` deliveries to an endpoint, newest first; None if the one to start after is unknown."""
        its = deliveries.c.endpoint_id == endpoint_id
        return await self._database.read(lambda c: read_page(c, deliveries, its, _delivery, limit=limit, after=after))

    async def due(self, now: int, *, per_endpoint: int, limit: int) -> list[Due]:
        """Return deliveries whose time has come, at most `per_endpoint` of each endpoint that may be sent to."""
        pending = deliveries.c.state == DeliveryState.PENDING.value, deliveries.c.next_attempt_at <= now
        may_be_sent_to = (
            endpoints.c.disabled_at.is_(None),
            sa.func.coalesce(endpoints.c.held_until, 0) <= now,
        )
        oldest = deliveries.c.next_attempt_at, deliveries.c.order
        place = sa.func.row_number().over(partition_by=deliveries.c.endpoint_id, order_by=oldest).label("place")
        ranked = (
            sa.select(deliveries, place)
            .join(endpoints, endpoints.c.id == deliveries.c.endpoint_id)
            .where(*pending, *may_be_sent_to)
            .subquery()
        )
        first = sa.select(ranked).where(ranked.c.place <= per_endpoint)
        query = first.order_by(ranked.c.next_attempt_at, ranked.c.order).limit(limit)

        def read(connection: sa.Connection) -> list[Due]:
            found = [_delivery(row) for row in connection.execute(query).mappings()]
            ids = {delivery.endpoint_id for delivery in found}
            rows = connection.execute(endpoints.select().where(endpoints.c.id.in_(ids))).mappings()
            places = {row["id"]: _endpoint(row) for row in rows}
            return [Due(delivery, places[delivery.endpoint_id]) for delivery in found]

        return await self._database.read(read)

    async def forget_ended(self, before: int) -> int:
        """Forget deliveries of events up to `before` that have ended, some of the oldest; return how many."""
        oldest = sa.select(deliveries.c.order).order_by(deliveries.c.order).limit(FORGOTTEN_MAX)
        ended = deliveries.c.state != DeliveryState.PENDING.value, deliveries.c.event_at <= before
        statement = deliveries.delete().where(deliveries.c.order.in_(oldest.scalar_subquery()), *ended)
        return await self._database.write(lambda c: c.execute(statement).rowcount)

    async def record(self, delivery: Delivery, verdict: Verdict, now: int) -> bool:
        """Remember how an attempt ended; return False when the delivery is gone or has moved on meanwhile."""
        expected = (
            deliveries.c.id == delivery.id,
            deliveries.c.state == DeliveryState.PENDING.value,
            deliveries.c.attempts == delivery.attempts,
        )
        values = {
            "state": verdict.state.value,
            "attempts": delivery.attempts + 1,
            "next_attempt_at": verdict.next_attempt_at,
            "last_status": verdict.status,
            "last_error": verdict.error,
            "delivered_at": now if verdict.state is DeliveryState.DELIVERED else None,
        }

        def write(connection: sa.Connection) -> bool:
            if connection.execute(deliveries.update().where(*expected).values(**values)).rowcount != 1:
                return False
            here = endpoints.c.id == delivery.endpoint_id
            if verdict.held_until is not None:
                connection.execute(endpoints.update().where(here).values(held_until=verdict.held_until))
            if verdict.disable:
                connection.execute(endpoints.update().where(here).values(disabled_at=now))
                _give_up(connection, delivery.endpoint_id)
            return True

        return await self._database.write(write)


def _give_up(connection: sa.Connection, endpoint_id: str) -> None:
    pending = deliveries.c.endpoint_id == endpoint_id, deliveries.c.state == DeliveryState.PENDING.value
    values = {"state": DeliveryState.FAILED.value, "next_attempt_at": None, "last_error": _ENDED_BY_410}
    connection.execute(deliveries.update().where(*pending).values(**values))


def _find(connection: sa.Connection, endpoint_id: str, account_id: str) -> WebhookEndpoint | None:
    query = endpoints.select().where(endpoints.c.id == endpoint_id, endpoints.c.account_id == account_id)
    row = connection.execute(query).mappings().first()
    return _endpoint(row) if row else None


def _replace(connection: sa.Connection, before: WebhookEndpoint, after: WebhookEndpoint, now: int) -> WebhookEndpoint:
    """Store a changed endpoint under a new `updated_at`; one that is as before stays as it is."""
    if after == before:
        return before
    after = msgspec.structs.replace(after, updated_at=now)
    values = msgspec.structs.asdict(after) | {"event_types": _joined(after.event_types)}
    connection.execute(endpoints.update().where(endpoints.c.id == before.id).values(**values))
    return after


def _joined(event_types: Sequence[EventType]) -> str:
    return " ".join(event_types)


def _endpoint(row: sa.RowMapping) -> WebhookEndpoint:
    values: dict[str, Any] = {name: row[name] for name in WebhookEndpoint.__struct_fields__}
    return WebhookEndpoint(**values | {"event_types": tuple(map(EventType, row["event_types"].split()))})


def _delivery(row: sa.RowMapping) -> Delivery:
    return Delivery(
        id=row["id"],
        account_id=row["account_id"],
        endpoint_id=row["endpoint_id"],
        event=Event(row["event_id"], EventType(row["event_type"]), row["event_at"], row["batch_id"]),
        state=DeliveryState(row["state"]),
        attempts=row["attempts"],
        next_attempt_at=row["next_attempt_at"],
        last_status=row["last_status"],
        last_error=row["last_error"],
        delivered_at=row["delivered_at"],
    )
