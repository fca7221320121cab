"""The window finds what an engine can run at once: from its gauges, or from nothing but the times of its answers."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.domain.flow import WINDOW_INITIAL, WINDOW_MAX, Window
from pronghorn.domain.gauging import Gauges
from pronghorn.domain.refusals import DECREASE
from pronghorn.domain.search import HEADROOM
from tests.simulation import TRIALS, Fixed, Line, Model, Trial, batch, simulate


class SlotEngine:
    """An engine that runs so many lines at once, each for a second, and lets the others wait; time is its own."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.now = 0.0
        self._sent: deque[float] = deque()

    def answer(self, window: Window, answers: int, *, in_flight: int | None = None) -> list[int]:
        """Answer so many lines of a full window; return the limits that it had."""
        limits = [window.limit]
        for _ in range(answers):
            while len(self._sent) < window.limit:
                self._sent.append(self.now)
            self.now += 1 / min(self.slots, window.limit)
            count = len(self._sent) if in_flight is None else in_flight
            window.answered(self.now, count, sent_at=self._sent.popleft())
            if window.limit != limits[-1]:
                limits.append(window.limit)
        return limits


# Without gauges


def test_a_window_climbs_while_that_pays() -> None:
    limits = SlotEngine(256).answer(Window(), 4000)
    assert limits[:3] == [WINDOW_INITIAL, 4 * WINDOW_INITIAL, 16 * WINDOW_INITIAL]


@pytest.mark.parametrize("slots", [16, 64, 256, 1000])
def test_a_window_settles_a_little_above_what_the_engine_runs_at_once(slots: int) -> None:
    window, engine = Window(), SlotEngine(slots)
    engine.answer(window, 60 * slots + 5000)
    settled = engine.answer(window, 60 * slots)
    assert slots <= max(settled) <= 2 * slots


def test_a_window_never_passes_its_bound() -> None:
    assert max(SlotEngine(10**9).answer(Window(), 100_000)) == WINDOW_MAX


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


def test_an_engine_that_becomes_slower_keeps_its_lines() -> None:
    window, fast = Window(), SlotEngine(256)
    fast.answer(window, 40_000)
    slow = SlotEngine(256)
    slow.now = fast.now
    before = window.limit
    for _ in range(4):
        for _ in range(window.limit):
            slow.now += 1 / 64
            window.answered(slow.now, window.limit, sent_at=slow.now - window.limit / 64)
        assert window.limit >= before * 0.6


def test_a_round_of_answers_that_come_all_at_once_is_measured_by_what_it_took() -> None:
    window, now = Window(), 0.0
    limits = []
    for _ in range(200):
        limit, sent_at, now = window.limit, now, now + max(1.0, window.limit / 32)
        limits.append(limit)
        for _ in range(limit):
            window.answered(now, limit, sent_at=sent_at)
    assert max(limits) <= 16 * WINDOW_INITIAL
    assert limits[-1] <= 4 * 32


# With gauges


def gauged(window: Window, looks: int, *, slots: int, others: int = 0, since: float = 0.0) -> list[int]:
    """Look at an engine so often while its window is full; return the limits."""
    limits, now = [window.limit], since
    for _ in range(looks):
        now += window.gauge_interval_s
        total = window.limit + others
        window.gauged(now, Gauges(min(slots, total), max(0, total - slots)), window.limit)
        limits.append(window.limit)
    return limits


@pytest.mark.parametrize("slots", [4, 64, 256, 1024])
def test_gauges_show_within_seconds_what_an_engine_runs(slots: int) -> None:
    limits = gauged(Window(), 20, slots=slots)
    assert slots < limits[-1] <= slots + max(3, slots * 0.15)
    assert max(limits) <= max(2 * slots, WINDOW_INITIAL)
    assert next(look for look, limit in enumerate(limits) if limit >= slots) * 0.5 <= 4


def test_other_clients_of_the_engine_count_too() -> None:
    assert gauged(Window(), 40, slots=256, others=128)[-1] <= 128 + 40


def test_gauges_that_do_not_see_our_lines_are_not_believed() -> None:
    window = Window()
    window.gauged(1.0, Gauges(2, 5), WINDOW_INITIAL)
    assert window.limit == WINDOW_INITIAL


def test_where_gauges_fall_silent_the_window_is_found_by_trying() -> None:
    window = Window()
    gauged(window, 20, slots=64)
    engine = SlotEngine(1000)
    engine.now = 1e6
    engine.answer(window, 100_000)
    assert window.limit >= 1000


def test_an_engine_that_begins_lines_in_vain_gets_fewer() -> None:
    window = Window()
    gauged(window, 3, slots=10**6)
    before, preemptions = window.limit, 0
    for look in range(3):
        preemptions += before
        window.gauged(10.0 + 2 * look, Gauges(before, 0, preemptions), before)
    assert window.limit < before


def test_a_window_that_the_engine_states_never_moves() -> None:
    window = Window(fixed=4)
    for _ in range(100):
        window.answered(1.0, 4, sent_at=0.0, refused=True)
    window.gauged(2.0, Gauges(4, 0), 4)
    assert SlotEngine(100).answer(window, 1000) == [4]


# On models of servers, in virtual time


@pytest.mark.parametrize("gauges", [True, False], ids=["gauges", "black box"])
@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_a_batch_is_as_fast_as_with_the_best_fixed_number_of_lines(trial: Trial, gauges: bool) -> None:
    best, run = trial.best_fixed(seed=2), trial.run(seed=2, gauges=gauges)
    assert best / run.took_s >= 0.97


