"""The same work through other batch servers: `make bench-peers`.

Each peer is installed from the Python package index into an environment of its own below the user's cache, and started
with the settings in `bench/peer_settings/`. All of them, Pronghorn too, get the same lines over the same OpenAI calls,
with nginx as their engine; nothing is pinned but nginx. A figure is lines over the time from creating the batch to
`completed`, so a server's start is not in it. The peers get the best of a few concurrencies, found by short batches.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from platformdirs import user_cache_path
from tests.processes import Server

from bench import nginx
from bench.dispatch import jsonl
from bench.machine import description
from bench.picture import svg
from bench.rows import Row, Section, markdown

SETTINGS = Path(__file__).parent / "peer_settings"
CONCURRENCIES = (8, 32, 64, 128)
START_S = 120.0
BATCH_S = 600.0
HEAD = """\
# Beside other batch servers

Written by `make bench-peers`. The same lines over the same calls (upload, create, poll), with the same nginx as engine.
A figure is lines over the time from creating the batch to `completed`; the median of its repetitions, beside it their
range. The ratio is the peer's figure over Pronghorn's for as many lines, in the same run.

{machine}

![Lines a second, each at its best concurrency]({picture})

"""
PICTURE = "peers.svg"


class Peer(NamedTuple):
    """A batch server from the package index: what to install, how to start it, how it is asked.

    Its command may use {bin}, {settings}, {port}, {engine} (a base URL without /v1) and {concurrency}; its environment
    too, and {data}.
    """

    name: str
    package: str
    command: tuple[str, ...]
    environment: dict[str, str]
    model: str
    caveat: str
    in_batch: bool = False

    def fields(self, concurrency: int) -> dict[str, Any]:
        """Return what creating a batch says beyond OpenAI's fields."""
        client = {"max_concurrency": concurrency, "adaptive_concurrency": False}
        return {"aibrix": {"client": client}} if self.in_batch else {}


PEERS = (
    Peer(
        "OGX",
        "ogx==1.5.0",
        ("{bin}/ogx", "run", "--insecure", "--port", "{port}", "{settings}/ogx.yaml"),
        {"ENGINE": "{engine}/v1", "CONCURRENCY": "{concurrency}", "DATA": "{data}", "HOME": "{data}"},
        f"vllm/{nginx.MODEL}",
        "files=inline::localfs, batches=inline::reference, inference=remote::vllm, SQLite. It sends lines in groups, "
        "and waits for the last of one before it starts the next.",
    ),
    Peer(
        "AIBrix",
        "aibrix==0.8.0",
        ("{bin}/python", "{settings}/aibrix_service.py", "{engine}", "--host", "127.0.0.1", "--port", "{port}"),
        {"STORAGE_LOCAL_PATH": "{data}"},
        nginx.MODEL,
        "its metadata service as `--dry-run` wires it (local storage and metastore, not crash-safe by its own word), "
        "with its own GatewayEndpointSource for nginx in place of the echo; in production it runs on Kubernetes with "
        "Redis. Its adaptive concurrency is off, and its HTTP client opens at most 100 connections.",
        in_batch=True,
    ),
)


def environment(peer: Peer) -> Path:
    """Return the folder of programs of the peer's environment, installed at the first call."""
    folder = user_cache_path("pronghorn") / "peers" / peer.package.replace("==", "-")
    if not (folder / ".installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {peer.package} into {folder}", file=sys.stderr)
        subprocess.run([_python(), "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/pip"), "install", "-q", peer.package], check=True, stderr=subprocess.DEVNULL)
        (folder / ".installed").touch()
    return folder / "bin"


def _python() -> str:
    """Return an interpreter of 3.12 or newer: OGX takes no older one."""
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob("3.1[2-9]*/bin/python"))
    for program in (os.environ.get("PEER_PYTHON"), "python3.13", "python3.12", *map(str, pyenv), sys.executable):
        check = "import sys; sys.exit(sys.version_info < (3, 12))"
        if program and shutil.which(program):
            asked = subprocess.run([program, "-c", check], check=False, capture_output=True)
            if asked.returncode == 0:
                return program
    raise SystemExit("bench-peers needs a Python of 3.12 or newer: PEER_PYTHON=/path/to/python make bench-peers")


@contextmanager
def started(peer: Peer, engine: str, concurrency: int, scratch: Path) -> Iterator[str]:
    """Run the peer with a data folder of its own and give its base URL."""
    port, data = nginx.free_port(), scratch / f"{peer.name}-{concurrency}"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    places = {"bin": environment(peer), "settings": SETTINGS, "port": port, "engine": engine, "data": data}
    places["concurrency"] = concurrency
    command = [part.format(**places) for part in peer.command]
    variables = os.environ | {name: value.format(**places) for name, value in peer.environment.items()}
    log = scratch / f"{peer.name}.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=variables, cwd=data, stdout=file, stderr=subprocess.STDOUT)
    try:
        base_url = f"http://127.0.0.1:{port}"
        _await_ready(server, base_url, log)
        yield base_url
    finally:
        server.terminate()
        server.wait()


