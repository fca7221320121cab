"""Tokens into text: characters that span tokens, stop strings, and what each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# What a decoder gives for bytes that are not a whole character yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special ones."""
        ...


class Pieces:
    """Text piece by piece: each call of `add` gives what its tokens complete."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tokens: list[int] = []
        # The last piece's tokens are decoded again with the next ones: what a token stands for hangs on those before.
        self._context = 0
        self._given = 0

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Return the whole characters that are new; with `last`, whatever is left."""
        self._tokens += tokens
        before = self._decoder.decode(self._tokens[self._context : self._given])
        after = self._decoder.decode(self._tokens[self._context :])
        if after.endswith(_INCOMPLETE) and not last:
            return ""
        self._context, self._given = self._given, len(self._tokens)
        return after[len(before) :]


class Text:
    """The text of one answer as its tokens come; it ends before the first stop string."""

    def __init__(self, decoder: Decoder, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._pieces = Pieces(decoder)
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._shown = 0

    def add(self, tokens: Sequence[int], *, last: bool) -> str:
        """Take more tokens and return what may be shown of them; `last` says that no more come.

        What could be the beginning of a stop string is held back.
        """
        if not self.stopped:
            looked_at = max(0, len(self.text) - self._longest)
            self.text += self._pieces.add(tokens, last=last)
            found = [place for stop in self._stop if (place := self.text.find(stop, looked_at)) >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        end = len(self.text) if last or self.stopped else len(self.text) - self._held_back()
        fresh, self._shown = self.text[self._shown : end], max(self._shown, end)
        return fresh

    def _held_back(self) -> int:
        sizes = (size for stop in self._stop for size in range(1, len(stop)) if self.text.endswith(stop[:size]))
        return max(sizes, default=0)


def pieces(decoder: Decoder, tokens: Sequence[int], length: int) -> list[str]:
    """Return what each token adds to a text of so many characters; tokens past its end are left out.

    A token that ends inside a character adds nothing, the one that completes it all of it.
    """
    found: list[str] = []
    cutter = Pieces(decoder)
    for place, token in enumerate(tokens):
        piece = cutter.add([token], last=place == len(tokens) - 1)
        if length <= 0 and piece:
            break
        found.append(piece)
        length -= len(piece)
    return found
