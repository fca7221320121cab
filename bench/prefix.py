"""What the order of prompts is worth on llama.cpp: `python -m bench.prefix`, about three minutes.

A file whose lines each have one of 8 system prompts of about 400 tokens is run twice, by two servers that differ in
nothing but `prompt_order`, each with a llama.cpp of its own whose caches are empty. Which prompt a line has is drawn:
where lines take turns, each of 8 slots may get the same prompt again and again in the file's order, too. Every line has
a question of its own and exactly 16 new tokens. OpenVINO is left out: its lines share one cache, which holds these
prompts in any order.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.processes import Server

from bench.command import arguments
from bench.rows import Row, Scale, Section, markdown

SYSTEM_PROMPTS = 8
SYSTEM_WORDS = 370  # these are 400 tokens
NEW_TOKENS = 16
TEXT = (
    "the team report shows that sales in spring were higher than planned because new stores opened near old towns and "
    "many people came to see what they had heard about from friends who live there while prices stayed low as before"
)
WORDS = TEXT.split()

HOW = f"""\
Each line has one of {SYSTEM_PROMPTS} system prompts of about 400 tokens, drawn at random, 20 words of its own and
{NEW_TOKENS} new tokens. First in the file's order, then in the prompts' order: embedded llama.cpp, whose slots keep a
prompt each, with the same settings and empty caches, from creating the batch to `completed`."""


class Run(NamedTuple):
    """One run of the file: lines a second, and the share of its prompt tokens that were cached, in percent."""

    lines_per_s: float
    cached: float


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def jsonl(rng: random.Random, lines: int) -> bytes:
    """Return lines with one of the system prompts each."""
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
                        {"role": "system", "content": rng.choice(prompts)},
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
        config.write_text(f'prompt_order = {json.dumps(prompt_order)}\n[openvino]\nuse = "never"\n')
        with Server(Path(name) / "data", "--config", str(config)) as server:
            file_id = server.upload(content)
            start = time.perf_counter()
            batch = server.await_batch(server.create_batch(file_id)["id"], timeout_s=3600)
            seconds = time.perf_counter() - start
        assert batch["request_counts"]["completed"] == lines, batch
        usage = batch["usage"]
        cached = usage["input_tokens_details"]["cached_tokens"]
        return Run(lines / seconds, 100 * cached / usage["input_tokens"])


def measure(scale: Scale, lines: int | None = None, seed: int = 1) -> Section:
    """Run the same file in the file's order and then in the prompts' order."""
    lines = lines or scale.times(smoke=16, quick=64, full=128)
    content = jsonl(random.Random(seed), lines)
    by_file, by_prompt = (run(content, lines, prompt_order=ordered) for ordered in (False, True))
    rate, beside = [by_prompt.lines_per_s], [by_file.lines_per_s]
    return Section(
        "Order of prompts",
        HOW,
        [
            Row(f"{lines} lines in the prompts' order", rate, "lines/s", "the file's order", beside, "1.5 times"),
            Row("prompt tokens cached", [by_prompt.cached], "%", "the file's order", [by_file.cached]),
        ],
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lines", type=int)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    print(markdown([measure(chosen.scale, chosen.lines, chosen.seed)]))


if __name__ == "__main__":
    main()
