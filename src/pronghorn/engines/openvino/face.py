"""The HTTP of the child process: OpenAI's three endpoints that generate, the list of models, the gauges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pronghorn.engines.openvino import requests
from pronghorn.engines.openvino.answers import ChatShape, CompletionShape, ResponseShape, Shape
from pronghorn.engines.openvino.generation import Generation, Generator
from pronghorn.engines.openvino.requests import Settings
from pronghorn.errors import NotFound, RequestError, TooLarge
from pronghorn.limits import LIVE_BODY_BYTES_MAX

_Answer = TypeVar("_Answer")
_Read = Callable[[bytes], tuple[list[str | list[int]], Settings, Shape]]


class Face:
    """Answers for one model under each of its names."""

    def __init__(self, generator: Generator, names: tuple[str, ...]) -> None:
        self._generator = generator
        self._names = names
        readers: dict[str, _Read] = {
            "/v1/chat/completions": self._read_chat,
            "/v1/completions": self._read_completion,
            "/v1/responses": self._read_response,
        }
        routes = [Route(path, self._endpoint(read), methods=["POST"]) for path, read in readers.items()]
        routes.append(Route("/v1/models", self._models))
        routes.append(Route("/health", self._health))
        routes.append(Route("/metrics", self._metrics))
        self.app = Starlette(routes=routes, exception_handlers={RequestError: _refused, 404: _lost, 405: _lost})

    def _endpoint(self, read: _Read) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            prompts, settings, shape = read(await _body(request))
            generation = await self._generator.start(prompts, settings)
            if settings.stream:
                return StreamingResponse(_events(generation, settings, shape), media_type="text/event-stream")
            with generation:
                body = await _unless_gone(request, generation.whole())
            return Response() if body is None else _json(shape.body(*body))

        return answer

    # What each endpoint asks

    def _read_chat(self, body: bytes) -> tuple[list[str | list[int]], Settings, Shape]:
        messages, settings = requests.chat(body)
        return [self._generator.render(messages)], settings, ChatShape(self._names[0], settings.top_logprobs)

    def _read_completion(self, body: bytes) -> tuple[list[str | list[int]], Settings, Shape]:
        prompts, settings = requests.completion(body)
        return prompts, settings, CompletionShape(self._names[0], settings.top_logprobs)

    def _read_response(self, body: bytes) -> tuple[list[str | list[int]], Settings, Shape]:
        messages, settings = requests.response(body)
        return [self._generator.render(messages)], settings, ResponseShape(self._names[0])

    # What the server says of itself

    async def _models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "openvino"} for name in self._names]
        return JSONResponse({"object": "list", "data": models})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        running, waiting = self._generator.gauges()
        return PlainTextResponse(f"openvino:requests_running {running}\nopenvino:requests_waiting {waiting}\n")


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LIVE_BODY_BYTES_MAX:
            raise TooLarge(f"The request's body is above the limit of {LIVE_BODY_BYTES_MAX} bytes.")
    return bytes(body)


async def _events(generation: Generation, settings: Settings, shape: Shape) -> AsyncIterator[bytes]:
    with generation:
        for event in shape.opening():
            yield event
        async for index, text, tokens in generation.pieces():
            for event in shape.delta(index, text, tokens):
                yield event
        for event in shape.closing(*await generation.whole(), usage=settings.stream_usage):
            yield event


async def _unless_gone(request: Request, answer: Awaitable[_Answer]) -> _Answer | None:
    """Wait for an answer, or return None when the client has gone."""
    answering = asyncio.ensure_future(answer)
    going = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answering, going}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        for waiting in (answering, going):
            waiting.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    answer = _json(error.envelope(), error.status)
    answer.headers.update(error.headers)
    return answer


async def _lost(request: Request, error: Exception) -> Response:
    return await _refused(request, NotFound(f"There is no {request.method} {request.url.path} here."))
