"""The scripted engine as a server: its listening socket, its life, and every route that is not a line."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from pronghorn.clock import Clock, SystemClock
from pronghorn.engines.scripted.answers import CREATED_S
from pronghorn.engines.scripted.capacity import Floor, capacity_of
from pronghorn.engines.scripted.connection import LINE_PATHS, Connection, Request
from pronghorn.engines.scripted.ledger import Ledger, as_document
from pronghorn.engines.scripted.replies import Reply, invalid_request, json_reply
from pronghorn.engines.scripted.verdict import Judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from pronghorn.engines.scripted.options import ScriptedOptions

DOWN_S_MAX = 3600.0
"""Longest that one request can take the engine down: it cannot be asked to come back earlier."""

BACKLOG = 4096
"""Connections the kernel holds before they are accepted: a dispatcher may open a thousand at once."""


class _Down(msgspec.Struct):
    for_s: Annotated[float, msgspec.Meta(gt=0, le=DOWN_S_MAX)]


class ScriptedEngine:
    """A running scripted engine; `start` makes one."""

    def __init__(self, options: ScriptedOptions, ledger: Ledger, clock: Clock) -> None:
        loop = asyncio.get_running_loop()
        self.options = options
        self.ledger = ledger
        self.clock = clock
        self.loop = loop
        self.judge = Judge(options)
        self._capacity = capacity_of(options)
        self.floor = Floor(self._capacity, loop, options.token_ms / 1000)
        self._connections: set[Connection] = set()
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._changed = asyncio.Event()
        self._listener: asyncio.Server | None = None
        self._port = options.port
        self._down: asyncio.Task[None] | None = None
        self._stopping = False
        self._pages: dict[tuple[str, str], Callable[[bytes], Reply]] = {
            ("GET", "/health"): lambda _: json_reply({"status": "ok"}),
            ("GET", "/v1/models"): lambda _: json_reply(_model_list(options.models)),
            ("GET", "/metrics"): lambda _: self._metrics(),
            ("GET", "/scripted/ledger"): lambda _: json_reply(as_document(ledger.totals())),
            ("POST", "/scripted/down"): self._go_down,
        }

    @property
    def origin(self) -> str:
        """Scheme, host and port, for `/health` and `/metrics`."""
        host = self.options.host
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as its base URL."""
        return f"{self.origin}/v1"

    async def listen(self) -> None:
        """Open the listening socket; raises OSError when the address is taken."""
        server = await self.loop.create_server(lambda: Connection(self), self.options.host, self._port, backlog=BACKLOG)
        self._listener = server
        self._port = server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the listening socket, every connection and the ledger's file; the totals stay readable."""
        self._stopping = True
        if self._down is not None:
            self._down.cancel()
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.reset()
        await self._all_closed.wait()
        self.ledger.close()

    async def when(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds()` is true; it is asked again each time a line has come in or ended."""
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def changed(self) -> None:
        """Note that a line has come in or ended."""
        self._changed.set()

    def opened(self, connection: Connection) -> None:
        """Note a new connection."""
        self._connections.add(connection)
        self._all_closed.clear()
        if self._stopping:
            connection.reset()

    def closed(self, connection: Connection) -> None:
        """Note that a connection is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._all_closed.set()

    def page(self, request: Request) -> Reply:
        """Answer a request that is not a line."""
        if found := self._pages.get((request.method, request.path)):
            return found(request.body)
        if request.path in LINE_PATHS or any(path == request.path for _, path in self._pages):
            return invalid_request(f"Method {request.method} is not allowed here.", status=405)
        return invalid_request(f"Unknown path: {request.method} {request.path}", status=404, code="unknown_url")

    def _metrics(self) -> Reply:
        if not self.options.gauges:
            return invalid_request("There are no gauges.", status=404, code="unknown_url")
        load = self.floor.load
        lines: list[str] = []
        for name, kind, value in (
            ("num_requests_running", "gauge", load.running),
            ("num_requests_waiting", "gauge", load.waiting),
            ("num_preemptions_total", "counter", load.preemptions),
            ("kv_cache_usage_perc", "gauge", load.kv_tokens / self._capacity.kv_tokens_max),
        ):
            labels = f'engine="0",model_name="{self.options.models[0]}"'
            lines += [f"# TYPE vllm:{name} {kind}", f"vllm:{name}{{{labels}}} {float(value)}"]
        return Reply(200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4; charset=utf-8")

    def _go_down(self, body: bytes) -> Reply:
        try:
            for_s = msgspec.json.decode(body, type=_Down).for_s
        except msgspec.DecodeError as error:
            return invalid_request(str(error), param="for_s")
        if self._down is None:
            # Before the reply goes out: who has it may count on being refused.
            if self._listener is not None:
                self._listener.close()
            self._down = self.loop.create_task(self._stay_down(for_s))
        return json_reply({"down_for_s": for_s})

    async def _stay_down(self, for_s: float) -> None:
        """Drop every connection and come back after a while, as an engine does that is being restarted."""
        for connection in list(self._connections):
            connection.end()
        await asyncio.sleep(for_s)
        await self.listen()
        self._down = None


def _model_list(models: tuple[str, ...]) -> dict[str, Any]:
    data = [{"id": model, "object": "model", "created": CREATED_S, "owned_by": "pronghorn"} for model in models]
    return {"object": "list", "data": data}


async def start(options: ScriptedOptions, clock: Clock | None = None) -> ScriptedEngine:
    """Start a scripted engine on the running loop.

    Raises OSError when the address is taken or the ledger's file cannot be opened.
    """
    ledger = await asyncio.to_thread(Ledger.open, options.ledger_path, options.ledger_keys_max)
    engine = ScriptedEngine(options, ledger, clock or SystemClock())
    try:
        await engine.listen()
    except OSError:
        ledger.close()
        raise
    return engine


async def serve_scripted(options: ScriptedOptions, ready: Callable[[str], None]) -> None:
    """Serve until cancelled; `ready` is called with the base URL once connections are accepted."""
    engine = await start(options)
    try:
        ready(engine.base_url)
        await asyncio.Event().wait()
    finally:
        await engine.stop()