@pytest.mark.parametrize("slots", [4, 37, 256, 1000])
def test_with_gauges_an_engine_is_at_full_speed_within_10_seconds_and_its_queue_is_bounded(slots: int) -> None:
    lines = [Line(100, 100) for _ in range(40 * slots)]
    window = Window()
    run = simulate([Model(slots=slots)], [[window]], lines)
    assert run.rate(10, 20) >= 0.97 * slots / 1.05
    assert run.limit_at(15) <= 1.2 * slots + 3


def test_workers_that_share_an_engine_get_about_the_same() -> None:
    windows = [Window(sharers=2), Window(sharers=2)]
    windows[1].limit = 200
    run = simulate([Model(slots=256)], [[windows[0]], [windows[1]]], batch(3, 60_000))
    assert run.in_flight_max <= 2 * 256 + 200
    assert max(window.limit for window in windows) <= 2 * min(window.limit for window in windows)


@pytest.mark.parametrize("gauges", [True, False], ids=["gauges", "black box"])
def test_several_workers_keep_the_queue_of_one_engine_bounded(gauges: bool) -> None:
    windows = [Window(sharers=4) for _ in range(4)]
    lines = batch(4, 20_000)
    run = simulate([Model(slots=64)], [[window] for window in windows], lines, gauges=gauges)
    best = simulate([Model(slots=64)], [[Fixed(80)]], batch(4, 20_000)).took_s
    assert best / run.took_s >= 0.97
    assert sum(window.limit for window in windows) <= (2 if gauges else 8) * 64


def test_one_line_in_a_thousand_that_takes_100_times_longer_holds_up_no_other() -> None:
    def lines() -> list[Line]:
        return [Line(100, 10_000 if number % 1000 == 999 else 100) for number in range(20_000)]

    at_once = simulate([Model(slots=64)], [[Fixed(1 << 20)]], lines())
    for gauges in (True, False):
        assert simulate([Model(slots=64)], [[Window()]], lines(), gauges=gauges).took_s <= 1.1 * at_once.took_s


# Refusals


class RefusingEngine:
    """An engine that refuses what is above its capacity, or a share of all lines whatever their number.

    Where it `seems_away` it refuses as an engine does that is not there.
    """

    def __init__(self, *, capacity: int = 10**9, share: float = 0.0, seems_away: bool = False) -> None:
        self._capacity = capacity
        self._share = share
        self._seems_away = seems_away
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
                away = refused and self._seems_away
                window.answered(self.now, limit, sent_at=sent_at, refused=refused, away=away)
        return limits


def test_refusals_shrink_the_window_once_for_all_lines_that_were_in_flight_together() -> None:
    window = Window()
    for _ in range(100):
        window.answered(1.0, 100, sent_at=0.0, refused=True)
    assert window.limit == int(WINDOW_INITIAL * DECREASE)


def test_an_engine_that_answers_no_line_for_a_while_gets_as_many_as_before_when_it_is_back() -> None:
    window, engine = Window(), SlotEngine(10**9)
    while window.limit < 256:
        engine.answer(window, 40)
    before, away = window.limit, RefusingEngine(share=1.0, seems_away=True)
    away.now = engine.now
    assert away.answer(window, 100)[-1] == before
    well = RefusingEngine(share=0.02)
    well.now = away.now
    assert min(well.answer(window, 20)) >= before, "what came while it was away is not counted with what comes then"


def test_an_engine_that_refused_every_line_for_a_while_soon_gets_as_many_as_before() -> None:
    window, engine = Window(), SlotEngine(10**9)
    while window.limit < 256:
        engine.answer(window, 40)
    before, refusing = window.limit, RefusingEngine(share=1.0)
    refusing.now = engine.now
    assert refusing.answer(window, 100)[-1] == 1
    well = RefusingEngine()
    well.now = refusing.now
    assert well.answer(window, 20)[-1] >= before


@pytest.mark.parametrize("seems_away", [False, True])
@pytest.mark.parametrize("capacity", [4, 30, 200])
def test_a_window_above_what_an_engine_takes_shrinks_to_about_that(capacity: int, seems_away: bool) -> None:
    window = Window()
    engine = SlotEngine(10**9)
    while window.limit <= 2 * capacity:
        engine.answer(window, 40)
    limits = RefusingEngine(capacity=capacity, seems_away=seems_away).answer(window, 400)
    assert all(DECREASE * capacity <= limit <= 1.6 * capacity + 8 for limit in limits[200:])


@pytest.mark.parametrize(
    ("share", "seems_away"), [(0.02, False), (0.08, False), (0.2, False), (0.3, True), (0.5, True), (0.7, True)]
)
def test_refusals_that_do_not_come_from_its_size_leave_a_window_large(share: float, seems_away: bool) -> None:
    limits = RefusingEngine(share=share, seems_away=seems_away).answer(Window(), 300)
    assert min(limits[150:]) >= int(WINDOW_INITIAL / HEADROOM**2), "a trial with less included"


def test_a_window_lets_at_least_one_line_through() -> None:
    window = Window()
    limits = RefusingEngine(share=1.0).answer(window, 1000)
    assert limits[-1] == window.limit == 1


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 10), st.integers(0, 5000)), max_size=300))
def test_a_window_keeps_its_bounds_whatever_comes(events: list[tuple[bool, float, int]]) -> None:
    window, now = Window(), 0.0
    for refused, wait, in_flight in events:
        sent_at, now = now, now + wait
        for _ in range(20):
            window.answered(now, in_flight, sent_at=sent_at, refused=refused)
        assert 1 <= window.limit <= WINDOW_MAX
