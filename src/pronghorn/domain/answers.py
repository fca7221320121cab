"""What comes back from an engine for one attempt: an HTTP answer, or the fault that kept one from coming."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class FaultKind(enum.StrEnum):
    """What went wrong when no complete HTTP answer came."""

    REFUSED = "refused"
    """No connection could be made: refused, or no route."""
    OUT_OF_FILES = "out_of_files"
    """No connection could be made because this process, or the whole system, can open no further one."""
    DNS = "dns"
    """The engine's host name did not resolve."""
    CONNECT_TIMEOUT = "connect_timeout"
    """No connection within the client's `connect_s`, name look-up and TLS handshake included."""
    TLS = "tls"
    """The TLS handshake failed: certificate, version, or no TLS spoken there."""
    DISCONNECTED = "disconnected"
    """Closed or reset before the answer was complete."""
    PROTOCOL = "protocol"
    """The bytes that came are no HTTP/1 answer."""
    TOO_LARGE = "too_large"
    """The answer's body or head is above its limit."""
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    """No complete head, and no further byte of one, for the client's `first_byte_s`."""
    IDLE_TIMEOUT = "idle_timeout"
    """The body stood still for the client's `idle_s`."""
    TOTAL_TIMEOUT = "total_timeout"
    """Not complete within the client's `total_s`, or the `timeout_s` of `EngineClient.request`."""
    ABORTED = "aborted"
    """Given up by `Call.abort()` or `EngineClient.close()`."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why there is no answer; `detail` is for people and never holds a body, a path or a key."""

    kind: FaultKind
    detail: str


class Answer:
    """A complete HTTP answer: header names in lower case, repeated headers joined by a comma."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def __repr__(self) -> str:
        return f"<Answer {self.status}, {len(self.body)} bytes>"
