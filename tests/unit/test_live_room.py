"""How much of a replica's window batch lines may use beside live requests."""

from __future__ import annotations

import pytest

from pronghorn.domain.model import Replica
from pronghorn.engines.client import EngineClient
from pronghorn.worker.lane import Lane


@pytest.mark.parametrize(
    ("window", "slots", "live", "room"),
    [
        (10, 8, 0, 10),
        (10, 8, 1, 7),
        (10, 8, 3, 5),
        (10, 8, 8, 1),
        (10, 8, 100, 1),
        (4, None, 1, 3),
        (None, None, 6, 10),
    ],
    ids=lambda value: str(value),
)
async def test_lines_leave_room_and_do_not_queue(window: int | None, slots: int | None, live: int, room: int) -> None:
    lane = Lane(Replica("http://engine/v1", window=window, slots=slots), EngineClient("http://engine/v1"))
    lane.live = live
    assert lane.room(0.0, "a-model") == room
    lane.in_flight = room
    assert lane.room(0.0, "a-model") == 0
