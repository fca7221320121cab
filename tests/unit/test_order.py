"""The order in which lines are sent: by their prompts, and near to what was sent before."""

from __future__ import annotations

import json
import random
import weakref
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.domain.model import Endpoint
from pronghorn.domain.order import PromptQueue, prompt_offset, shared_bytes, spread


class Prompt(NamedTuple):
    prompt: bytes
    number: int = 0


def queue(*prompts: bytes) -> PromptQueue[Prompt]:
    waiting: PromptQueue[Prompt] = PromptQueue()
    waiting.add([Prompt(prompt, number) for number, prompt in enumerate(prompts)])
    return waiting


@pytest.mark.parametrize(
    ("endpoint", "fields", "first"),
    [
        (Endpoint.CHAT_COMPLETIONS, {"model": "m", "max_tokens": 5, "messages": []}, "messages"),
        (Endpoint.CHAT_COMPLETIONS, {"messages": [], "model": "m"}, "messages"),
        (Endpoint.CHAT_COMPLETIONS, {"user": 'say "messages" twice', "messages": []}, "messages"),
        (Endpoint.COMPLETIONS, {"model": "m", "prompt": "p", "n": 2}, "prompt"),
        (Endpoint.RESPONSES, {"model": "m", "instructions": "i", "input": "p"}, "instructions"),
        (Endpoint.RESPONSES, {"model": "m", "input": "p"}, "input"),
        (Endpoint.EMBEDDINGS, {"model": "m", "input": "p"}, None),
        (Endpoint.CHAT_COMPLETIONS, {"model": "m", "mess\\u0061ges": []}, None),
    ],
)
def test_a_prompt_begins_with_what_the_engine_reads_first(
    endpoint: Endpoint, fields: dict[str, object], first: str | None
) -> None:
    body = json.dumps(fields).encode()
    prompt = body[prompt_offset(body, endpoint) :]
    assert prompt.startswith(f'"{first}":'.encode()) if first else prompt == b""


@given(st.binary(), st.binary(), st.binary())
def test_shared_bytes_are_those_before_the_first_that_differs(start: bytes, one: bytes, other: bytes) -> None:
    shared = shared_bytes(start + one, start + other)
    assert (start + one)[:shared] == (start + other)[:shared]
    assert (start + one)[shared : shared + 1] != (start + other)[shared : shared + 1] or one == other


def test_places_to_begin_at_are_spread_evenly() -> None:
    assert [spread(number) for number in range(6)] == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8]
    assert sorted(spread(number) for number in range(64)) == [number / 64 for number in range(64)]


def test_prompts_come_in_order_and_equal_ones_in_the_order_of_the_file() -> None:
    waiting = queue(b"b", b"a", b"b", b"a")
    assert [waiting.take() for _ in range(4)] == [(b"a", 1), (b"a", 3), (b"b", 0), (b"b", 2)]
    assert len(waiting) == 0


def test_what_comes_later_takes_its_place_among_what_waits() -> None:
    waiting = queue(b"a", b"c", b"e")
    assert waiting.take().prompt == b"a"
    waiting.add([Prompt(b"d"), Prompt(b"b")])
    assert [waiting.take().prompt for _ in range(4)] == [b"b", b"c", b"d", b"e"]


def test_what_is_put_back_comes_first_whoever_takes() -> None:
    waiting = queue(b"a", b"b", b"c", b"d", b"e")
    taken = [waiting.take() for _ in range(4)]
    assert waiting.next_is_new
    for value in reversed(taken):
        waiting.put_back(value)
    assert not waiting.next_is_new
    assert [value.prompt for value in waiting] == [b"a", b"b", b"c", b"d", b"e"]
    found = [waiting.take(), waiting.take_after(b"c"), waiting.take_nearest(b"e"), waiting.take_anywhere()]
    assert found == taken
    assert waiting.next_is_new


def test_what_is_put_last_comes_after_all_others_whoever_takes() -> None:
    waiting = queue(b"a", b"b", b"c", b"d")
    refused = [waiting.take(), waiting.take()]
    for value in refused:
        waiting.put_last(value)
    assert (len(waiting), waiting.next_is_new, waiting.next_put_back) == (4, True, None)
    assert [value.prompt for value in waiting] == [b"c", b"d", b"a", b"b"]
    assert waiting.has_first
    assert [waiting.take_after(b"a").prompt, waiting.take_nearest(b"a").prompt] == [b"c", b"d"]
    assert (waiting.next_is_new, waiting.next_put_back) == (False, refused[0])
    assert (len(waiting), waiting.has_first) == (2, False)
    waiting.put_back(refused[1])
    assert waiting.next_put_back == refused[1]
    assert [waiting.take(), waiting.take_anywhere(), waiting.take_nearest(b"z")] == [refused[1], *refused]
    assert len(waiting) == 0


def test_one_replica_goes_through_everything_in_order_and_two_through_a_part_each() -> None:
    prompts = [b"%03d" % number for number in range(100)]
    waiting = queue(*random.Random(1).sample(prompts, 100))
    first, second = [waiting.take_anywhere()], [waiting.take_anywhere()]
    for _ in range(30):
        first.append(waiting.take_after(first[-1].prompt))
        second.append(waiting.take_after(second[-1].prompt))
    assert [value.prompt for value in first] == prompts[:31]
    assert [value.prompt for value in second] == prompts[50:81]


def test_what_was_taken_is_let_go_with_the_last() -> None:
    class Watched:
        def __init__(self, prompt: bytes) -> None:
            self.prompt = prompt

    for takes in (("first", "first", "first"), ("first", "last", "last")):
        waiting: PromptQueue[Watched] = PromptQueue()
        waiting.add([Watched(prompt) for prompt in (b"a", b"b", b"c")])
        held = weakref.WeakSet(waiting)
        for take in takes:
            waiting.take() if take == "first" else waiting.take_after(b"z")
        assert not held


def test_the_nearest_is_the_neighbour_that_shares_more() -> None:
    waiting = queue(b"alpha one", b"alpha two", b"beta one", b"beta two")
    assert waiting.shares(b"alpha zero") == 6
    assert waiting.take_nearest(b"alpha zero").prompt == b"alpha two"
    assert waiting.take_nearest(b"beta o").prompt == b"beta one"
    assert waiting.take_nearest(b"beta o").prompt == b"beta two"
    assert waiting.take_nearest(b"beta o").prompt == b"alpha one"
    assert waiting.shares(b"beta") == 0


STEPS = st.sampled_from(["take", "anywhere", "after", "nearest", "put back", "put last", "add"])


@given(st.lists(st.tuples(STEPS, st.binary())))
def test_everything_that_waits_is_taken_once(steps: list[tuple[str, bytes]]) -> None:
    waiting = queue(*(b"%d" % number for number in range(600)))
    before, taken, added = set(waiting), [], 600
    for step, prompt in steps:
        match step:
            case "take":
                taken.append(waiting.take())
            case "anywhere":
                taken.append(waiting.take_anywhere())
            case "after":
                taken.append(waiting.take_after(prompt))
            case "nearest":
                taken.append(waiting.take_nearest(prompt))
            case "put back" if taken:
                waiting.put_back(taken.pop())
            case "put last" if taken:
                waiting.put_last(taken.pop())
            case "add":
                before.add(Prompt(prompt, added))
                waiting.add([Prompt(prompt, added)])
                added += 1
    while waiting:
        taken.append(waiting.take())
    assert len(taken) == len(before)
    assert set(taken) == before
