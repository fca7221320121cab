"""What Pronghorn adds to the embedded engine's own time: `python -m bench.embedded`, longer as `make bench-embedded`.

Starts the embedded engine once. A bare asyncio client first finds its best concurrency; then the client and the whole
pipeline (upload, batch, download over HTTP, in a server process) take turns with the same number of lines against the
very same engine processes. No line is used twice, so no prompt is answered from a cache but for the chat template's.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import httpx2

from bench.command import arguments
from bench.rows import Row, Scale, Section, markdown
from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines.base import Engine
from pronghorn.engines.llamacpp import LlamaCppEngine
from pronghorn.engines.openvino.engine import OpenVinoEngine, suits
from pronghorn.settings import LlamaCppSettings, OpenVinoSettings

LLAMACPP, OPENVINO = "llama.cpp", "openvino"
DEFAULT_ENGINE = OPENVINO if suits() else LLAMACPP
PROMPT_WORDS = 66  # with the template about 90 tokens
NEW_TOKENS = 48
TEXT = (
    "the team report shows that sales in spring were higher than planned because new stores opened near old towns and "
    "many people came to see what they had heard about from friends who live there while prices stayed low as before"
)
WORDS = TEXT.split()
HOW = """\
{lines} chat lines of about 90 prompt tokens and 48 new ones, through Pronghorn (from creating the batch to `completed`)
and through a bare client at the best of a few concurrencies, against the same engine processes."""


def body(rng: random.Random) -> bytes:
    prompt = "Summarise: " + " ".join(rng.choice(WORDS) for _ in range(PROMPT_WORDS))
    message = {"role": "user", "content": prompt}
    fields = {"model": "smollm2-135m", "messages": [message], "max_tokens": NEW_TOKENS, "ignore_eos": True}
    return json.dumps(fields | {"temperature": 0}).encode()


async def bare(replicas: list[Replica], bodies: list[bytes], concurrency: int) -> float:
    """Send every body, `concurrency` at once spread over the replicas, and return the seconds it took."""
    left = iter(bodies)

    async def client(session: aiohttp.ClientSession, replica: Replica) -> None:
        for content in left:
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{replica.base_url}/chat/completions", data=content, headers=headers) as answer:
                assert (await answer.json())["usage"]["completion_tokens"] == NEW_TOKENS

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session, replicas[i % len(replicas)]) for i in range(concurrency)))
        return time.perf_counter() - start


def through_pronghorn(base_url: str, job_id: str, bodies: list[bytes]) -> float:
    """Run the bodies as one batch and return the seconds from its creation to `completed`."""
    lines = b"".join(
        b'{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":%b}\n' % (number, content)
        for number, content in enumerate(bodies)
    )
    with httpx2.Client(base_url=base_url, timeout=60) as http:
        upload = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("bench.jsonl", lines)}).json()
        start = time.perf_counter()
        fields = {"input_file_id": upload["id"], "endpoint": "/v1/chat/completions", "job_id": job_id}
        batch = http.post("/v1/batches", json=fields | {"completion_window": "unlimited"}).json()
        while batch["status"] not in ("completed", "failed"):
            time.sleep(0.1)
            batch = http.get(f"/v1/batches/{batch['id']}").json()
        assert batch["request_counts"]["completed"] == len(bodies), batch
        return time.perf_counter() - start


def start_server(replicas: list[Replica], scratch: Path) -> tuple[subprocess.Popen[str], str, str]:
    """Start `pronghorn serve` in front of the engine's processes, with the windows the engine states."""
    config = scratch / "pronghorn.toml"
    config.write_text("".join(f'[[upstream]]\nurl = "{r.base_url}"\nwindow = {r.window}\n' for r in replicas))
    command = [sys.executable, "-c", "from pronghorn.cli import main; main()", "serve", "--port", "0"]
    command += ["--data-dir", str(scratch / "data"), "--config", str(config)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout
    base_url, job_id = (server.stdout.readline().strip().split("=", 1)[1] for _ in range(2))
    return server, base_url, job_id


def engine_named(name: str) -> Engine:
    return OpenVinoEngine(OpenVinoSettings()) if name == OPENVINO else LlamaCppEngine(LlamaCppSettings())


async def compare(name: str, rounds: int, lines: int, search_lines: int, shares: Sequence[float], seed: int) -> Section:
    """Find the bare client's best concurrency, then let Pronghorn and the client take turns."""
    rng = random.Random(seed)
    engine = engine_named(name)
    await engine.start(lambda: None)
    replicas = [r for r in engine.replicas() if Endpoint.CHAT_COMPLETIONS in r.endpoints]
    ours: list[float] = []
    alone: list[float] = []
    slots = sum(replica.slots or 1 for replica in replicas)
    concurrencies = [max(1, round(slots * share)) for share in shares]
    try:
        searched = {n: search_lines / await bare(replicas, bodies(rng, search_lines), n) for n in concurrencies}
        best = max(searched, key=lambda concurrency: searched[concurrency])
        with tempfile.TemporaryDirectory() as scratch:
            server, base_url, job_id = start_server(replicas, Path(scratch))
            try:
                for _ in range(rounds):
                    ours.append(
                        lines / await asyncio.to_thread(through_pronghorn, base_url, job_id, bodies(rng, lines))
                    )
                    alone.append(lines / await bare(replicas, bodies(rng, lines), best))
            finally:
                server.terminate()
                server.wait()
    finally:
        await engine.stop()
    client = f"bare client, {best} at once"
    rows = [Row("Pronghorn", ours, "lines/s", client, alone, "ratio at least 0.95"), Row(client, alone, "lines/s")]
    rows += [Row(f"search: {n} at once", [rate], "lines/s") for n, rate in searched.items()]
    return Section(f"Beside the embedded engine, {name}", HOW.format(lines=lines), rows)


def bodies(rng: random.Random, count: int) -> list[bytes]:
    return [body(rng) for _ in range(count)]


def measure(
    scale: Scale, rounds: int = 1, lines: int | None = None, seed: int = 1, engine: str = DEFAULT_ENGINE
) -> Section:
    """Compare at this scale, or with so many lines."""
    lines = lines or scale.times(smoke=4, quick=64, full=192)
    search_lines = min(64, max(4, lines // 4))
    shares = (1,) if scale is Scale.SMOKE else (0.5, 1, 1.5)
    return asyncio.run(compare(engine, rounds, lines, search_lines, shares, seed))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lines", type=int)
    parser.add_argument("--engine", choices=[LLAMACPP, OPENVINO], default=DEFAULT_ENGINE)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    print(markdown([measure(chosen.scale, chosen.rounds, chosen.lines, chosen.seed, chosen.engine)]))


if __name__ == "__main__":
    main()
