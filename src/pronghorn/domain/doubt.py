"""What to make of lines that an engine lost: is the engine dead, does it hang, or does it live and the line is bad?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import msgspec

from pronghorn.domain.model import Endpoint
from pronghorn.domain.retry import Lost

# Deaths of the engine that a line may have been part of before it is run alone, and alone before it is given up: a
# line that is alone three times when its engine dies is no coincidence.
SHARED_DEATHS_MAX = 2
ALONE_DEATHS_MAX = 3
# Where the engine was seen to die by itself, lines may be part of more of its deaths; not of many more, for each takes
# along all that the engine has, and may cost minutes.
SHARED_DEATHS_OF_FRAIL_MAX = 4
ALONE_DEATHS_OF_FRAIL_MAX = 4
# One lost canary has met an engine that was just ending; so many show one that is there and loses what it gets.
CANARIES_LOST_MAX = 3

LineT = TypeVar("LineT")


class Casualty(NamedTuple, Generic[LineT]):
    """A line that was lost, how, and whether it was with the engine when the first was."""

    line: LineT
    lost: Lost
    witness: bool


@dataclass(slots=True)
class Doubt(Generic[LineT]):
    """Lines lost since `since`, until something proves that their engine lives or does not.

    `witnesses` is how many lines the engine had at that time, the first one included. Times are monotonic seconds.
    """

    since: float
    witnesses: int
    casualties: list[Casualty[LineT]] = field(default_factory=list)
    survivors: int = 0
    canaries_lost: int = 0

    def add(self, line: LineT, lost: Lost, sent_at: float) -> None:
        """Count a line in that was lost."""
        self.casualties.append(Casualty(line, lost, sent_at <= self.since))

    def answered(self, sent_at: float) -> bool:
        """Tell whether an answer proves the engine alive; one that may lie in a buffer since before does not."""
        if sent_at > self.since:
            return True
        self.survivors += 1
        return False

    def died(self) -> bool:
        """Tell whether an engine that lives now has died since and been replaced.

        Then it has lost all it had, several lines, or a canary before one that it answered.
        """
        lost = sum(casualty.witness and not casualty.lost.hung for casualty in self.casualties)
        lost_all = lost > 1 and lost >= self.witnesses
        return lost_all or 0 < self.canaries_lost < CANARIES_LOST_MAX


class Suspicion:
    """How many deaths of an engine it takes to suspect a line, and to find it guilty.

    A line that was alone when its engine died, and is answered the next time, shows that the engine is frail: it dies
    by itself. That holds until a line is found guilty.
    """

    def __init__(self) -> None:
        self._frail = False

    @property
    def shared_deaths_max(self) -> int:
        return SHARED_DEATHS_OF_FRAIL_MAX if self._frail else SHARED_DEATHS_MAX

    @property
    def alone_deaths_max(self) -> int:
        return ALONE_DEATHS_OF_FRAIL_MAX if self._frail else ALONE_DEATHS_MAX

    def acquit(self) -> None:
        self._frail = True

    def convict(self) -> None:
        self._frail = False


def canary(endpoint: Endpoint, model: str) -> bytes:
    """Return the smallest request to an endpoint: what a hanging engine leaves unanswered, and a busy one does not."""
    match endpoint:
        case Endpoint.CHAT_COMPLETIONS:
            asked: dict[str, object] = {"messages": [{"role": "user", "content": "ping"}], "max_tokens": 1}
        case Endpoint.COMPLETIONS:
            asked = {"prompt": "ping", "max_tokens": 1}
        case Endpoint.EMBEDDINGS:
            asked = {"input": "ping"}
        case Endpoint.RESPONSES:
            asked = {"input": "ping", "max_output_tokens": 16}
    return msgspec.json.encode({"model": model, **asked})
