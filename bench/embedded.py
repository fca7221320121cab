"""What Pronghorn adds to the embedded engine's own time: `make bench-embedded`.

Starts the embedded engine once. A bare asyncio client first finds its best concurrency; then the client and the whole
pipeline (upload, batch, download over HTTP, in a server process) take turns with the same number of lines against the
very same engine processes. No line is used twice, so no prompt is answered from a cache but for the chat template's.
Prints a markdown table; the ratio is Pronghorn's time over the bare client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import httpx2

from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines.llamacpp import LlamaCppEngine
from pronghorn.settings import LlamaCppSettings

PROMPT_WORDS = 66  # with the template about 90 tokens
NEW_TOKENS = 48
TEXT = (
    "the team report shows that sales in spring were higher than planned because new stores opened near old towns and "
    "many people came to see what they had heard about from friends who live there while prices stayed low as before"
)
WORDS = TEXT.split()


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


async def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--lines", type=int, default=500)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    rng = random.Random(chosen.seed)

    def bodies(count: int) -> list[bytes]:
        return [body(rng) for _ in range(count)]

    engine = LlamaCppEngine(LlamaCppSettings())
    await engine.start(lambda: None)
    replicas = [r for r in engine.replicas() if Endpoint.CHAT_COMPLETIONS in r.endpoints]
    try:
        print(f"| run | seconds for {chosen.lines} lines | lines/s |\n|---|---:|---:|")
        best, best_rate = 0, 0.0
        for concurrency in (8, 12, 16, 20, 24):
            rate = 64 / await bare(replicas, bodies(64), concurrency)
            print(f"| (search) bare client, {concurrency} at once, 64 lines | | {rate:.2f} |", flush=True)
            if rate > best_rate:
                best, best_rate = concurrency, rate
        with tempfile.TemporaryDirectory() as scratch:
            server, base_url, job_id = start_server(replicas, Path(scratch))
            try:
                alone = through = 0.0
                for _ in range(chosen.rounds):
                    seconds = await asyncio.to_thread(through_pronghorn, base_url, job_id, bodies(chosen.lines))
                    print(f"| Pronghorn | {seconds:.1f} | {chosen.lines / seconds:.2f} |", flush=True)
                    through += seconds
                    seconds = await bare(replicas, bodies(chosen.lines), best)
                    print(f"| bare client, {best} at once | {seconds:.1f} | {chosen.lines / seconds:.2f} |", flush=True)
                    alone += seconds
            finally:
                server.terminate()
                server.wait()
        print(f"\nratio {through / alone:.3f} (at most 1.05 wanted)")
    finally:
        await engine.stop()


if __name__ == "__main__":
    asyncio.run(main())
