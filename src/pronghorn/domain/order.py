"""In which order a shard's lines are sent: those whose prompts begin alike next to each other.

An engine keeps what it has computed of a prompt, so the next line that begins with the same words costs only the rest
of it. Sorted prompts bring such lines together whatever it is that they share: a system prompt, a document, a few
examples. In sorted order a prompt shares most with one of its two neighbours, so no prompt is ever taken apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from pronghorn.domain.model import Endpoint

# Fields in the order in which an engine's template writes them; no field means that nothing is gained by an order.
_PROMPT_FIELDS: dict[Endpoint, tuple[bytes, ...]] = {
    Endpoint.CHAT_COMPLETIONS: (b'"messages"',),
    Endpoint.COMPLETIONS: (b'"prompt"',),
    Endpoint.RESPONSES: (b'"instructions"', b'"input"'),
    Endpoint.EMBEDDINGS: (),
}
# Taken values are cut off the front of the list so many at a time: one at a time costs a move of all the others.
_TAKEN_MAX = 256


def prompt_offset(body: bytes, endpoint: Endpoint) -> int:
    """Return where in a body its prompt begins; the length of the body if it is not found.

    An escaped quote keeps text from being taken for a field; a value that is spelled like one costs order alone.
    """
    for field in _PROMPT_FIELDS[endpoint]:
        if (offset := body.find(field)) >= 0:
            return offset
    return len(body)


def shared_bytes(one: bytes, other: bytes) -> int:
    """Return how many bytes two prompts have in common before they differ."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def spread(number: int) -> float:
    """Return 0, 1/2, 1/4, 3/4, 1/8, ... for 0, 1, 2, ...: evenly spread, however many of them there are."""
    digits = f"{number:b}"
    return int(digits[::-1], 2) / (1 << len(digits))


class Prompted(Protocol):
    """What has a prompt: the bytes that an engine computes from the first to the last."""

    prompt: bytes


T = TypeVar("T", bound=Prompted)
_prompt = attrgetter("prompt")


class PromptQueue(Generic[T]):
    """What waits to be sent, in the order of its prompts; what is put back goes before everything else.

    Whoever takes says which prompt to go on from. Those who begin anywhere begin far from each other, so that each has
    prompts of its own to go through.
    """

    def __init__(self) -> None:
        self._again: deque[T] = deque()
        self._last: deque[T] = deque()
        self._sorted: list[T] = []
        self._taken = 0
        self._starts = 0

    def __len__(self) -> int:
        return len(self._again) + len(self._sorted) - self._taken + len(self._last)

    def __iter__(self) -> Iterator[T]:
        yield from self._again
        yield from self._sorted[self._taken :]
        yield from self._last

    @property
    def has_first(self) -> bool:
        """Tell whether something waits that was not put last."""
        return bool(self._again) or self._taken < len(self._sorted)

    @property
    def next_is_new(self) -> bool:
        """Tell whether what is taken next has not been put back."""
        return not self._put_back

    @property
    def next_put_back(self) -> T | None:
        """Return what is taken next, if that has been put back."""
        return self._put_back[0] if self._put_back else None

    @property
    def _put_back(self) -> deque[T]:
        """Those that were put back of which one is taken next; none while others go first."""
        return self._again if self.has_first else self._last

    def add(self, values: Iterable[T]) -> None:
        """Put values in their places among those that wait; equal prompts stay in the order they came in."""
        self._forget_taken()
        self._sorted += values
        self._sorted.sort(key=_prompt)

    def put_back(self, value: T) -> None:
        """Make a value that was taken the next one."""
        self._again.appendleft(value)

    def put_last(self, value: T) -> None:
        """Make a value that was taken the one that is taken after all others."""
        self._last.append(value)

    def take(self) -> T:
        """Return the first."""
        return self._put_back.popleft() if self._put_back else self._pop(self._taken)

    def take_anywhere(self) -> T:
        """Return one that is far from where others have begun."""
        if self._put_back:
            return self._put_back.popleft()
        start = self._starts
        self._starts += 1
        return self._pop(self._taken + int(spread(start) * (len(self._sorted) - self._taken)))

    def take_after(self, prompt: bytes) -> T:
        """Return the one that follows a prompt in order, or else the last."""
        if self._put_back:
            return self._put_back.popleft()
        if prompt <= self._sorted[self._taken].prompt:
            return self._pop(self._taken)  # so it is where one replica takes everything, without a search
        return self._pop(min(self._place(prompt), len(self._sorted) - 1))

    def take_nearest(self, prompt: bytes) -> T:
        """Return one that shares most with a prompt."""
        return self._put_back.popleft() if self._put_back else self._pop(self._nearest(prompt)[0])

    def shares(self, prompt: bytes) -> int:
        """Return how many bytes the nearest, which is not one put back, has in common with a prompt."""
        return self._nearest(prompt)[1] if self._taken < len(self._sorted) else 0

    def _nearest(self, prompt: bytes) -> tuple[int, int]:
        after = self._place(prompt)
        neighbours = [index for index in (after, after - 1) if self._taken <= index < len(self._sorted)]
        shared = [(shared_bytes(self._sorted[index].prompt, prompt), index) for index in neighbours]
        bytes_, index = max(shared, key=lambda found: found[0])
        return index, bytes_

    def _place(self, prompt: bytes) -> int:
        return bisect_left(self._sorted, prompt, lo=self._taken, key=_prompt)

    def _pop(self, index: int) -> T:
        if index == self._taken:
            value = self._sorted[index]
            self._taken += 1
        else:
            value = self._sorted.pop(index)
        if self._taken in (_TAKEN_MAX, len(self._sorted)):  # the last does not hold those before it
            self._forget_taken()
        return value

    def _forget_taken(self) -> None:
        del self._sorted[: self._taken]
        self._taken = 0
