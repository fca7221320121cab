"""Which status of a batch may follow which, and what each one means for the others."""

from __future__ import annotations

from pronghorn.domain.model import BatchStatus as S
from pronghorn.domain.model import Closing

# Who moves each on: validating, the planner; in_progress and finalizing, the coordinator; cancelling, the
# coordinator once no line is in flight. A client's cancel or the end of the window closes what has not been finalized.
# docs/ARCHITECTURE.md draws the same edges; the database's CHECK knows the statuses alone.
TRANSITIONS: frozenset[tuple[S, S]] = frozenset(
    {
        (S.VALIDATING, S.IN_PROGRESS),
        (S.VALIDATING, S.FAILED),
        (S.VALIDATING, S.CANCELLING),
        (S.VALIDATING, S.EXPIRED),
        (S.IN_PROGRESS, S.FINALIZING),
        (S.IN_PROGRESS, S.CANCELLING),
        (S.FINALIZING, S.COMPLETED),
        (S.FINALIZING, S.EXPIRED),
        (S.CANCELLING, S.CANCELLED),
    }
)

TERMINAL = frozenset({S.FAILED, S.COMPLETED, S.EXPIRED, S.CANCELLED})


def may_follow(current: S, following: S) -> bool:
    """Tell whether a batch in `current` may enter `following`."""
    return (current, following) in TRANSITIONS


def stamp_of(status: S) -> str:
    """Return the name of the time stamp that is set when `status` is entered."""
    return "created_at" if status is S.VALIDATING else f"{status.value}_at"


def final_status(closing: Closing | None) -> S:
    """Return the terminal status of a planned batch whose every line has its outcome."""
    match closing:
        case None:
            return S.COMPLETED
        case Closing.EXPIRED:
            return S.EXPIRED
        case Closing.CANCELLED:
            return S.CANCELLED
