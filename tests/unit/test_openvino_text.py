"""Tokens become text piece by piece, and a stop string ends it to the character."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.engines.openvino.text import Text, pieces


class Bytes:
    """A decoder whose tokens are bytes, so that most characters take several."""

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def shown(content: str, stop: Sequence[str] = (), size: int = 1) -> tuple[list[str], Text]:
    text, tokens = Text(Bytes(), stop), list(content.encode())
    parts = [tokens[at : at + size] for at in range(0, len(tokens), size)] or [[]]
    return [text.add(part, last=part is parts[-1]) for part in parts], text


@given(st.text(), st.integers(1, 7))
def test_what_is_shown_is_the_text(content: str, size: int) -> None:
    parts, text = shown(content, size=size)
    assert "".join(parts) == text.text == content


@given(st.text("ab\u20ac", max_size=20), st.lists(st.text("ab\u20ac", min_size=1, max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_string(content: str, stop: list[str]) -> None:
    """However the tokens come, nothing of a stop string is ever shown."""
    for size in (1, 2, 100):
        parts, text = shown(content, stop, size)
        assert "".join(parts) == text.text
        assert not any(one in text.text for one in stop)
        assert content.startswith(text.text)
        assert text.stopped == any(one in content for one in stop)


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    parts, _ = shown("ab-cd", ["-END"])
    assert parts == ["a", "b", "", "-c", "d"]


def test_a_character_is_given_to_the_token_that_completes_it() -> None:
    tokens = list("a\u20acb".encode())
    assert pieces(Bytes(), tokens, 3) == ["a", "", "", "\u20ac", "b"]
    assert pieces(Bytes(), tokens, 1) == ["a", "", ""], "tokens past the end are left out"


@pytest.mark.parametrize("end", [b"\xe2", b"\xe2\x82"])
def test_what_is_cut_off_is_shown_as_such(end: bytes) -> None:
    text = Text(Bytes(), ())
    assert text.add(list(b"a" + end), last=False) == ""
    assert text.add([], last=True) == "a\N{REPLACEMENT CHARACTER}"
