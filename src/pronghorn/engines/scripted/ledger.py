"""What the engine was asked and what it answered: totals, counts by line, and a file with one entry a request."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from pronghorn.engines.scripted.faults import SUCCESS_KINDS, FaultKind

if TYPE_CHECKING:
    from pathlib import Path


class LineCounts(msgspec.Struct, gc=False):
    """How often one line was attempted, given a fault, and answered well."""

    attempts: int = 0
    faults: int = 0
    answered_ok: int = 0


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One request in the ledger's file; `status` is null when no complete answer went out.

    `key` is the body's SHA-256 in hex, `attempt` counts from 0, `t` is the machine's monotonic time in seconds.
    """

    key: str
    attempt: int
    fault: FaultKind | None
    status: int | None
    ok: bool
    t: float


class Totals(msgspec.Struct):
    """The engine's books over its whole life, as `GET /scripted/ledger` answers them."""

    requests: int = 0
    answered: int = 0
    answered_ok: int = 0
    abandoned: int = 0
    faults: dict[str, int] = {}
    statuses: dict[str, int] = {}
    in_flight: int = 0
    max_in_flight: int = 0
    keys: int = 0
    keys_answered_ok_more_than_once: int = 0
    keys_forgotten: int = 0


class Ledger:
    """The engine's books. An entry is with the operating system before its answer is on the wire.

    With `keys_max` lines in memory the oldest is forgotten; if it comes again, it counts as a new one.
    """

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._lines: dict[bytes, LineCounts] = {}
        self._totals = Totals()
        self._faults: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._fd: int | None = None

    @classmethod
    def open(cls, path: Path | None, keys_max: int) -> Ledger:
        """Return a ledger that appends to `path`, with what the file holds already counted in."""
        ledger = cls(keys_max)
        if path is not None:
            ledger._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            ledger._replay(ledger._fd, path)
        return ledger

    def totals(self) -> Totals:
        """Return the totals up to now."""
        return msgspec.structs.replace(self._totals, faults=dict(self._faults), statuses=dict(self._statuses))

    def line(self, key: bytes) -> LineCounts:
        """Return the counts of the line with this SHA-256 digest, all zero when it is unknown or forgotten."""
        return self._lines.get(key) or LineCounts()

    def asked(self, key: bytes) -> LineCounts:
        """Count a request as it arrives and return its line's counts, this attempt included."""
        totals = self._totals
        totals.requests += 1
        totals.in_flight += 1
        if totals.in_flight > totals.max_in_flight:
            totals.max_in_flight = totals.in_flight
        counts = self._lines.get(key)
        if counts is None:
            counts = self._remember(key)
        counts.attempts += 1
        return counts

    def faulted(self, counts: LineCounts, kind: FaultKind) -> None:
        """Count a fault as it is decided."""
        counts.faults += 1
        self._faults[kind.value] += 1

    def settled(self, entry: Entry, counts: LineCounts) -> None:
        """Count how a request ended and write its entry."""
        if self._fd is not None:
            # Straight to the page cache: it costs a few microseconds, and a killed engine loses no entry
            # of an answer that it sent.
            _write_all(self._fd, msgspec.json.encode(entry) + b"\n")
        self._totals.in_flight -= 1
        self._tally(entry, counts)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _tally(self, entry: Entry, counts: LineCounts) -> None:
        totals = self._totals
        if entry.status is None:
            totals.abandoned += entry.fault is None
            return
        totals.answered += 1
        self._statuses[str(entry.status)] += 1
        if entry.ok:
            totals.answered_ok += 1
            counts.answered_ok += 1
            totals.keys_answered_ok_more_than_once += counts.answered_ok == 2

    def _remember(self, key: bytes) -> LineCounts:
        if len(self._lines) >= self._keys_max:
            del self._lines[next(iter(self._lines))]
            self._totals.keys_forgotten += 1
        self._totals.keys += 1
        counts = self._lines[key] = LineCounts()
        return counts

    def _replay(self, fd: int, path: Path) -> None:
        decode = msgspec.json.Decoder(Entry).decode
        whole_bytes = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._count_again(decode(line))
                whole_bytes += len(line)
        # A killed engine may leave a torn last line, which would spoil the entry after it.
        os.ftruncate(fd, whole_bytes)

    def _count_again(self, entry: Entry) -> None:
        counts = self.asked(bytes.fromhex(entry.key))
        if entry.fault is not None:
            self.faulted(counts, entry.fault)
        self._totals.in_flight -= 1
        self._tally(entry, counts)


def is_ok(status: int, fault: FaultKind | None) -> bool:
    """Say whether a complete reply is a good answer to its line."""
    return status == 200 and (fault is None or fault in SUCCESS_KINDS)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def as_document(totals: Totals) -> dict[str, Any]:
    """Return the totals as a JSON document."""
    return msgspec.structs.asdict(totals)
