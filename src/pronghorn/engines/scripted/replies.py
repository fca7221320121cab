"""An HTTP reply as data, and its encoding to bytes."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec

JSON = "application/json"
HTML = "text/html"
EVENT_STREAM = "text/event-stream"

_PHRASES = {status.value: status.phrase for status in HTTPStatus} | {529: "Overloaded"}
_encode_json = msgspec.json.Encoder().encode


class Reply(msgspec.Struct, frozen=True):
    """One HTTP reply; `chunked` says that `body` already carries chunked transfer framing."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    chunked: bool = False


def json_reply(document: Any, status: int = 200) -> Reply:
    """Return `document` as a JSON reply."""
    return Reply(status, _encode_json(document))


def envelope(message: str, kind: str, code: str | int | None, param: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error envelope."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid_request(message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> Reply:
    """Return the envelope OpenAI answers to a request it cannot serve."""
    return json_reply(envelope(message, "invalid_request_error", code, param), status)


def event_stream(events: list[dict[str, Any]]) -> Reply:
    """Return `events` as server-sent events that end with `[DONE]`, one HTTP chunk an event."""
    lines = [b"data: " + _encode_json(event) + b"\n\n" for event in events]
    lines.append(b"data: [DONE]\n\n")
    framed = [b"%x\r\n%b\r\n" % (len(line), line) for line in lines]
    return Reply(200, b"".join(framed) + b"0\r\n\r\n", EVENT_STREAM, chunked=True)


def encode_head(reply: Reply, request_id: str, *, keep_alive: bool) -> bytes:
    """Return the status line and headers of `reply`, up to and with the empty line."""
    length = "transfer-encoding: chunked" if reply.chunked else f"content-length: {len(reply.body)}"
    extra = "".join([f"{name}: {value}\r\n" for name, value in reply.headers]) if reply.headers else ""
    ending = "\r\n" if keep_alive else "connection: close\r\n\r\n"
    return (
        f"HTTP/1.1 {reply.status} {_PHRASES[reply.status]}\r\ncontent-type: {reply.content_type}\r\n"
        f"{length}\r\nx-request-id: {request_id}\r\n{extra}{ending}"
    ).encode("latin-1")
