"""Which lines of an ended batch are run again: input and error file, both in input order, read together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from pronghorn.domain.causes import cause_of
from pronghorn.domain.planning import RawLine


class Selection(msgspec.Struct, frozen=True):
    """Which failed lines to take: all, or those with one of the codes or HTTP statuses; `overrides` change bodies."""

    codes: frozenset[str] = frozenset()
    statuses: frozenset[int] = frozenset()
    overrides: dict[str, Any] = {}

    def takes(self, result: bytes) -> bool:
        """Tell whether a line of the error file is wanted."""
        if not self.codes and not self.statuses:
            return True
        cause = cause_of(result)
        return cause.code in self.codes or cause.status_code in self.statuses


class _Line(msgspec.Struct):
    custom_id: msgspec.Raw
    method: msgspec.Raw
    url: msgspec.Raw
    body: dict[str, msgspec.Raw]


def select(lines: Iterable[RawLine], errors: Iterable[RawLine], selection: Selection) -> Iterator[bytes]:
    """Yield the input lines, newline included, whose results in the error file the selection takes.

    A result's id ends in its line's number, 12 hexadecimal digits, and both files are in input order.
    """
    numbers = _numbers(errors, selection)
    wanted = next(numbers, None)
    for line in lines:
        if wanted is None:
            return
        if line.number == wanted:
            if line.content is not None:  # one that is too long is too long again
                yield _overridden(line.content, selection.overrides) + b"\n"
            wanted = next(numbers, None)


def _numbers(errors: Iterable[RawLine], selection: Selection) -> Iterator[int]:
    for error in errors:
        if error.content and selection.takes(error.content):
            # It begins with its id; the rest is not decoded, an answer may be nested deeper than a decoder goes.
            yield int(error.content.split(b'"', 4)[3][-12:], 16)


def _overridden(content: bytes, overrides: dict[str, Any]) -> bytes:
    """Return a line with fields of its body replaced; a null takes a field away."""
    if not overrides:
        return content
    try:
        line = msgspec.json.decode(content, type=_Line)
    except (ValueError, RecursionError):
        return content  # validation says again what is wrong with it
    for name, value in overrides.items():
        if value is None:
            line.body.pop(name, None)
        else:
            line.body[name] = msgspec.Raw(msgspec.json.encode(value))
    return msgspec.json.encode(line)
