"""A server of a language model and a batch that runs on it, in virtual time: what a window of lines gets out of it.

Lines produce a token each at the same pace, which may fall with their number, as on a GPU; a line takes up memory as
its tokens grow, and where memory runs out the youngest line waits again. Everything follows from the seed.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Protocol

from pronghorn.domain.flow import Window
from pronghorn.domain.gauging import Gauges

SEEDS = (1, 2, 3)
# What a server asks a refused client to wait.
RETRY_AFTER_S = 1.0


class AnyWindow(Protocol):
    """What decides on the lines in flight: `pronghorn.domain.flow.Window`, or a fixed number."""

    limit: int
    latency_s: float | None

    @property
    def gauge_interval_s(self) -> float: ...

    def answered(self, now: float, in_flight: int, *, sent_at: float, refused: bool = False) -> None: ...
    def gauged(self, now: float, gauges: Gauges, in_flight: int) -> None: ...


class Fixed:
    """A window that stays as it is."""

    gauge_interval_s = math.inf
    latency_s = None

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def answered(self, now: float, in_flight: int, *, sent_at: float, refused: bool = False) -> None:
        pass

    def gauged(self, now: float, gauges: Gauges, in_flight: int) -> None:
        pass


@dataclass(frozen=True)
class Model:
    """A model of a server: `slots` lines at once, within `kv_tokens`, each token taking `token_s` when alone.

    With n lines a token takes `1 + slowdown * n` times as long. `rate` is a limit of lines a second, refused above it.
    `changes` are the times at which the number of slots is multiplied by a factor. `way_s` is the time from here to the
    engine and back.
    """

    slots: int = 1 << 30
    kv_tokens: float = math.inf
    token_s: float = 0.01
    slowdown: float = 0.0
    rate: float = math.inf
    way_s: float = 0.002
    prefill_tokens: float = 5.0
    changes: tuple[tuple[float, float], ...] = ()


class Line:
    """A line of a batch: where it came from, what it needs, and what it has had."""

    __slots__ = ("gone", "kept", "prompt", "sent_at", "started", "tokens", "worker")

    def __init__(self, prompt: int, tokens: int) -> None:
        self.prompt = prompt
        self.tokens = tokens
        self.kept = 0.0
        self.started = 0.0
        self.sent_at = 0.0
        self.worker: Worker
        self.gone = False


class Engine:
    """Runs lines by a model; it is moved on by whoever owns the time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.slots = float(model.slots)
        self.running = 0
        self.preemptions = 0
        self.queue: deque[Line] = deque()
        self.done: Callable[[Line], None] = lambda line: None
        self._now = 0.0
        self._progress = 0.0
        self._kv = 0.0
        self._ends: list[tuple[float, int, Line]] = []
        self._order: list[Line] = []
        self._serial = 0
        self._credit = min(model.rate, 1e9)

    def admits(self, line: Line) -> bool:
        """Take a line, or refuse it where there is a limit of the rate."""
        if self.model.rate < math.inf:
            if self._credit < 1:
                return False
            self._credit -= 1
        self.queue.append(line)
        self._start_what_fits()
        return True

    def resize(self, factor: float) -> None:
        """Multiply the number of lines that run at once; those that run stay."""
        self.slots *= factor
        self._start_what_fits()

    def next_event(self) -> float:
        """Return when a line ends or memory runs out, unless something happens before."""
        if not self.running:
            return math.inf
        left = self._ends[0][0] - self._progress
        if self.running > 1 and self.model.kv_tokens < math.inf:
            left = min(left, (self.model.kv_tokens - self._kv) / self.running)
        return self._now + max(0.0, left) / self._pace()

    def move_to(self, now: float) -> None:
        """Let time pass, of which nothing of this engine's happens but at the end."""
        passed, self._now = now - self._now, now
        if self.model.rate < math.inf:
            self._credit = min(max(1.0, self.model.rate), self._credit + passed * self.model.rate)
        if self.running:
            progress = passed * self._pace()
            self._progress += progress
            self._kv += progress * self.running

    def act(self) -> None:
        """End lines that are at their end, and preempt one if memory has run out."""
        while self._ends and (self._ends[0][2].gone or self._ends[0][0] <= self._progress + 1e-6):
            _, _, line = heapq.heappop(self._ends)
            if not line.gone:
                self._stop(line)
                self.done(line)
        if self._kv >= self.model.kv_tokens - 1e-6 and self.running > 1:
            self._preempt()
        self._start_what_fits()

    def _pace(self) -> float:
        return 1 / (self.model.token_s * (1 + self.model.slowdown * self.running))

    def _start_what_fits(self) -> None:
        while self.queue and self.running < self.slots:
            line = self.queue[0]
            needs = line.prompt + line.kept
            if self.running and self._kv + needs > self.model.kv_tokens * 0.99:
                return
            self.queue.popleft()
            self.running += 1
            self._kv += needs
            line.started, line.gone = self._progress, False
            self._serial += 1
            end = self._progress + self.model.prefill_tokens + line.kept / 10 + line.tokens - line.kept
            heapq.heappush(self._ends, (end, self._serial, line))
            if self.model.kv_tokens < math.inf:
                self._order.append(line)

    def _stop(self, line: Line) -> None:
        line.gone = True
        self.running -= 1
        line.kept += self._progress - line.started
        self._kv -= line.prompt + line.kept

    def _preempt(self) -> None:
        while self._order and self._order[-1].gone:
            self._order.pop()
        line = self._order.pop()
        self._stop(line)
        copy = Line(line.prompt, line.tokens)
        copy.kept = max(0.0, min(line.kept - self.model.prefill_tokens, line.tokens - 1))
        copy.sent_at, copy.worker = line.sent_at, line.worker
        self.preemptions += 1
        self.queue.appendleft(copy)


