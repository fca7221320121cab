"""The window finds what an engine can run at once, from nothing but the times of its answers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.domain.flow import DECREASE, HEADROOM, WINDOW_INITIAL, WINDOW_MAX, Window


class SlotEngine:
    """An engine that runs so many lines at once, each for a second, and lets the others wait; time is its own."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.now = 0.0

    def answer(self, window: Window, answers: int, *, in_flight: int | None = None) -> list[int]:
        """Answer so many lines of a full window; return the limits that it had."""
        limits = [window.limit]
        for _ in range(answers):
            self.now += 1 / min(self.slots, window.limit)
            window.answered(self.now, window.limit if in_flight is None else in_flight)
            if window.limit != limits[-1]:
                limits.append(window.limit)
        return limits


def test_a_window_doubles_while_that_pays() -> None:
    limits = SlotEngine(256).answer(Window(), 2000)
    assert limits[:5] == [WINDOW_INITIAL, 32, 64, 128, 256]


@pytest.mark.parametrize("slots", [16, 64, 256, 1000])
def test_a_window_settles_a_little_above_what_the_engine_runs_at_once(slots: int) -> None:
    window, engine = Window(), SlotEngine(slots)
    engine.answer(window, 50_000)
    settled = {window.limit, *engine.answer(window, 20_000)}
    assert slots <= min(settled)
    assert max(settled) <= 2 * slots * HEADROOM**2


def test_a_window_never_passes_its_bound() -> None:
    assert max(SlotEngine(10**9).answer(Window(), 100_000)) == WINDOW_MAX


def test_a_trial_that_does_not_pay_is_taken_back() -> None:
    window, engine = Window(), SlotEngine(64)
    engine.answer(window, 10_000)
    limits = engine.answer(window, 10_000)
    assert len(set(limits)) == 2
    assert all(max(pair) == round(min(pair) * HEADROOM) for pair in pairwise(limits))


def test_a_window_that_is_not_used_learns_nothing() -> None:
    window = Window()
    assert SlotEngine(256).answer(window, 10_000, in_flight=WINDOW_INITIAL // 2) == [WINDOW_INITIAL]


def test_a_window_grows_again_when_the_engine_has_more_room() -> None:
    window = Window()
    SlotEngine(4).answer(window, 5000)
    before = window.limit
    engine = SlotEngine(200)
    engine.now = 1e6
    engine.answer(window, 100_000)
    assert window.limit >= 200 > before


def test_congestion_shrinks_the_window_once_for_all_lines_that_were_in_flight_together() -> None:
    window = Window()
    for _ in range(10):
        window.congested(100.0, latency_s=5.0)
    assert window.limit == int(WINDOW_INITIAL * DECREASE)
    window.congested(104.0, latency_s=5.0)
    assert window.limit == int(WINDOW_INITIAL * DECREASE)
    window.congested(105.0, latency_s=5.0)
    assert window.limit == int(int(WINDOW_INITIAL * DECREASE) * DECREASE)


def test_a_window_lets_at_least_one_line_through() -> None:
    window = Window()
    for second in range(100):
        window.congested(float(second), latency_s=0.5)
    assert window.limit == 1


def test_congestion_ends_the_doubling() -> None:
    window, engine = Window(), SlotEngine(10_000)
    engine.answer(window, 100)
    window.congested(engine.now, latency_s=1.0)
    shrunk = window.limit
    assert all(after <= round(before * HEADROOM) for before, after in pairwise(engine.answer(window, 3000)))
    assert window.limit > shrunk


def test_a_window_that_the_engine_states_never_moves() -> None:
    window = Window(fixed=4)
    window.congested(1.0, latency_s=0.1)
    assert SlotEngine(100).answer(window, 1000) == [4]


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 10), st.integers(0, 5000)), max_size=300))
def test_a_window_keeps_its_bounds_whatever_comes(events: list[tuple[bool, float, int]]) -> None:
    window, now = Window(), 0.0
    for congested, wait, in_flight in events:
        now += wait
        if congested:
            window.congested(now, wait)
        else:
            for _ in range(20):
                window.answered(now, in_flight)
        assert 1 <= window.limit <= WINDOW_MAX
