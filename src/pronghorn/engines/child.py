"""A server of ours in a child process: kept running on one port, and replaced when it dies.

The child is a module run as `python -m MODULE OPTIONS`. It writes one line to stdout, `READY` or `FAILED reason`, and
ends when its standard input closes. Whatever else it prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Coroutine, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TextIO

import msgspec

from pronghorn.domain.model import Replica
from pronghorn.errors import EngineError

log = logging.getLogger("pronghorn.child")

LOAD_TIMEOUT_S = 300.0
RESTART_WAIT_S_MAX = 30.0
# Further ones change no wait, and a number of thousands of bits is none.
FAILURES_COUNTED_MAX = 10
_NOTHING: Mapping[str, str] = MappingProxyType({})


class ChildServer:
    """One child process and the replica that it serves; `engine` and `model` are for messages."""

    def __init__(
        self,
        module: str,
        options: msgspec.Struct,
        replica: Replica,
        *,
        engine: str,
        model: str,
        environment: Mapping[str, str] = _NOTHING,
    ) -> None:
        self.replica = replica
        self.names = replica.models or ()
        self.ready = False
        self.trouble: str | None = None
        self._command = (sys.executable, "-m", module, msgspec.json.encode(options).decode())
        self._engine = engine
        self._model = model
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model and return when it answers; from then on a child that dies is replaced."""
        self._process = await self._spawn()
        self._watching = asyncio.create_task(self._watch(self._process))

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._process is not None:
            await end_child(self._process)  # it holds nothing that could be lost

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        while True:
            status = await process.wait()
            self.ready, self.trouble = False, f"{self._engine} ended with status {status} and is being restarted"
            log.error("%s: %s", self._model, self.trouble)
            process = await self._replacement()

    async def _replacement(self) -> asyncio.subprocess.Process:
        """Start the child again, after waits that grow, until it answers."""
        failures = 0
        while True:
            await asyncio.sleep(min(RESTART_WAIT_S_MAX, 0.1 * 2**failures))
            try:
                self._process = await self._spawn()
                return self._process
            except (EngineError, OSError) as error:
                failures = min(failures + 1, FAILURES_COUNTED_MAX)
                self.trouble = str(error)
                log.error("%s: %s", self._model, self.trouble)

    async def _spawn(self) -> asyncio.subprocess.Process:
        process = await start_child(*self._command, env=os.environ | self._environment)
        try:
            await self._loaded(process)
        except BaseException:  # that it is cancelled, too
            await end_child(process)
            raise
        self.ready, self.trouble = True, None
        return process

    async def _loaded(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                line = await process.stdout.readline() if process.stdout else b""
        except TimeoutError as error:
            raise EngineError(f"{self._engine} has not loaded {self._model} in {LOAD_TIMEOUT_S:.0f} s") from error
        if line != b"READY\n":
            reason = line.decode(errors="replace").removeprefix("FAILED ").strip() or "it ended while loading"
            raise EngineError(f"{self._engine} cannot run {self._model}: {reason}")


async def start_child(*command: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a process with pipes to its standard input and output; where this is cancelled, none is left."""
    arguments = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE} | options
    starting = asyncio.create_task(asyncio.create_subprocess_exec(*command, **arguments))
    try:
        # A start that is cancelled itself can leave its pipes open, with asyncio as with uvloop.
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await _to_the_end(_end_started(starting))
        raise


async def end_child(process: asyncio.subprocess.Process) -> None:
    """Kill a process that may have ended already, and wait until it and its pipes are closed."""
    await _to_the_end(_end(process))


async def _end_started(starting: asyncio.Task[asyncio.subprocess.Process]) -> None:
    with contextlib.suppress(OSError):
        await _end(await starting)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    if process.stdin is not None:
        process.stdin.close()
    await process.communicate()
    if process.stdin is not None:
        with contextlib.suppress(ConnectionError):
            await process.stdin.wait_closed()


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Do all of the work, however often it is cancelled, and only then be cancelled."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """Return a port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# What the child does


def take_stdout() -> TextIO:
    """Return stdout for what the child says, and send whatever libraries print there to stderr."""
    status = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return status


def end_failed(status: TextIO, error: Exception) -> NoReturn:
    """Say in one line why the child cannot start, and end it."""
    status.write(f"FAILED {' '.join(str(error).split())}\n")
    status.flush()
    os._exit(1)


def end_with_parent() -> None:
    """End this process, from a thread, as soon as its standard input closes."""
    threading.Thread(target=_await_parents_end, daemon=True).start()


def _await_parents_end() -> None:
    while os.read(0, 4096):
        pass
    # Not a clean exit: destructors of engines wait for their requests while they hold the interpreter's lock.
    os._exit(0)
