"""The two embedded engines beside each other: `python -m bench.engines`.

Both run the same weights and take turns with the same lines (those of `bench/embedded.py`, nothing cached), through the
same bare client, as many at once as the engine states. The CPU is that of the engine's processes, and moves less than
lines/s when something else runs. Then both answer 200 prompts greedily, and the table says how many answers are the
same, and for how many tokens the others are: each engine against the other, and against itself with another number of
lines at once, since a sum's rounding depends on what is computed beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from collections.abc import Sequence

import aiohttp
import psutil

from bench.embedded import bare, body
from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines.base import Engine
from pronghorn.engines.llamacpp import LlamaCppEngine
from pronghorn.engines.openvino.engine import OpenVinoEngine
from pronghorn.settings import LlamaCppSettings, OpenVinoSettings

ANSWER_TOKENS = 64
TOPICS = (
    "rain|bread|the moon|a lighthouse|chess|the sea|bees|a train|winter|a library|iron|music|maps|salt|a bridge|tea"
)
FORMS = (
    "Explain {} to a child in two sentences.|Write a title for a story about {}.|List three facts about {}.|"
    "What is {} good for?|Describe {} without naming it.|Ask me a question about {}.|Write a short poem about {}.|"
    "Why do people like {}?|Give a one-sentence history of {}.|Compare {} with glass.|Translate '{}' into French.|"
    "Write an advertisement for {}.|What would a world without {} be like?"
)
PROMPTS = [form.format(topic) for form in FORMS.split("|") for topic in TOPICS.split("|")]


def replicas_of(engine: Engine) -> list[Replica]:
    return [replica for replica in engine.replicas() if Endpoint.CHAT_COMPLETIONS in replica.endpoints]


def room_of(engine: Engine) -> int:
    return sum(replica.window or 1 for replica in replicas_of(engine))


async def answers(engine: Engine, prompts: Sequence[str], concurrency: int) -> list[list[str]]:
    """Return the tokens of each prompt's greedy answer."""
    found: dict[int, list[str]] = {}
    left = iter(enumerate(prompts))

    async def client(session: aiohttp.ClientSession, replica: Replica) -> None:
        for number, prompt in left:
            fields = {"model": "smollm2-135m", "messages": [{"role": "user", "content": prompt}], "logprobs": True}
            content = json.dumps(fields | {"max_tokens": ANSWER_TOKENS, "temperature": 0})
            async with session.post(f"{replica.base_url}/chat/completions", data=content) as answer:
                [choice] = (await answer.json())["choices"]
                found[number] = [token["token"] for token in choice["logprobs"]["content"]]

    replicas = replicas_of(engine)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        await asyncio.gather(*(client(session, replicas[i % len(replicas)]) for i in range(concurrency)))
    return [found[number] for number in range(len(prompts))]


def agreement(ones: list[list[str]], others: list[list[str]]) -> str:
    """Return the cells of a row: identical answers, and the tokens that the others have in common at their start."""
    same = sum(one == other for one, other in zip(ones, others, strict=True))
    common = [
        next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        for one, other in zip(ones, others, strict=True)
        if one != other
    ]
    tokens = sum(map(len, ones))
    agreed = sum(map(len, (one for one, other in zip(ones, others, strict=True) if one == other))) + sum(common)
    median = f"{statistics.median(common):.0f}" if common else "-"
    return f"{same} of {len(ones)} | {median} | {agreed / tokens:.0%}"


def engines_cpu_s() -> float:
    """Return the processor time of all engine processes; only the one whose turn it is takes any."""
    return sum(sum(process.cpu_times()[:2]) for process in psutil.Process().children(recursive=True))


async def compare_speed(engines: dict[str, Engine], lines: int, rounds: int, seed: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in engines}
    costs: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds):
        for name, engine in engines.items():
            rng = random.Random(seed + turn)
            await bare(replicas_of(engine), [body(rng) for _ in range(8)], 8)  # warm, after the other's turn
            bodies = [body(rng) for _ in range(lines)]
            before = engines_cpu_s()
            rates[name].append(lines / await bare(replicas_of(engine), bodies, room_of(engine)))
            costs[name].append(1000 * (engines_cpu_s() - before) / lines)
    print(f"| {lines} lines, {rounds} turns | lines at once | lines/s | times the first | CPU, ms/line | share |")
    print("|---|---:|---:|---:|---:|---:|")
    first_rate, first_cost = (statistics.median(next(iter(found.values()))) for found in (rates, costs))
    for name, engine in engines.items():
        rate, cost = statistics.median(rates[name]), statistics.median(costs[name])
        cells = f"{rate:.2f} | {rate / first_rate:.2f} | {cost:.0f} | {cost / first_cost:.2f}"
        print(f"| {name} | {room_of(engine)} | {cells} |", flush=True)


async def compare_answers(engines: dict[str, Engine], count: int) -> None:
    print(f"\n| greedy answers of up to {ANSWER_TOKENS} tokens | the same | median common tokens of the others | all |")
    print("|---|---:|---:|---:|")
    prompts = PROMPTS[:count]
    found = {name: await answers(engine, prompts, room_of(engine)) for name, engine in engines.items()}
    names = list(engines)
    print(f"| {names[0]} and {names[1]} | {agreement(found[names[0]], found[names[1]])} |", flush=True)
    for name, engine in engines.items():
        again = await answers(engine, prompts, max(1, room_of(engine) // 3))
        print(f"| {name} and itself, fewer at once | {agreement(found[name], again)} |", flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--answers", type=int, default=200, help="how many to compare; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    engines: dict[str, Engine] = {
        "llama.cpp": LlamaCppEngine(LlamaCppSettings()),
        "openvino": OpenVinoEngine(OpenVinoSettings()),
    }
    try:
        for engine in engines.values():
            await engine.start(lambda: None)
        if options.lines:
            await compare_speed(engines, options.lines, options.rounds, options.seed)
        if options.answers:
            await compare_answers(engines, options.answers)
    finally:
        await asyncio.gather(*(engine.stop() for engine in engines.values()))


if __name__ == "__main__":
    asyncio.run(main())
