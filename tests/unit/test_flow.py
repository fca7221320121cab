"""The window finds what an engine can run at once, from nothing but the times of its answers."""

from __future__ import annotations

import random
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


class RefusingEngine:
    """An engine that refuses what is above its capacity, or a share of all lines whatever their number."""

    def __init__(self, *, capacity: int = 10**9, share: float = 0.0) -> None:
        self._capacity = capacity
        self._share = share
        self._rng = random.Random(7)
        self.now = 0.0

    def answer(self, window: Window, rounds: int) -> list[int]:
        """Answer full windows, each a second after it was sent; return the limits that there were."""
        limits = []
        for _ in range(rounds):
            limit, sent_at = window.limit, self.now
            limits.append(limit)
            self.now += 1
            over = self._rng.sample([n >= self._capacity for n in range(limit)], limit)
            for is_over in over:
                refused = is_over or self._rng.random() < self._share
                window.answered(self.now, limit, sent_at=sent_at, refused=refused)
        return limits


def test_refusals_shrink_the_window_once_for_all_lines_that_were_in_flight_together() -> None:
    window = Window()
    for _ in range(100):
        window.answered(1.0, 100, sent_at=0.0, refused=True)
    assert window.limit == int(WINDOW_INITIAL * DECREASE)


@pytest.mark.parametrize("capacity", [4, 30, 200])
def test_a_window_above_what_an_engine_takes_shrinks_to_about_that(capacity: int) -> None:
    window = Window()
    engine = SlotEngine(10**9)
    while window.limit <= 2 * capacity:
        engine.answer(window, 40)
    limits = RefusingEngine(capacity=capacity).answer(window, 400)
    assert all(DECREASE * capacity <= limit <= 1.6 * capacity + 8 for limit in limits[200:])


@pytest.mark.parametrize("share", [0.02, 0.08, 0.2])
def test_refusals_that_do_not_come_from_its_size_leave_a_window_large(share: float) -> None:
    limits = RefusingEngine(share=share).answer(Window(), 1000)
    assert min(limits[500:]) >= WINDOW_INITIAL


def test_a_window_lets_at_least_one_line_through() -> None:
    window = Window()
    limits = RefusingEngine(share=1.0).answer(window, 1000)
    assert limits[-1] == window.limit == 1


def test_a_window_that_the_engine_states_never_moves() -> None:
    window = Window(fixed=4)
    for _ in range(100):
        window.answered(1.0, 4, refused=True)
    assert SlotEngine(100).answer(window, 1000) == [4]


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 10), st.integers(0, 5000)), max_size=300))
def test_a_window_keeps_its_bounds_whatever_comes(events: list[tuple[bool, float, int]]) -> None:
    window, now = Window(), 0.0
    for refused, wait, in_flight in events:
        sent_at, now = now, now + wait
        for _ in range(20):
            window.answered(now, in_flight, sent_at=sent_at, refused=refused)
        assert 1 <= window.limit <= WINDOW_MAX
