"""What the order of prompts is worth on the embedded engine: `python -m bench.prefix`.

A file whose lines take turns between 8 system prompts of 400 tokens is run twice, by two servers that differ in nothing
but `prompt_order`, each with an embedded engine of its own whose caches are empty. Every line has a question of its own
and exactly 16 new tokens. Counted is the time from creating the batch to `completed`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.processes import Server

from bench.rows import Row, Scale, Section, markdown

SYSTEM_PROMPTS = 8
SYSTEM_WORDS = 370  # these are 400 tokens
NEW_TOKENS = 16
TEXT = (
    "the team report shows that sales in spring were higher than planned because new stores opened near old towns and "
    "many people came to see what they had heard about from friends who live there while prices stayed low as before"
)
WORDS = TEXT.split()
HOW = """\
{lines} lines that take turns between 8 system prompts of 400 tokens, on the embedded engine with empty caches: in the
file's order, and in the order of their prompts, which is what Pronghorn does by itself."""


class Run(NamedTuple):
    """One run of the file: in which order, how long, and how many prompt tokens there were and were cached."""

    order: str
    seconds: float
    lines: int
    prompt_tokens: int
    cached_tokens: int


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def jsonl(rng: random.Random, lines: int) -> bytes:
    """Return lines that take turns between the system prompts."""
    prompts = [words(rng, SYSTEM_WORDS) for _ in range(SYSTEM_PROMPTS)]
    return b"".join(
        json.dumps(
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": "your-model",
                    "max_tokens": NEW_TOKENS,
                    "ignore_eos": True,
                    "temperature": 0,
                    "messages": [
                        {"role": "system", "content": prompts[number % SYSTEM_PROMPTS]},
                        {"role": "user", "content": words(rng, 20)},
                    ],
                },
            }
        ).encode()
        + b"\n"
        for number in range(lines)
    )


def run(content: bytes, lines: int, *, prompt_order: bool) -> Run:
    """Run the lines as one batch through a server, and an engine, of its own."""
    with tempfile.TemporaryDirectory() as name:
        config = Path(name) / "pronghorn.toml"
        config.write_text(f"prompt_order = {json.dumps(prompt_order)}\n")
        with Server(Path(name) / "data", "--config", str(config)) as server:
            file_id = server.upload(content)
            start = time.perf_counter()
            batch = server.await_batch(server.create_batch(file_id)["id"], timeout_s=3600)
            seconds = time.perf_counter() - start
        assert batch["request_counts"]["completed"] == lines, batch
        usage = batch["usage"]
        cached = usage["input_tokens_details"]["cached_tokens"]
        return Run("prompt" if prompt_order else "file", seconds, lines, usage["input_tokens"], cached)


def runs(lines: int, seed: int = 1) -> list[Run]:
    """Return the run in the file's order, then the one in the prompts' order, of the same file."""
    content = jsonl(random.Random(seed), lines)
    return [run(content, lines, prompt_order=in_order) for in_order in (False, True)]


def measure(scale: Scale, lines: int | None = None, seed: int = 1) -> Section:
    """Run the same lines in the file's order and in the prompts' order."""
    lines = lines or scale.times(smoke=16, quick=80, full=160)
    before, after = runs(lines, seed)
    rates = [found.lines / found.seconds for found in (before, after)]
    shares = [found.cached_tokens / found.prompt_tokens * 100 for found in (before, after)]
    beside = "the file's order"
    rows = [
        Row("the prompts' order", rates[1:], "lines/s", beside, rates[:1], "ratio at least 1.5"),
        Row("prompt tokens from the cache", shares[1:], "%", beside, shares[:1]),
    ]
    return Section("Lines whose prompts begin alike", HOW.format(lines=lines), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=Scale, choices=list(Scale), default=Scale.FULL)
    parser.add_argument("--lines", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(markdown([measure(options.scale, options.lines, options.seed)]))


if __name__ == "__main__":
    main()
