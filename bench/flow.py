"""How near the windows that Pronghorn finds come to the best fixed number of lines in flight, through real processes.

`.venv/bin/python -m bench.flow [MODEL ...]`: for each model of a server, the same batch runs with that fixed window,
with the engine's gauges, and without them, each on an engine and a server of its own. The last row,
`long`, is a batch in which one line in a thousand takes a hundred times longer, beside the shortest time in which its
lines could run in their order. Prints a markdown table.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.processes import POLL_S, ScriptedProcess, Server

# Output tokens of a line: what language models write varies about as much.
TOKENS_MEAN = 100
TOKENS_SPREAD = 0.8


@dataclass(frozen=True)
class Bench:
    """Servers behind one model by their settings, the best fixed windows for them, and the lines of a batch."""

    name: str
    engines: tuple[dict[str, object], ...]
    fixed: tuple[int, ...]
    lines: int


class Row(NamedTuple):
    """A model's batch in lines a second: with the best fixed windows, with gauges, and as a black box."""

    name: str
    fixed: float
    gauges: float
    black_box: float


_SLOTS = {"capacity": "slots", "token_ms": 10}
BENCHES = {
    "slots256": Bench("256 slots", (_SLOTS | {"slots": 256},), (288,), 15_000),
    "kv": Bench("limited by memory", (_SLOTS | {"capacity": "kv", "slots": 256, "kv_tokens": 12_000},), (128,), 6_000),
    "slots4": Bench("4 slots", (_SLOTS | {"slots": 4, "token_ms": 1},), (6,), 2_400),
    "rate": Bench(
        "100 lines a second, 429 above",
        ({"capacity": "rate_limit", "requests_per_s": 100, "token_ms": 5},),
        (64,),
        6_000,
    ),
    "dip": Bench(
        "256 slots, half of them for 20 s", (_SLOTS | {"slots": 256, "dip_at_s": 20, "dip_s": 20},), (288,), 15_000
    ),
    "two": Bench(
        "two servers, one four times as fast",
        (_SLOTS | {"slots": 64}, _SLOTS | {"slots": 64, "token_ms": 2.5}),
        (76, 76),
        18_000,
    ),
}


LONG = Bench("one line in 1,000 takes 100 times longer", (_SLOTS | {"slots": 64, "token_ms": 2},), (72,), 15_000)


def answer_tokens(lines: int, seed: int = 1) -> list[int]:
    """Return lognormal lengths of answers."""
    rng, mu = random.Random(seed), math.log(TOKENS_MEAN) - TOKENS_SPREAD**2 / 2
    return [max(1, round(rng.lognormvariate(mu, TOKENS_SPREAD))) for _ in range(lines)]


def with_long_lines(lines: int) -> list[int]:
    """Return lengths of answers of which the last of each thousand is a hundred times longer."""
    return [TOKENS_MEAN * 100 if number % 1000 == 999 else TOKENS_MEAN for number in range(lines)]


def ideal_s(tokens: list[int], slots: int, token_s: float) -> float:
    """Return the time that lines take in their order when a slot that comes free takes the next at once."""
    free_at = [0.0] * slots
    for count in tokens:
        heapq.heapreplace(free_at, free_at[0] + count * token_s)
    return max(free_at)


def _line(number: int, tokens: int) -> str:
    prompt = f"{number} [[scripted tokens={tokens}]]"
    body = {"model": "scripted", "messages": [{"role": "user", "content": prompt}]}
    line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line) + "\n"


def took_s(bench: Bench, tokens: list[int], *, fixed: bool = False, gauges: bool = True) -> float:
    """Run a batch of lines with so many output tokens; return the seconds from its creation to its completion."""
    content = "".join(_line(number, count) for number, count in enumerate(tokens)).encode()
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        engines = [
            ScriptedProcess(scratch / f"engine-{index}.log", gauges=str(gauges).lower(), **settings)
            for index, settings in enumerate(bench.engines)
        ]
        config = scratch / "pronghorn.toml"
        for engine, window in zip(engines, bench.fixed, strict=True):
            with config.open("a") as file:
                file.write(f'[[upstream]]\nurl = "{engine.base_url}"\n' + (f"window = {window}\n" if fixed else ""))
        try:
            with Server(scratch / "data", "--config", str(config)) as server:
                return _run(server, content, len(tokens))
        finally:
            for engine in engines:
                engine.kill()


def _run(server: Server, content: bytes, lines: int) -> float:
    file_id = server.upload(content)
    start = time.perf_counter()
    batch_id = server.create_batch(file_id)["id"]
    while (batch := server.batch(batch_id))["status"] not in ("completed", "failed"):
        time.sleep(POLL_S)
    assert batch["request_counts"]["completed"] == lines, batch
    return time.perf_counter() - start


def measure(bench: Bench) -> Row:
    """Run a model's batch in the three ways."""
    tokens = answer_tokens(bench.lines)
    runs = (took_s(bench, tokens, fixed=True), took_s(bench, tokens), took_s(bench, tokens, gauges=False))
    return Row(bench.name, *(bench.lines / run for run in runs))


def measure_long() -> Row:
    """Run a batch with long lines; what is called fixed is the ideal here."""
    tokens = with_long_lines(LONG.lines)
    runs = (ideal_s(tokens, 64, 0.002), took_s(LONG, tokens), took_s(LONG, tokens, gauges=False))
    return Row(LONG.name, *(LONG.lines / run for run in runs))


def main() -> None:
    print("| server | best fixed, lines/s | with gauges | black box |\n|---|---:|---:|---:|")
    for name in sys.argv[1:] or [*BENCHES, "long"]:
        row = measure_long() if name == "long" else measure(BENCHES[name])
        shares = f"{row.gauges / row.fixed:.1%} | {row.black_box / row.fixed:.1%}"
        print(f"| {row.name} | {row.fixed:.1f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
