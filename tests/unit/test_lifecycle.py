"""The life of a batch as a table."""

from __future__ import annotations

import pytest

from pronghorn.domain.lifecycle import TERMINAL, TRANSITIONS, final_status, may_follow, stamp_of
from pronghorn.domain.model import BatchStamps, BatchStatus, Closing


def reachable(start: BatchStatus) -> set[BatchStatus]:
    """Every status that a batch may come to from `start`."""
    found: set[BatchStatus] = set()
    fringe = {start}
    while fringe:
        fringe = {after for before, after in TRANSITIONS if before in fringe} - found
        found |= fringe
    return found


def test_the_table_knows_every_status() -> None:
    assert {status for edge in TRANSITIONS for status in edge} == set(BatchStatus)


def test_every_batch_begins_in_validating_and_can_come_to_every_other_status() -> None:
    assert reachable(BatchStatus.VALIDATING) == set(BatchStatus) - {BatchStatus.VALIDATING}


@pytest.mark.parametrize("status", sorted(set(BatchStatus) - TERMINAL))
def test_a_batch_that_has_not_ended_can_end(status: BatchStatus) -> None:
    assert reachable(status) & TERMINAL


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_a_batch_that_has_ended_never_moves(status: BatchStatus) -> None:
    assert reachable(status) == set()
    assert not any(may_follow(status, after) for after in BatchStatus)


def test_no_batch_comes_back_to_a_status_it_has_left() -> None:
    assert not any(status in reachable(status) for status in BatchStatus)


def test_each_status_has_its_own_stamp() -> None:
    assert [stamp_of(status) for status in BatchStatus if status is not BatchStatus.VALIDATING] == [
        f"{status.value}_at" for status in BatchStatus if status is not BatchStatus.VALIDATING
    ]
    assert {stamp_of(status) for status in BatchStatus} == set(BatchStamps.__struct_fields__)


@pytest.mark.parametrize("closing", [None, *Closing])
def test_why_a_batch_closes_decides_how_it_ends(closing: Closing | None) -> None:
    ends = {None: "completed", Closing.EXPIRED: "expired", Closing.CANCELLED: "cancelled"}
    before = BatchStatus.CANCELLING if closing is Closing.CANCELLED else BatchStatus.FINALIZING
    assert final_status(closing) == ends[closing]
    assert may_follow(before, final_status(closing))
