"""nginx with one constant answer, and wrk against it: an engine that costs next to nothing, and what it can give."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.cores import MEASURED_CORE, OTHER_CORE, pin

MODEL = "fixed"
ANSWER_BYTES = 600
PATH = "/v1/chat/completions"

# One process, so that it is on the core where it is put. Engines do not end a connection after 1,000 requests, as nginx
# would.
CONFIG = """
daemon off;
master_process off;
pid {scratch}/nginx.pid;
error_log {scratch}/nginx.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  client_body_temp_path {scratch}/body;
  proxy_temp_path {scratch}/proxy;
  fastcgi_temp_path {scratch}/fastcgi;
  uwsgi_temp_path {scratch}/uwsgi;
  scgi_temp_path {scratch}/scgi;
  default_type application/json;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /v1/models {{ return 200 '{models}'; }}
    location / {{ return 200 '{answer}'; }}
  }}
}}
"""
POST = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [==[{body}]==]
"""


def answer() -> bytes:
    """Return a chat completion of 600 bytes."""
    message = {"role": "assistant", "content": ""}
    fields = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1780000000,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 90, "completion_tokens": 80, "total_tokens": 170},
    }
    message["content"] = "y" * (ANSWER_BYTES - len(json.dumps(fields)))
    return json.dumps(fields).encode()


def pid(scratch: Path) -> int:
    """Return the process id of the nginx that runs with this scratch directory."""
    return int((scratch / "nginx.pid").read_text())


@contextmanager
def running(scratch: Path) -> Iterator[str]:
    """Run nginx on the core that is not measured, and give its base URL."""
    port = free_port()
    models = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    config = scratch / "nginx.conf"
    config.write_text(CONFIG.format(scratch=scratch, port=port, models=models, answer=answer().decode()))
    with subprocess.Popen([_program("nginx"), "-p", str(scratch), "-c", str(config)]) as nginx:
        try:
            pin(nginx.pid, OTHER_CORE)
            _await_listener(nginx, port)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            nginx.terminate()


def wrk(base_url: str, body: bytes, connections: int, seconds: int, scratch: Path) -> float:
    """Return the requests a second that one thread of wrk gets from the measured core."""
    script = scratch / "post.lua"
    script.write_text(POST.format(body=body.decode()))
    command = ["taskset", "-c", str(MEASURED_CORE), _program("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s"]
    command += ["-s", str(script), base_url.removesuffix("/v1") + PATH]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Non-2xx" not in said, said
    return float(said.split("Requests/sec:")[1].split()[0])


def _program(name: str) -> str:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin")
    if found is None:
        raise SystemExit(f"there is no {name}: make bench-tools installs it on Debian")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_listener(process: subprocess.Popen[bytes], port: int) -> None:
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise SystemExit(f"nginx ended with {process.returncode}")
