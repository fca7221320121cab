"""How near the windows that Pronghorn finds come to the best fixed number of lines in flight, through real processes.

For each model of a server, the same batch runs with the fixed window that is best for it, with the engine's gauges, and
without them, each on an engine and a server of its own. In one more batch one line in a thousand takes a hundred times
longer; it stands beside the shortest time in which its lines could run in their order.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.processes import POLL_S, ScriptedProcess, Server

from bench.command import arguments
from bench.rows import Row, Scale, Section, markdown

# Output tokens of a line: what language models write varies about as much.
TOKENS_MEAN = 100
TOKENS_SPREAD = 0.8
HOW = (
    "A batch through `pronghorn serve` on scripted engines, from a cold start: with the best fixed window, with "
    "gauges, and as a black box. Batches of `quick` are short, so that the start weighs more."
)


@dataclass(frozen=True)
class Bench:
    """Servers behind one model by their settings, the best fixed windows for them, and the lines of a batch."""

    name: str
    engines: tuple[dict[str, object], ...]
    fixed: tuple[int, ...]
    lines: int


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


def compare(bench: Bench, scale: Scale) -> list[Row]:
    """Run a model's batch in the three ways."""
    lines = bench.lines // scale.times(smoke=20, quick=3, full=1)
    tokens = answer_tokens(lines)
    beside = [lines / took_s(bench, tokens, fixed=True)]
    return _rows(bench, tokens, "best fixed window", beside, "at least 0.97")


def compare_long(scale: Scale) -> list[Row]:
    """Run a batch with long lines, and say what would be ideal."""
    lines = LONG.lines // scale.times(smoke=15, quick=3, full=1)
    tokens = with_long_lines(lines)
    return _rows(LONG, tokens, "ideal", [lines / ideal_s(tokens, 64, 0.002)], "at least 0.91")


def _rows(bench: Bench, tokens: list[int], beside: str, values: list[float], wanted: str) -> list[Row]:
    found = [(name, len(tokens) / took_s(bench, tokens, gauges=name == "gauges")) for name in ("gauges", "black box")]
    return [Row(f"{bench.name}, {name}", [rate], "lines/s", beside, values, wanted) for name, rate in found]


def measure(scale: Scale, names: Sequence[str] = (*BENCHES, "long")) -> Section:
    """Compare the models of these names, one after the other."""
    rows: list[Row] = []
    for name in names:
        rows += compare_long(scale) if name == "long" else compare(BENCHES[name], scale)
    return Section("Flow control", HOW, rows)


def main() -> None:
    parser = arguments(__doc__, Scale.FULL)
    parser.add_argument("names", nargs="*", default=[*BENCHES, "long"], help=f"of {', '.join(BENCHES)}, long")
    options = parser.parse_args()
    print(markdown([measure(options.scale, options.names)]))


if __name__ == "__main__":
    main()
