"""What the order of prompts is worth on the embedded engine: `.venv/bin/python bench/prefix.py`.

A file whose lines take turns between 8 system prompts of 400 tokens is run twice, by two servers that differ in nothing
but `prompt_order`, each with an embedded engine of its own whose caches are empty. Every line has a question of its own
and exactly 16 new tokens. Counted is the time from creating the batch to `completed`. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.processes import Server

SYSTEM_PROMPTS = 8
SYSTEM_WORDS = 370  # these are 400 tokens
NEW_TOKENS = 16
TEXT = (
    "the team report shows that sales in spring were higher than planned because new stores opened near old towns and "
    "many people came to see what they had heard about from friends who live there while prices stayed low as before"
)
WORDS = TEXT.split()


class Row(NamedTuple):
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


def run(content: bytes, lines: int, *, prompt_order: bool) -> Row:
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
        return Row("prompt" if prompt_order else "file", seconds, lines, usage["input_tokens"], cached)


def measure(lines: int, seed: int = 1) -> list[Row]:
    """Return the run in the file's order, then the one in the prompts' order, of the same file."""
    content = jsonl(random.Random(seed), lines)
    return [run(content, lines, prompt_order=in_order) for in_order in (False, True)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--lines", type=int, default=160)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    rows = measure(chosen.lines, chosen.seed)
    print("| order | seconds | lines/s | prompt tokens cached |\n|---|---:|---:|---:|")
    for row in rows:
        share = row.cached_tokens / row.prompt_tokens
        print(f"| {row.order} | {row.seconds:.1f} | {row.lines / row.seconds:.2f} | {share:.0%} |")
    print(f"\n{rows[0].seconds / rows[1].seconds:.2f} times as fast (at least 1.5 wanted)")


if __name__ == "__main__":
    main()
