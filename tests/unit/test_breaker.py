"""A circuit breaker leaves an engine alone, then lets one probe through, and closes on proof."""

from __future__ import annotations

from pronghorn.domain.breaker import Breaker


def tripped() -> Breaker:
    breaker = Breaker()
    assert breaker.trip(100.0, 10.0, "it is down")
    return breaker


def test_it_lets_nothing_through_until_the_wait_is_over() -> None:
    breaker = tripped()
    assert breaker.reason == "it is down"
    assert not breaker.admits_probe(109.9)
    assert breaker.admits_probe(110.0)


def test_a_timer_that_is_early_may_end_the_wait() -> None:
    breaker = tripped()
    breaker.half_open()
    assert breaker.admits_probe(109.9)


def test_many_lines_that_fail_together_trip_it_once() -> None:
    breaker = tripped()
    assert not breaker.trip(100.1, 10.0, "again")
    assert (breaker.trips, breaker.reason) == (1, "it is down")
    assert breaker.trip(110.0, 10.0, "the probe failed")
    assert (breaker.trips, breaker.reason) == (2, "the probe failed")


def test_the_answer_to_a_probe_closes_it() -> None:
    breaker = tripped()
    breaker.answered(110.5)
    assert (breaker.reason, breaker.trips) == (None, 0)


def test_an_answer_to_what_was_sent_before_it_tripped_does_not() -> None:
    breaker = tripped()
    breaker.answered(99.0)
    assert breaker.reason is not None


def test_after_silence_any_answer_closes_it() -> None:
    breaker = Breaker()
    breaker.trip(100.0, 10.0, "it hangs", silent=True)
    breaker.answered(50.0)
    assert breaker.reason is None


def test_it_knows_since_when_it_has_let_nothing_but_probes_through() -> None:
    breaker = tripped()
    breaker.trip(110.0, 10.0, "the probe failed")
    assert breaker.open_s(130.0) == 30.0
    breaker.answered(130.0)
    assert breaker.open_s(140.0) == 0.0
