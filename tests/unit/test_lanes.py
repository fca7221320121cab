"""One URL that is used with two keys is two replicas."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pronghorn.clock import SystemClock
from pronghorn.domain.model import Endpoint, Replica, Shard, ShardKey
from pronghorn.storage.segments import Segments
from pronghorn.worker.lanes import Lanes
from pronghorn.worker.protocol import Assign, Configure
from pronghorn.worker.shard_run import Line, ShardRun

GRACE_S = 1.0
URL = "http://127.0.0.1:9/v1"
FIRST, SECOND = (Replica(URL, window=4, api_key_env=key) for key in ("FIRST_KEY", "SECOND_KEY"))


def lanes() -> Lanes:
    config = Configure("", "", 1024, 1.0, 1.0, GRACE_S, prompt_order=False)
    lanes = Lanes(config, SystemClock(), asyncio.get_running_loop().create_task, lambda: None)
    lanes.use([FIRST, SECOND])
    return lanes


async def test_room_is_left_where_the_live_requests_go() -> None:
    found = lanes()
    found.leave_room({SECOND.name: 3})
    assert [lane.live for lane in found] == [0, 3]
    await found.close()


async def test_a_key_that_is_refused_pauses_no_other() -> None:
    found = lanes()
    first, _ = found
    first.breaker.trip(0.0, 60.0, "the engine refuses access with status 401")
    paused = {pause.replica for lane in found for pause in lane.paused()}
    assert paused == {FIRST.name} != {SECOND.name}
    await found.close()


def failed_once(tmp_path: Path) -> tuple[ShardRun, Line]:
    """Return a line that has failed at the first replica and is ready again, and its shard."""
    order = Assign(Shard(ShardKey("batch_1", 0), 1, 1, 0, 1), [], Endpoint.CHAT_COMPLETIONS, "a-model")
    run = ShardRun(order, Segments(tmp_path), lambda: None, prompt_order=False)
    line = Line(run, 1, b'"id"')
    line.failed_at = frozenset({FIRST.name})
    run.put_back(line)
    return run, line


async def test_a_line_that_failed_with_one_key_is_tried_with_the_other(tmp_path: Path) -> None:
    found = lanes()
    _, second = found
    run, _ = failed_once(tmp_path)
    assert found.roomiest(run, 0.0, 0) is second
    await found.close()


async def test_a_line_that_failed_at_one_replica_probes_the_other_before_it_fails_there_again(tmp_path: Path) -> None:
    found = lanes()
    first, second = found
    run, _ = failed_once(tmp_path)
    second.breaker.trip(0.0, 5.0, "it is down")
    assert found.roomiest(run, 4.0, 0) is first, "it has room, and the other admits no probe yet"
    assert found.roomiest(run, 5.0, 0) is second
    await found.close()


async def test_a_replica_that_is_away_is_waited_for_as_long_as_one_that_lacks_a_model(tmp_path: Path) -> None:
    found = lanes()
    first, second = found
    _, line = failed_once(tmp_path)
    assert not found.another_is_away(first, line, 0.0), "it is there, and gets the line next"
    second.breaker.trip(0.0, 60.0, "it is down")
    assert found.another_is_away(first, line, GRACE_S - 0.1)
    assert not found.another_is_away(first, line, GRACE_S)
    assert not found.another_is_away(second, line, 0.0), "the first has failed the line"
    await found.close()


async def test_a_line_goes_back_to_a_replica_that_only_limited_it_rather_than_to_one_that_failed_it(
    tmp_path: Path,
) -> None:
    found = lanes()
    first, second = found
    run, line = failed_once(tmp_path)
    line.limited_at = frozenset({SECOND.name})
    second.in_flight = 3
    assert not found.can_go_elsewhere(line), "it has to wait first"
    assert found.another_is_away(first, line, 0.0)
    assert found.roomiest(run, 0.0, 0) is second
    await found.close()