class Worker:
    """A worker: a window for each engine, its lines in flight there, and places of refused lines that it holds."""

    def __init__(self, windows: Sequence[AnyWindow]) -> None:
        self.windows = windows
        self.in_flight = [0] * len(windows)
        self.held = [0] * len(windows)

    def roomiest(self) -> int | None:
        """Return the engine that has most room, if any has."""
        room = [w.limit - used - held for w, used, held in zip(self.windows, self.in_flight, self.held, strict=True)]
        best = max(range(len(room)), key=room.__getitem__)
        return best if room[best] > 0 else None


@dataclass
class Run:
    """What came of a batch: when each line ended, how the limits moved, most lines in flight, refusals."""

    ends: list[float] = field(default_factory=list)
    limits: list[tuple[float, int]] = field(default_factory=list)
    in_flight_max: int = 0
    refusals: int = 0
    preemptions: int = 0

    @property
    def took_s(self) -> float:
        return self.ends[-1]

    def rate(self, since_s: float, until_s: float) -> float:
        """Return the lines that ended a second between two times."""
        return sum(since_s <= end < until_s for end in self.ends) / (until_s - since_s)

    def limit_at(self, when_s: float) -> int:
        """Return the limit of a run with one window at a time."""
        return [limit for at_s, limit in self.limits if at_s <= when_s][-1]


