"""Live requests: one request, answered while the client waits, by the engines that run batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pronghorn.api.auth import AccountId
from pronghorn.domain.model import Endpoint
from pronghorn.domain.validation import type_name
from pronghorn.engines.live import LiveAnswer, Relay
from pronghorn.errors import InvalidRequest, RequestError, SlowBody
from pronghorn.limits import LIVE_BODY_S_MAX

log = logging.getLogger("pronghorn.live")

PATHS = frozenset(endpoint.value for endpoint in Endpoint)

_TITLES = {
    Endpoint.CHAT_COMPLETIONS: ("create_chat_completion", "Create Chat Completion"),
    Endpoint.COMPLETIONS: ("create_completion", "Create Completion"),
    Endpoint.EMBEDDINGS: ("create_embedding", "Create Embedding"),
    Endpoint.RESPONSES: ("create_response", "Create Response"),
}
_DESCRIPTION = "Answer one request now, ahead of batch lines; only `model` is looked at before it is sent on."
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["model"],
                "properties": {"model": {"type": "string"}},
                "additionalProperties": True,
            }
        }
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The engine's answer, as it came",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    },
}


@dataclass(frozen=True, slots=True)
class LiveApi:
    """Answers live requests, at the four paths that lines can name."""

    relay: Relay

    def routes(self) -> APIRouter:
        router = APIRouter(tags=["Live"], default_response_class=Response)
        for endpoint, (name, summary) in _TITLES.items():
            router.post(
                endpoint.value,
                name=name,
                summary=summary,
                description=_DESCRIPTION,
                responses=_RESPONSES,
                openapi_extra={"requestBody": _BODY},
            )(self._answering(endpoint))
        return router

    def _answering(self, endpoint: Endpoint) -> Callable[..., Awaitable[Response]]:
        async def answer(request: Request, _: AccountId) -> Response:
            return _Exchange(self.relay, endpoint, request)

        return answer


class _Exchange(Response):
    """One live request, from its body to the last byte of its answer."""

    def __init__(self, relay: Relay, endpoint: Endpoint, request: Request) -> None:
        super().__init__()
        self._relay = relay
        self._endpoint = endpoint
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._relay.place():
            try:
                body = await self._body()
            except ClientDisconnect:
                return
            await _unless_gone(receive, self._answer(_model(body), body, send))

    async def _body(self) -> bytes:
        try:
            async with asyncio.timeout(LIVE_BODY_S_MAX):
                return await self._request.body()
        except TimeoutError as error:
            raise SlowBody(f"The request's body did not arrive within {LIVE_BODY_S_MAX:g} s.") from error

    async def _answer(self, model: str, body: bytes, send: Send) -> None:
        async with self._relay.ask(self._endpoint, model, body) as answer:
            if answer.is_event_stream:
                await _stream(answer, send)
            else:
                content = await answer.read()
                length = (b"content-length", b"%d" % len(content))
                await _start(answer, [*answer.headers.items(), length], send)
                await send({"type": "http.response.body", "body": content})


async def _stream(answer: LiveAnswer, send: Send) -> None:
    """Pass events on as they come, no faster than the client takes them."""
    await _start(answer, list(answer.headers.items()), send)
    try:
        async for chunk in answer:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except RequestError as error:
        # The head is out: leaving the answer unfinished makes the server cut the connection, as the engine did.
        log.warning("a live stream was cut: %s", error)
        return
    await send({"type": "http.response.body", "body": b""})


async def _start(answer: LiveAnswer, headers: list[tuple[bytes, bytes]], send: Send) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})


async def _unless_gone(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Answer, or stop answering as soon as the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
    if not answering.cancelled():
        answering.result()


class _Named(msgspec.Struct):
    model: str


_decode = msgspec.json.Decoder(_Named).decode


def _model(body: bytes) -> str:
    """Return the model that a request names.

    Raises InvalidRequest for a body that is not a JSON object with a string `model`.
    """
    try:
        try:
            return _decode(body).model
        except msgspec.ValidationError:
            parts = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest("We could not parse the JSON body of your request.") from error
    if not isinstance(parts, dict):
        got = type_name(parts)
        raise InvalidRequest(f"The request's body must be a JSON object, but it is {got}.", code="invalid_type")
    if "model" not in parts:
        raise InvalidRequest("Missing required parameter: 'model'.", param="model", code="missing_required_parameter")
    got = type_name(parts["model"])
    message = f"Invalid type for 'model': expected a string, but got {got} instead."
    raise InvalidRequest(message, param="model", code="invalid_type")
