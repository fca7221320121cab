"""Which line a replica gets next: slots walk through prompts of their own, shards of a batch lend each other lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pronghorn.domain.model import Endpoint, Replica, Shard, ShardKey
from pronghorn.engines.client import EngineClient
from pronghorn.storage.segments import Segments
from pronghorn.worker.lane import Lane
from pronghorn.worker.neighbours import PASSED_OVER_MAX, next_line
from pronghorn.worker.protocol import Assign
from pronghorn.worker.shard_run import Line, ShardRun

URL = "http://127.0.0.1:1/v1"


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient(URL)
    yield client
    await client.close()


def shard(position: int, *prompts: bytes, batch: str = "batch_1") -> ShardRun:
    key = ShardKey(batch, position)
    order = Assign(Shard(key, 1, len(prompts), 0, 0), [], Endpoint.CHAT_COMPLETIONS, "m")
    run = ShardRun(order, Segments(Path("none")), lambda: None, prompt_order=True)
    run.ready.add([Line(run, number, b'"id"', b"{", prompt) for number, prompt in enumerate(prompts)])
    return run


def prompts(*groups: int, lines: int) -> list[bytes]:
    """Return prompts that take turns between groups, each with a beginning that is worth having cached."""
    return [b"%d" % group * 400 + b"%d" % number for number in range(lines) for group in groups]


def slotted(client: EngineClient, slots: int) -> Lane:
    return Lane(Replica(URL, window=slots, slots=slots), client)


def keep_busy(lane: Lane, runs: list[ShardRun], slots: int) -> int:
    """Send everything, each answer making room for the next line; return how often a slot had to begin anew."""
    sent = [next_line(lane, runs[0], runs) for _ in range(slots)]
    begun = slots
    while any(run.ready for run in runs):
        done = sent.pop(0)
        lane.freed_prompts.append(done.prompt)
        line = next_line(lane, next(run for run in runs if run.ready), runs)
        begun += line.prompt[:400] != done.prompt[:400]
        sent.append(line)
    return begun


async def test_each_slot_stays_with_its_prompt_while_there_are_lines_of_it(client: EngineClient) -> None:
    run = shard(0, *prompts(1, 2, 3, 4, lines=50))
    assert keep_busy(slotted(client, 4), [run], 4) <= 7
    assert len(run.pending) == 200


async def test_slots_begin_far_from_each_other(client: EngineClient) -> None:
    run, lane = shard(0, *prompts(1, 2, 3, 4, lines=50)), slotted(client, 8)
    begun = Counter(next_line(lane, run, [run]).prompt[:1] for _ in range(8))
    assert begun == {b"1": 2, b"2": 2, b"3": 2, b"4": 2}


async def test_small_shards_of_a_batch_are_gone_through_together(client: EngineClient) -> None:
    runs = [shard(position, *prompts(1, 2, 3, 4, lines=4)) for position in range(2)]
    assert keep_busy(slotted(client, 4), runs, 4) <= 7


async def test_slots_that_are_freed_together_each_stay_with_their_prompt(client: EngineClient) -> None:
    run, lane = shard(0, *prompts(1, 2, lines=10)), slotted(client, 2)
    for _ in range(5):
        lane.freed_prompts += [b"2" * 400, b"1" * 400]
        assert [next_line(lane, run, [run]).prompt[:1] for _ in range(2)] == [b"2", b"1"]


async def test_another_batch_lends_nothing(client: EngineClient) -> None:
    first, other = shard(0, *prompts(1, lines=2)), shard(0, *prompts(2, lines=2), batch="batch_2")
    lane = slotted(client, 1)
    lane.freed_prompts.append(b"2" * 400)
    assert next_line(lane, first, [first, other]).run is first


async def test_an_older_shard_is_passed_over_for_a_while_only(client: EngineClient) -> None:
    old, young = shard(0, *prompts(1, lines=2)), shard(1, *prompts(2, lines=2 * PASSED_OVER_MAX))
    lane = slotted(client, 1)
    runs = []
    for _ in range(PASSED_OVER_MAX + 1):
        lane.freed_prompts.append(b"2" * 400)
        runs.append(next_line(lane, old, [old, young]).run)
    assert runs == [young] * PASSED_OVER_MAX + [old]


async def test_a_line_put_back_goes_first(client: EngineClient) -> None:
    old, young = shard(0, *prompts(1, lines=2)), shard(1, *prompts(2, lines=2))
    lane = slotted(client, 1)
    again = next_line(lane, old, [old, young])
    old.put_back(again)
    lane.freed_prompts.append(b"2" * 400)
    assert next_line(lane, old, [old, young]) is again


async def test_replicas_without_slots_go_through_a_part_each(client: EngineClient) -> None:
    run = shard(0, *prompts(1, 2, lines=30))
    lanes = [Lane(Replica(URL), client) for _ in range(2)]
    met = [{next_line(lane, run, [run]).prompt[:1] for _ in range(20)} for lane in lanes for _ in (0,)]
    assert met == [{b"1"}, {b"2"}]
