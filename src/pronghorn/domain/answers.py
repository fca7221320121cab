"""What comes back from an engine for one attempt: an HTTP answer, or the fault that kept one from coming."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class FaultKind(enum.StrEnum):
    """Why no HTTP answer came."""

    REFUSED = "refused"
    DNS = "dns"
    CONNECT_TIMEOUT = "connect_timeout"
    TLS = "tls"
    DISCONNECTED = "disconnected"
    PROTOCOL = "protocol"
    TOO_LARGE = "too_large"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Fault:
    """No HTTP answer; `detail` is for people and holds neither bodies nor keys."""

    kind: FaultKind
    detail: str


class Answer:
    """A whole HTTP answer; header names are lower-case."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
