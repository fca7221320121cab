"""What lost lines say about the engine that lost them."""

from __future__ import annotations

import json

import pytest

from pronghorn.domain.doubt import CANARIES_LOST_MAX, Doubt, canary
from pronghorn.domain.model import Endpoint
from pronghorn.domain.retry import Failure, Lost

CUT = Lost(Failure("upstream_disconnected"), hung=False)
HUNG = Lost(Failure("request_timeout"), hung=True)


def doubt(witnesses: int, *lost: Lost, sent_at: float = 99.0) -> Doubt[int]:
    doubt: Doubt[int] = Doubt(100.0, witnesses)
    for number, how in enumerate(lost):
        doubt.add(number, how, sent_at)
    return doubt


def test_an_engine_that_loses_all_it_had_has_died() -> None:
    assert doubt(3, CUT, CUT, CUT).died()


def test_an_engine_that_still_runs_a_line_has_not() -> None:
    assert not doubt(3, CUT, CUT).died()


def test_one_lost_line_proves_nothing() -> None:
    assert not doubt(1, CUT).died()


def test_an_engine_that_loses_a_canary_and_answers_the_next_has_been_replaced() -> None:
    found = doubt(1, CUT)
    found.canaries_lost = 1
    assert found.died()


def test_an_engine_that_loses_every_canary_is_there_and_loses_what_it_gets() -> None:
    found = doubt(1, CUT)
    found.canaries_lost = CANARIES_LOST_MAX
    assert not found.died()


def test_lines_that_time_out_are_no_death() -> None:
    assert not doubt(2, HUNG, HUNG).died()


def test_lines_sent_since_are_not_counted_among_what_it_had() -> None:
    found = doubt(3, CUT, CUT)
    found.add(9, CUT, 100.5)
    assert not found.died()


def test_only_an_answer_to_something_sent_since_proves_it_alive() -> None:
    found = doubt(3, CUT)
    assert not found.answered(99.0)
    assert found.survivors == 1
    assert found.answered(100.5)


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_canary_asks_for_next_to_nothing(endpoint: Endpoint) -> None:
    body = json.loads(canary(endpoint, "a-model"))
    assert body.pop("model") == "a-model"
    assert len(body) <= 2
    assert body.get("max_tokens", 1) == 1