class Simulation:
    """A batch on some engines: its lines are taken in their order by whichever worker has room."""

    def __init__(
        self, models: Sequence[Model], workers: Sequence[Sequence[AnyWindow]], lines: Sequence[Line], *, gauges: bool
    ) -> None:
        self._models = models
        self._engines = [Engine(model) for model in models]
        self._workers = [Worker(windows) for windows in workers]
        self._ready = deque(lines)
        self._total = len(lines)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._now = 0.0
        self._rng = random.Random(1)
        self.run = Run()
        for index, engine in enumerate(self._engines):
            engine.done = partial(self._ended, index)
            for when, factor in models[index].changes:
                self._at(when, partial(engine.resize, factor))
        for worker in self._workers:
            for index, window in enumerate(worker.windows):
                self.run.limits.append((0.0, window.limit))
                if gauges and window.gauge_interval_s < math.inf:
                    self._at(self._rng.uniform(0, window.gauge_interval_s), partial(self._look, worker, index))

    def finish(self) -> Run:
        """Run the batch to its end."""
        self._fill()
        while len(self.run.ends) < self._total:
            engine = min(self._engines, key=Engine.next_event)
            inner = engine.next_event()
            outer = self._events[0][0] if self._events else math.inf
            self._now = min(inner, outer)
            for each in self._engines:
                each.move_to(self._now)
            if inner <= outer:
                engine.act()
            else:
                heapq.heappop(self._events)[2]()
        self.run.preemptions = sum(engine.preemptions for engine in self._engines)
        return self.run

    def _at(self, when: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (when, self._serial, what))

    def _fill(self) -> None:
        for worker in self._workers:
            while self._ready and (index := worker.roomiest()) is not None:
                line = self._ready.popleft()
                line.worker, line.sent_at = worker, self._now
                worker.in_flight[index] += 1
                self._at(self._now + self._models[index].way_s / 2, partial(self._arrive, line, index))
        in_flight = sum(sum(worker.in_flight) for worker in self._workers)
        self.run.in_flight_max = max(self.run.in_flight_max, in_flight)

    def _arrive(self, line: Line, index: int) -> None:
        if not self._engines[index].admits(line):
            self._at(self._now + self._models[index].way_s / 2, partial(self._answered, line, index, refused=True))

    def _ended(self, index: int, line: Line) -> None:
        self._at(self._now + self._models[index].way_s / 2, partial(self._answered, line, index, refused=False))

    def _answered(self, line: Line, index: int, *, refused: bool) -> None:
        worker = line.worker
        window, in_flight = worker.windows[index], worker.in_flight[index] + worker.held[index]
        window.answered(self._now, in_flight, sent_at=line.sent_at, refused=refused)
        self._note(window)
        worker.in_flight[index] -= 1
        if refused:
            self.run.refusals += 1
            wait_s = self._rng.uniform(RETRY_AFTER_S, RETRY_AFTER_S + 1)
            self._at(self._now + wait_s, partial(self._again, line))
            worker.held[index] += 1
            self._at(self._now + min(wait_s, window.latency_s or wait_s), partial(self._free, worker, index))
        else:
            self.run.ends.append(self._now)
        self._fill()

    def _again(self, line: Line) -> None:
        self._ready.appendleft(line)
        self._fill()

    def _free(self, worker: Worker, index: int) -> None:
        worker.held[index] -= 1
        self._fill()

    def _look(self, worker: Worker, index: int) -> None:
        window, engine = worker.windows[index], self._engines[index]
        seen = Gauges(engine.running, len(engine.queue), engine.preemptions)
        window.gauged(self._now, seen, worker.in_flight[index])
        self._note(window)
        self._fill()
        self._at(self._now + window.gauge_interval_s, partial(self._look, worker, index))

    def _note(self, window: AnyWindow) -> None:
        if window.limit != self.run.limits[-1][1]:
            self.run.limits.append((self._now, window.limit))


def simulate(
    models: Sequence[Model], workers: Sequence[Sequence[AnyWindow]], lines: Sequence[Line], *, gauges: bool = True
) -> Run:
    """Run a batch and return what came of it."""
    return Simulation(models, workers, lines, gauges=gauges).finish()


def batch(seed: int, lines: int, *, mean: float = 100.0, spread: float = 0.8, prompt: int = 100) -> list[Line]:
    """Return lines whose answers have so many tokens on average, lognormally spread."""
    rng, mu = random.Random(seed), math.log(mean) - spread**2 / 2
    return [Line(prompt, max(1, round(rng.lognormvariate(mu, spread)))) for _ in range(lines)]


@dataclass(frozen=True)
class Trial:
    """A model of one or two servers, a batch for it, and the fixed numbers in flight at each to compare with."""

    name: str
    models: tuple[Model, ...]
    lines: int
    fixed: tuple[tuple[int, ...], ...]
    spread: float = 0.8

    @cache  # noqa: B019
    def best_fixed(self, seed: int) -> float:
        """Return the time that the batch takes with the best fixed number of lines in flight."""
        runs = (simulate(self.models, [[Fixed(n) for n in limits]], self._batch(seed)) for limits in self.fixed)
        return min(run.took_s for run in runs)

    def run(self, seed: int, *, gauges: bool) -> Run:
        """Run the batch with windows that find their size."""
        return simulate(self.models, [[Window() for _ in self.models]], self._batch(seed), gauges=gauges)

    def _batch(self, seed: int) -> list[Line]:
        return batch(seed, self.lines, spread=self.spread)


