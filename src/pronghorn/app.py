"""The HTTP server: routes over a running system, OpenAI's error envelope everywhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import Iterator

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import pronghorn
from pronghorn.api import faults, live, wire
from pronghorn.api.batches import BatchApi
from pronghorn.api.files import FilesApi
from pronghorn.api.jobs import JobsApi
from pronghorn.api.launch import Launcher
from pronghorn.api.live import LiveApi
from pronghorn.api.models import ModelsApi
from pronghorn.api.reruns import RetryApi
from pronghorn.api.streams import StreamsApi
from pronghorn.api.uploads import UploadsApi
from pronghorn.api.webhooks import WebhooksApi
from pronghorn.domain.addresses import AllowedHosts
from pronghorn.errors import RequestError, SlowBody, Stopping, StorageError, TooLarge
from pronghorn.limits import (
    JSON_BODY_BYTES_MAX,
    JSON_BODY_S_MAX,
    LIVE_BODY_BYTES_MAX,
    UPLOAD_COMPLETE_BODY_BYTES_MAX,
)
from pronghorn.settings import Settings
from pronghorn.system import System

log = logging.getLogger("pronghorn.api")

# Bodies of these routes stream to disk; where they have a bound, the route knows it.
_STREAMED = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")
_COMPLETE_UPLOAD = re.compile(r"/v1/uploads/[^/]+/complete")


def create_app(system: System, settings: Settings) -> FastAPI:
    """Return the ASGI application over a running system."""
    app = _App(
        title="Pronghorn",
        version=pronghorn.__version__,
        redirect_slashes=False,
        docs_url="/docs",
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        # Naming what every error looks like also keeps FastAPI from documenting a 422 that is never sent.
        responses={"default": {"description": "An error", "model": wire.ErrorEnvelope}},
    )
    faults.install(app)
    for router in _routers(system, settings):
        app.include_router(router)
    app.get("/health", tags=["Health"])(health)
    app.head("/health", include_in_schema=False)(health)
    app.add_middleware(_BreakOff)
    app.add_middleware(_BodyLimit)
    return app


def _routers(system: System, settings: Settings) -> Iterator[APIRouter]:
    clock, ids = system.clock, system.ids
    metadata, blobs, files = system.metadata, system.blobs, system.files
    life_s = settings.batch_file_expires_s
    launcher = Launcher(metadata, changed=system.coordinator.wake)
    allowed = AllowedHosts(settings.webhook_allow)
    yield FilesApi(files, blobs, clock, ids, batch_file_expires_s=life_s).routes()
    yield BatchApi(metadata, launcher, system.checker, clock, ids, default_job=settings.default_job).routes()
    yield RetryApi(
        metadata,
        files,
        blobs,
        launcher,
        clock,
        ids,
        line_bytes_max=settings.line_bytes_max,
        batch_file_expires_s=life_s,
    ).routes()
    yield StreamsApi(metadata, files, blobs, clock).routes()
    yield ModelsApi(system.engines, clock.now()).routes()
    yield UploadsApi(system.uploads, files, blobs, clock, ids, batch_file_expires_s=life_s).routes()
    yield JobsApi(metadata, clock, ids).routes()
    yield WebhooksApi(system.webhooks, clock, ids, allowed=allowed, send=system.courier.send).routes()
    yield LiveApi(system.relay).routes()


async def health() -> dict[str, str]:
    """Answer once the server takes requests."""
    return {"status": "ok"}


class _App(FastAPI):
    """An app all of whose answers have an id; to a bug the framework answers from outside of any middleware."""

    def build_middleware_stack(self) -> ASGIApp:
        return _RequestId(super().build_middleware_stack())


class _RequestId:
    """Gives every answer an `x-request-id`, which clients show in their errors, unless an engine has given one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start" and b"x-request-id" not in dict(message["headers"]):
                message["headers"] = [*message["headers"], (b"x-request-id", f"req_{secrets.token_hex(16)}".encode())]
            await send(message)

        await self._app(scope, receive, send_with_id if scope["type"] == "http" else send)


class _BreakOff:
    """Breaks an answer off, and says why, where storage fails or the server stops after its first byte.

    No error can be answered then; before, a request that outlasts the server is answered with 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if started:
                log.warning("%s %s breaks off: the server stops", scope["method"], scope["path"])
                return
            stopping = Stopping("The server is stopping. Send the request again soon.", code="server_stopping")
            await faults.envelope(stopping, {"connection": "close"})(scope, receive, send)
        except Exception as error:
            # The framework wraps what it has a handler for and cannot answer any more.
            reason = error.__cause__ if isinstance(error, RuntimeError) else error
            if not started or not isinstance(reason, StorageError | OSError):
                raise
            log.error("%s %s breaks off: %s", scope["method"], scope["path"], reason)


class _BodyLimit:
    """Refuses a JSON body above the limit while it streams in, before it fills memory, and one that does not arrive."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _STREAMED.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        bytes_max = _body_bytes_max(scope["path"])
        received = 0
        # The route of a live request has a bound of its own.
        late_at = None if scope["path"] in live.PATHS else asyncio.get_running_loop().time() + JSON_BODY_S_MAX
        refusal: RequestError | None = None
        started = False

        async def receive_limited() -> Message:
            nonlocal received, late_at, refusal
            try:
                async with asyncio.timeout_at(late_at):
                    message = await receive()
            except TimeoutError as error:
                refusal = SlowBody(f"The request's body did not arrive within {JSON_BODY_S_MAX:g} s.")
                raise refusal from error
            if not message.get("more_body", False):
                late_at = None  # what comes now is that the client leaves
            received += len(message.get("body", b""))
            if received > bytes_max:
                refusal = TooLarge(f"The request's body is above the limit of {bytes_max} bytes.")
                raise refusal
            return message

        async def send_unless_refused(message: Message) -> None:
            nonlocal started
            # The framework makes a 400 of its own out of whatever reading the body raises.
            if refusal is None or started:
                started = True
                await send(message)

        with contextlib.suppress(TooLarge, SlowBody):
            await self._app(scope, receive_limited, send_unless_refused)
        if refusal is not None and not started:
            await faults.envelope(refusal, {"connection": "close"})(scope, receive, send)


def _body_bytes_max(path: str) -> int:
    if path in live.PATHS:
        return LIVE_BODY_BYTES_MAX
    return UPLOAD_COMPLETE_BODY_BYTES_MAX if _COMPLETE_UPLOAD.fullmatch(path) else JSON_BODY_BYTES_MAX
