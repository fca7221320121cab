"""Real processes for tests: a server and a scripted engine, started, awaited, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.syscalls import Watched

START_S = 60.0
# Often enough to be quick, seldom enough to leave the processor to what is being awaited.
POLL_S = 0.05
# A real engine loads for longer; one that is back before anybody asks cannot be told from one that stayed.
LOAD_S = 1.0
COMMAND = [sys.executable, "-c", "from pronghorn.cli import main; main()"]


class Process:
    """A child that says on stdout when it is ready, and whose log is in a file."""

    def __init__(
        self, arguments: list[str], log: Path, ready: Callable[[list[str]], bool], watched: Watched | None = None
    ) -> None:
        self._log_path = log
        self._log_file = log.open("ab")
        start = subprocess.Popen if watched is None else watched.start
        self._child = start(
            COMMAND + arguments, stdout=subprocess.PIPE, stderr=self._log_file, text=True, start_new_session=True
        )
        self.lines: list[str] = []
        while not ready(self.lines):
            line = self._child.stdout.readline() if self._child.stdout else ""
            if not line:
                self._reap()
                status = self._child.returncode
                raise RuntimeError(f"pronghorn {arguments[0]} ended with {status}: {self.log()[-2000:]}")
            self.lines.append(line.strip())

    @property
    def pid(self) -> int:
        return self._child.pid

    def kill(self) -> None:
        """End it as a crash would."""
        self._child.kill()
        self._reap()

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def log(self) -> str:
        """Return what it has written to its log."""
        return self._log_path.read_text()

    def await_log(self, text: str) -> None:
        """Wait until it has written this to its log."""
        deadline = time.monotonic() + START_S
        while text not in self.log():
            assert time.monotonic() < deadline, f"its log never says {text!r}"
            time.sleep(POLL_S)

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Ask it to stop and return its exit status."""
        self._child.send_signal(signal.SIGTERM)
        status = self._child.wait(timeout_s)
        self._reap()
        return status

    def wait(self) -> int:
        """Wait until it has ended by itself and return its exit status."""
        self._reap()
        return self._child.returncode

    def children(self) -> list[tuple[int, str]]:
        """Return the process ids and command lines of its direct children."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    if parent == self.pid:
                        found.append((int(entry.name), (entry / "cmdline").read_text().replace("\0", " ")))
                except (FileNotFoundError, ProcessLookupError):
                    continue
        return found

    def peak_bytes(self) -> int:
        """Return the most memory that it has had resident so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def worker_pid(self) -> int:
        """Return the process id of its worker, after waiting for one that is just being replaced."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            for pid, command in self.children():
                if "pronghorn.worker" in command and alive(pid):
                    return pid
        raise AssertionError("there is no worker")

    def _reap(self) -> None:
        self._child.wait()
        if self._child.stdout:
            self._child.stdout.close()
        self._log_file.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None:
            self.kill()
        elif not self._log_file.closed:
            self._reap()


class Server(Process):
    """`pronghorn serve` on a free port."""

    def __init__(self, data_dir: Path, *arguments: str, watched: Watched | None = None) -> None:
        command = ["serve", "--port", "0", "--data-dir", str(data_dir), *arguments]
        super().__init__(command, data_dir.with_suffix(".log"), lambda lines: len(lines) == 2, watched)
        values = dict(line.split("=", 1) for line in self.lines)
        self.data_dir = data_dir
        self.base_url = values["BASE_URL"]
        self.job_id = values["JOB_ID"]
        self.http = httpx2.Client(base_url=self.base_url, timeout=60)

    def upload(self, content: bytes, filename: str = "input.jsonl") -> str:
        answer = self.http.post("/v1/files", data={"purpose": "batch"}, files={"file": (filename, content)})
        answer.raise_for_status()
        return str(answer.json()["id"])

    def create_batch(self, file_id: str, **fields: Any) -> dict[str, Any]:
        body = {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "unlimited",
            "job_id": self.job_id,
        }
        answer = self.http.post("/v1/batches", json=body | fields)
        answer.raise_for_status()
        return dict(answer.json())

    def batch(self, batch_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/v1/batches/{batch_id}").json())

    def await_batch(
        self, batch_id: str, until: Callable[[dict[str, Any]], bool] | None = None, timeout_s: float = 60
    ) -> dict[str, Any]:
        """Poll until the batch has ended, or until `until` holds; a batch that does not get there fails the test."""
        ended = ("completed", "failed", "expired", "cancelled")
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            batch = self.batch(batch_id)
            if until(batch) if until else batch["status"] in ended:
                return batch
            time.sleep(POLL_S)
        raise AssertionError(f"after {timeout_s} s the batch is still {batch}")

    def run_batch(self, content: bytes, timeout_s: float = 60, **fields: Any) -> dict[str, Any]:
        """Run lines from their upload to the end of their batch."""
        return self.await_batch(self.create_batch(self.upload(content), **fields)["id"], timeout_s=timeout_s)

    def content(self, file_id: str | None) -> bytes:
        return b"" if file_id is None else self.http.get(f"/v1/files/{file_id}/content").content

    def __exit__(self, *_: object) -> None:
        self.http.close()
        super().__exit__(*_)


def configured(
    folder: Path,
    *urls: str,
    models: Sequence[str] | None = None,
    window: int | None = None,
    api_key_env: str | None = None,
    **settings: object,
) -> list[str]:
    """Write a file of settings and return the arguments of a server with them, whose lines go to these engines."""
    upstream = {"models": models, "window": window, "api_key_env": api_key_env}
    tables = [f"[[upstream]]\n{_toml({'url': url} | upstream)}" for url in urls]
    path = folder / "pronghorn.toml"
    path.write_text(_toml(settings) + "".join(tables))
    return ["--config", str(path)]


def _toml(values: Mapping[str, object]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value is not None)


class ScriptedProcess(Process):
    """`pronghorn engine scripted` on a free port."""

    def __init__(self, log: Path, **settings: object) -> None:
        flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        super().__init__(["engine", "scripted", *flags], log, lambda lines: len(lines) == 1)
        self.base_url = self.lines[0]

    def ledger(self) -> dict[str, Any]:
        origin = self.base_url.removesuffix("/v1")
        return dict(httpx2.get(f"{origin}/scripted/ledger").json())


@contextmanager
def restarted(log: Path, **settings: object) -> Iterator[tuple[ScriptedProcess, list[int]]]:
    """Run a scripted engine that is started again on its port whenever it ends; the list grows by one each time."""
    deaths: list[int] = []
    over = False
    engine = running = ScriptedProcess(log, **settings)
    port = int(engine.base_url.removesuffix("/v1").rsplit(":", 1)[1])
    changing = threading.Lock()

    def keep_running() -> None:
        nonlocal running
        while True:
            status = running.wait()
            with changing:
                if over:
                    return
                deaths.append(status)
                time.sleep(LOAD_S)
                running = ScriptedProcess(log, port=port, **settings)

    keeper = threading.Thread(target=keep_running, daemon=True)
    keeper.start()
    try:
        yield engine, deaths
    finally:
        with changing:
            over = True
            running.kill()
        keeper.join()


def alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