TRIALS = (
    Trial("256 slots", (Model(slots=256),), 30_000, ((320,), (512,))),
    Trial("256 slots that slow each other down", (Model(slots=256, slowdown=1 / 64),), 20_000, ((256,), (320,))),
    Trial("limited by memory", (Model(slots=256, kv_tokens=15_000),), 12_000, ((100,), (128,))),
    Trial("4 slots", (Model(slots=4),), 2_000, ((4,), (6,), (8,))),
    Trial("50 lines a second, 429 above", (Model(rate=50),), 6_000, ((50,), (64,), (100,))),
    Trial(
        "256 slots, half of them for 40 s",
        (Model(slots=256, changes=((40, 0.5), (80, 2))),),
        30_000,
        ((320,), (512,)),
    ),
    Trial(
        "two servers, one four times as fast",
        (Model(slots=64), Model(slots=64, token_s=0.0025)),
        30_000,
        ((80, 80), (96, 96)),
    ),
)


def random_trial(seed: int) -> tuple[Trial, float]:
    """Return a server of 1 to 1,000 slots whose answers take 10 ms to 60 s, and how widely their lengths spread."""
    rng = random.Random(seed)
    slots, answer_s = round(2 ** rng.uniform(0, 10)), 10 ** rng.uniform(-2, 1.8)
    spread = rng.choice([0, 0.3, 0.6, 0.8, 1.0, 1.2])
    slowdown = rng.choice([0, 0, 1 / slots, 2 / slots])
    kv_tokens = max(1500.0, rng.choice([math.inf, math.inf, slots * 100 * rng.uniform(0.8, 2)]))
    lines = min(16_000, max(300, round(slots * 2 ** rng.uniform(5, 8))))
    model = Model(slots=slots, token_s=answer_s / 100, slowdown=slowdown, kv_tokens=kv_tokens)
    fixed = tuple((max(1, round(slots * factor)),) for factor in (0.5, 1.1, 1.25, 2))
    return Trial(f"{slots} slots, {answer_s:.2f} s", (model,), lines, fixed, spread), kv_tokens / slots


def main() -> None:
    """Print shares of the best fixed number of lines in flight: of TRIALS, or of random ones with seeds FROM to TO."""
    if len(sys.argv) == 3:
        print_random(range(int(sys.argv[1]), int(sys.argv[2])))
    else:
        print_trials()


def print_random(seeds: range) -> None:
    print("| seed | server | spread | memory a slot | lines a slot | best, s | gauges | black box |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for seed in seeds:
        trial, memory = random_trial(seed)
        best = trial.best_fixed(seed)
        shares = " | ".join(f"{best / trial.run(seed, gauges=gauges).took_s:.1%}" for gauges in (True, False))
        per_slot = trial.lines / trial.models[0].slots
        print(
            f"| {seed} | {trial.name} | {trial.spread} | {memory:.0f} | {per_slot:.0f} | {best:.1f} | {shares} |",
            flush=True,
        )


def print_trials() -> None:
    print("| server | with gauges | black box | most in flight | 429s |\n|---|---:|---:|---:|---:|")
    for trial in TRIALS:
        best = sum(trial.best_fixed(seed) for seed in SEEDS)
        seen, unseen = ([trial.run(seed, gauges=gauges) for seed in SEEDS] for gauges in (True, False))
        shares = [f"{best / sum(run.took_s for run in runs):.1%}" for runs in (seen, unseen)]
        most = [str(max(run.in_flight_max for run in runs)) for runs in (seen, unseen)]
        refused = [f"{sum(run.refusals for run in runs) / len(SEEDS) / trial.lines:.0%}" for runs in (seen, unseen)]
        print(f"| {trial.name} | {' | '.join(shares)} | {', '.join(most)} | {', '.join(refused)} |", flush=True)


if __name__ == "__main__":
    main()
