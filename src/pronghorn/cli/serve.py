"""`pronghorn serve`: the system behind uvicorn, until SIGTERM or ^C."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pronghorn import settings as settings_table
from pronghorn.app import create_app
from pronghorn.domain.model import DEFAULT_ACCOUNT, Job
from pronghorn.errors import UsageError
from pronghorn.limits import REQUEST_HEAD_BYTES_MAX, REQUEST_HEAD_S_MAX, UPLOAD_STEP_BYTES
from pronghorn.settings import Settings
from pronghorn.system import System, running

log = logging.getLogger("pronghorn.serve")

KEEP_ALIVE_S = 75
# How long a thread that plans a batch may keep the interpreter from a request, which asks for it some ten times.
THREAD_SWITCH_S = 0.0005


def settings_from(config: Path | None, **flags: object) -> Settings:
    """Return the settings of a configuration file with the flags that were given laid over them."""
    overrides = {name: value for name, value in flags.items() if value is not None}
    if urls := overrides.pop("upstream", None):
        overrides["upstream"] = _upstreams(config, urls)
    if "data_dir" in overrides:
        overrides["data_dir"] = str(overrides["data_dir"])
    return settings_table.load(config, overrides)


def serve(settings: Settings) -> None:
    """Run the server until it is told to stop."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what clients send wrong is answered, not logged
    sys.setswitchinterval(THREAD_SWITCH_S)
    listener = _listen(settings.host, settings.port)
    uvloop.run(_serve(settings, listener))


async def _serve(settings: Settings, listener: socket.socket) -> None:
    async with running(settings) as system:
        job_id = await _first_job(system)
        await _check_default_job(system, settings)
        server = _Server(
            uvicorn.Config(
                create_app(system, settings),
                http=ClientConnection,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, int(settings.drain_s)),
                lifespan="off",
            )
        )
        host, port = listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        server.banner = f"BASE_URL=http://{address}:{port}\nJOB_ID={job_id}"
        _stop_on_signal(server, system, settings)
        await server.serve(sockets=[listener])


def _stop_on_signal(server: _Server, system: System, settings: Settings) -> None:
    """End cleanly on ^C or SIGTERM; a second one ends the process at once, which loses nothing."""

    def on_signal() -> None:
        if server.should_exit:
            os._exit(1)
        server.should_exit = True
        log.info("stopping: lines in flight have up to %g s; a second signal ends at once", settings.drain_s)
        system.coordinator.stop(settings.drain_s)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


class ClientConnection(HttpToolsProtocol):
    """A client's connection, closed when a request's head does not come or does not end.

    uvicorn closes one on which nothing comes after an answer; before the first request, and while bytes trickle in, it
    waits for ever. A body has its bound where it is read; what is left of one whose request is answered already has
    that of a head, anew for each UPLOAD_STEP_BYTES.
    """

    _awaiting: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0
    _rest_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # There is no cycle before the first request.
        if self.cycle is not None and not self.cycle.response_complete:  # type: ignore[redundant-expr]
            self._stop_awaiting()
        elif self._awaiting is None:
            self._await_request()
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > REQUEST_HEAD_BYTES_MAX:
                self.transport.abort()
        elif self._awaiting is not None:
            self._rest_bytes += len(data)
            if self._rest_bytes >= UPLOAD_STEP_BYTES:
                self._stop_awaiting()
                self._await_request()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it comes behind a body, where nobody reads it
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        self._rest_bytes = 0
        self._awaiting = self.loop.call_later(REQUEST_HEAD_S_MAX, self.transport.close)

    def _stop_awaiting(self) -> None:
        if self._awaiting is not None:
            self._awaiting.cancel()
            self._awaiting = None


class _Server(uvicorn.Server):
    """Says where it listens once it does, and leaves signals to us."""

    banner = ""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is there now stays. Unless it is frozen, each full collection looks at all of it, which stops every
        # request for 0.1 s, once in a few dozen pages of a listing.
        gc.collect()
        gc.freeze()
        print(self.banner, flush=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listener.listen(2048)
    return listener


async def _first_job(system: System) -> str:
    """Return the oldest job, made at the first start."""
    jobs = await system.metadata.jobs(DEFAULT_ACCOUNT)
    if not jobs:
        jobs = [Job(system.ids.new("job-"), DEFAULT_ACCOUNT, "default", 1, system.clock.now())]
        await system.metadata.add_job(jobs[0])
    return jobs[0].id


async def _check_default_job(system: System, settings: Settings) -> None:
    job_id = settings.default_job
    if job_id is not None and await system.metadata.job(job_id, DEFAULT_ACCOUNT) is None:
        raise UsageError(f"default_job names {job_id}, and there is no such job; `pronghorn jobs list` shows them")


def _upstreams(config: Path | None, urls: object) -> list[dict[str, object]]:
    """Return the flag's URLs as settings; one that the file also names keeps the file's key and models."""
    known = {upstream.url.rstrip("/"): upstream for upstream in settings_table.load(config, {}).upstream}
    if not isinstance(urls, list):
        raise UsageError("--upstream takes a URL")
    return [msgspec.to_builtins(known.get(url.rstrip("/"), {"url": url})) for url in urls]
