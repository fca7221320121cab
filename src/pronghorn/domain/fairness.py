"""Whose shard is next: jobs share the engine by weight, and inside a job the nearest deadline goes first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """A batch with a shard that waits; `deadline` is Unix seconds or None, `order` grows with creation."""

    batch_id: str
    job_id: str
    weight: int
    deadline: int | None
    order: int


class FairShare:
    """Weighted fair queueing over jobs, in lines.

    A job that comes back gets no credit for the time in which it had nothing waiting, and keeps what it owes.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._floor = 0.0

    def pick(self, candidates: Iterable[Candidate]) -> Candidate | None:
        """Return the batch whose shard should go next, or None when nothing waits."""
        waiting = list(candidates)
        if not waiting:
            return None
        active = {c.job_id for c in waiting}
        least = min((self._served[job] for job in active if job in self._served), default=self._floor)
        self._floor = floor = max(self._floor, least)
        owing = {job: served for job, served in self._served.items() if served > floor}
        self._served = dict.fromkeys(active, floor) | owing
        return min(waiting, key=self._urgency)

    def charge(self, candidate: Candidate, lines: int) -> None:
        """Count lines handed out against a job's share."""
        served = self._served.get(candidate.job_id, 0.0)
        self._served[candidate.job_id] = served + lines / candidate.weight

    def _urgency(self, candidate: Candidate) -> tuple[float, float, int]:
        deadline = float("inf") if candidate.deadline is None else candidate.deadline
        return self._served[candidate.job_id], deadline, candidate.order