def _await_ready(server: subprocess.Popen[bytes], base_url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx2.get(f"{base_url}/v1/batches").is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"it does not start; its log ends with: {log.read_text()[-1500:]}")


def rate(base_url: str, content: bytes, fields: dict[str, Any]) -> float:
    """Run a batch and return its lines/s; every line has to be completed."""
    lines = content.count(b"\n")
    with httpx2.Client(base_url=base_url, timeout=BATCH_S) as http:
        file = ("input.jsonl", content, "application/jsonl")
        uploaded = http.post("/v1/files", data={"purpose": "batch"}, files={"file": file}).raise_for_status().json()
        begin = time.perf_counter()
        asked = {"input_file_id": uploaded["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = http.post("/v1/batches", json=asked | fields).raise_for_status().json()
        while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
            if time.perf_counter() - begin > BATCH_S:
                raise RuntimeError(f"the batch does not end: {batch}")
            time.sleep(0.05)
            batch = http.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
        took_s = time.perf_counter() - begin
    if batch["status"] != "completed" or batch["request_counts"]["completed"] != lines:
        raise RuntimeError(f"not every line was completed: {batch}")
    return lines / took_s


def content_for(peer: Peer, lines: int) -> bytes:
    return jsonl(lines).replace(f'"model":"{nginx.MODEL}"'.encode(), f'"model":"{peer.model}"'.encode())


def best_concurrency(peer: Peer, engine: str, lines: int, scratch: Path) -> int:
    found = {}
    for concurrency in CONCURRENCIES:
        with started(peer, engine, concurrency, scratch) as base_url:
            found[concurrency] = rate(base_url, content_for(peer, lines), peer.fields(concurrency))
            print(f"{peer.package}, {concurrency} at once: {found[concurrency]:.0f} lines/s", file=sys.stderr)
    return max(found, key=lambda concurrency: found[concurrency])


def peer_rates(peer: Peer, engine: str, lines: int, rounds: int, scratch: Path) -> tuple[int, list[float]]:
    """Return the peer's best concurrency and its lines/s there, after a first batch that warms it up."""
    best = best_concurrency(peer, engine, max(100, lines // 5), scratch)
    with started(peer, engine, best, scratch) as base_url:
        rate(base_url, content_for(peer, 100), peer.fields(best))
        return best, [rate(base_url, content_for(peer, lines), peer.fields(best)) for _ in range(rounds)]


def measure(lines: int, long: int, rounds: int) -> Section:
    """Let Pronghorn and every peer run the same number of lines; Pronghorn a longer batch as well."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with nginx.running(scratch) as base_url:
            engine = base_url.removesuffix("/v1")
            with Server(scratch / "pronghorn", "--upstream", base_url) as server:
                fields = {"job_id": server.job_id}
                rate(server.base_url, jsonl(100), fields)
                ours = [rate(server.base_url, jsonl(lines), fields) for _ in range(rounds)]
                ours_long = [rate(server.base_url, jsonl(long), fields) for _ in range(rounds)]
            rows = [Row(f"Pronghorn, {lines:,} lines", ours, "lines/s")]
            rows += [Row(f"Pronghorn, {long:,} lines", ours_long, "lines/s")]
            caveats = []
            for peer in PEERS:
                title = peer.package.replace("==", " ")
                try:
                    best, rates = peer_rates(peer, engine, lines, rounds, scratch)
                except (RuntimeError, httpx2.HTTPError, subprocess.CalledProcessError) as error:
                    caveats.append(f"- {title}: could not be run here: {error}")
                    continue
                rows.append(Row(f"{title}, {best} at once", rates, "lines/s", f"Pronghorn, {lines:,} lines", ours))
                caveats.append(f"- {title}: {peer.caveat}")
    return Section("The same batch", "\n".join(caveats), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=2_000)
    parser.add_argument("--long", type=int, default=50_000, help="lines of Pronghorn's longer batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help=f"write PEERS.md and {PICTURE} there")
    options = parser.parse_args()
    machine = description()
    section = measure(options.lines, options.long, options.rounds)
    print(markdown([section]))
    if options.to is not None:
        (options.to / "PEERS.md").write_text(HEAD.format(machine=machine, picture=PICTURE) + markdown([section]))
        (options.to / PICTURE).write_text(
            svg("Lines a second on two cores, each at its best concurrency", section.rows)
        )


if __name__ == "__main__":
    main()
