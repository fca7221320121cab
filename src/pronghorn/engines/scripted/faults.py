"""Which attempt of which line gets which fault.

A fault is drawn from (seed, line, attempt) alone, so a run can be replayed. A prompt that carries a marker such as
`[[scripted fault=500 times=2 delay_ms=30]]` says for itself what it gets, and then nothing is drawn for it.
"""

from __future__ import annotations

import hashlib
import math
import re
from email.utils import formatdate
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from pronghorn.engines.scripted.replies import HTML, Reply, envelope, json_reply


class FaultKind(StrEnum):
    """What can go wrong with one attempt at a line."""

    RATE_LIMITED = "rate_limited"
    INSUFFICIENT_QUOTA = "insufficient_quota"
    LOADING = "loading"
    BAD_GATEWAY = "bad_gateway"
    GATEWAY_TIMEOUT = "gateway_timeout"
    OVERLOADED = "overloaded"
    SERVER_ERROR = "server_error"
    DISCONNECT = "disconnect"
    TRUNCATED = "truncated"
    HANG = "hang"
    TRICKLE = "trickle"
    ERROR_IN_200 = "error_in_200"
    NULL_CHOICES = "null_choices"
    ABORT_FINISH = "abort_finish"
    NOT_JSON = "not_json"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"
    BAD_REQUEST = "bad_request"
    TOO_LARGE = "too_large"
    UNPROCESSABLE = "unprocessable"
    CONTEXT_LENGTH = "context_length"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    MODEL_NOT_FOUND = "model_not_found"
    CRASH = "crash"


ALL_KINDS = tuple(FaultKind)

# The default draw: a client that retries gets every line answered, and none of these makes it wait for a timeout.
TRANSIENT_KINDS = (
    FaultKind.RATE_LIMITED,
    FaultKind.LOADING,
    FaultKind.BAD_GATEWAY,
    FaultKind.GATEWAY_TIMEOUT,
    FaultKind.OVERLOADED,
    FaultKind.SERVER_ERROR,
    FaultKind.DISCONNECT,
    FaultKind.TRUNCATED,
    FaultKind.ERROR_IN_200,
    FaultKind.NULL_CHOICES,
    FaultKind.ABORT_FINISH,
)

SUCCESS_KINDS = frozenset({FaultKind.TRICKLE, FaultKind.LENGTH, FaultKind.CONTENT_FILTER})
"""Kinds after which the client still holds a good answer."""

# The ways a kind can look; the first is what a marker without `variant` gets.
VARIANTS: dict[FaultKind, tuple[str, ...]] = {
    FaultKind.RATE_LIMITED: ("seconds", "date", "ms", "reset", "none"),
    FaultKind.ERROR_IN_200: ("500", "429", "400"),
    FaultKind.DISCONNECT: ("close", "reset"),
}

# Status, error type, code and message of the kinds that answer with OpenAI's envelope.
_ENVELOPES: dict[FaultKind, tuple[int, str, str | None, str]] = {
    FaultKind.RATE_LIMITED: (429, "requests", "rate_limit_exceeded", "Rate limit reached."),
    FaultKind.INSUFFICIENT_QUOTA: (
        429,
        "insufficient_quota",
        "insufficient_quota",
        "You exceeded your current quota.",
    ),
    FaultKind.LOADING: (503, "unavailable_error", "model_loading", "Loading model"),
    FaultKind.OVERLOADED: (529, "overloaded_error", "overloaded", "Overloaded"),
    FaultKind.SERVER_ERROR: (500, "server_error", "internal_error", "The server had an error."),
    FaultKind.BAD_REQUEST: (400, "invalid_request_error", None, "The request is invalid."),
    FaultKind.TOO_LARGE: (413, "invalid_request_error", "request_too_large", "The request is too large."),
    FaultKind.UNPROCESSABLE: (422, "invalid_request_error", None, "The request cannot be processed."),
    FaultKind.CONTEXT_LENGTH: (
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "This model's maximum context length is 4096 tokens.",
    ),
    FaultKind.UNAUTHORIZED: (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    FaultKind.FORBIDDEN: (403, "permission_error", "forbidden", "You may not use this model."),
    FaultKind.MODEL_NOT_FOUND: (404, "invalid_request_error", "model_not_found", "The model does not exist."),
}

# A gateway in front of an engine answers in HTML, which a client must survive and pass on verbatim.
_PAGES: dict[FaultKind, tuple[int, bytes]] = {
    FaultKind.BAD_GATEWAY: (502, b"<html><body><h1>502 Bad Gateway</h1></body></html>"),
    FaultKind.GATEWAY_TIMEOUT: (504, b"<html><body><h1>504 Gateway Time-out</h1></body></html>"),
    FaultKind.NOT_JSON: (200, b"<html><body><h1>It works!</h1></body></html>"),
}

# A marker may name a kind by its status.
_KINDS_BY_STATUS = {
    "400": FaultKind.BAD_REQUEST,
    "401": FaultKind.UNAUTHORIZED,
    "403": FaultKind.FORBIDDEN,
    "404": FaultKind.MODEL_NOT_FOUND,
    "413": FaultKind.TOO_LARGE,
    "422": FaultKind.UNPROCESSABLE,
    "429": FaultKind.RATE_LIMITED,
    "500": FaultKind.SERVER_ERROR,
    "502": FaultKind.BAD_GATEWAY,
    "503": FaultKind.LOADING,
    "504": FaultKind.GATEWAY_TIMEOUT,
    "529": FaultKind.OVERLOADED,
}


class Fault(msgspec.Struct, frozen=True):
    """One fault as decided: its kind, the way it looks, and the wait it asks for in seconds."""

    kind: FaultKind
    variant: str = ""
    retry_after_s: float = 1.0


class FaultPlan(msgspec.Struct, frozen=True):
    """The drawn faults of a run."""

    seed: int
    rate: float
    kinds: tuple[FaultKind, ...]
    attempts_max: int | None
    retry_after_s: float

    def draw(self, key: bytes, attempt: int, faults_before: int) -> Fault | None:
        """Return the fault of this attempt, or None; `faults_before` counts the line's earlier faults."""
        if not self.rate or (self.attempts_max is not None and faults_before >= self.attempts_max):
            return None
        dice = hashlib.blake2b(b"%d:%d:%b" % (self.seed, attempt, key), digest_size=16).digest()
        if int.from_bytes(dice[:8], "big") >= self.rate * 2**64:
            return None
        kind = self.kinds[int.from_bytes(dice[8:12], "big") % len(self.kinds)]
        ways = VARIANTS.get(kind, ("",))
        return Fault(kind, ways[int.from_bytes(dice[12:], "big") % len(ways)], self.retry_after_s)


class MarkerError(ValueError):
    """The marker in a prompt cannot be read."""


class Marker(msgspec.Struct, frozen=True):
    """What a prompt asks the engine to do with it on its first `times` attempts (None: on all of them)."""

    fault: Fault | None = None
    times: int | None = None
    delay_ms: float = 0.0
    tokens: int = 0

    def holds_on(self, attempt: int) -> bool:
        """Say whether the marker governs this attempt, the first being 0."""
        return self.times is None or attempt < self.times


_MARKER = re.compile(rb"\[\[scripted\s+([^\]]*)\]\]")


class _Fields(msgspec.Struct, forbid_unknown_fields=True):
    fault: str | None = None
    times: str | None = None
    delay_ms: Annotated[float, Meta(ge=0, le=3_600_000)] = 0.0
    tokens: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    variant: str | None = None
    retry_after_s: Annotated[float, Meta(ge=0, le=100_000_000)] | None = None


def read_marker(body: bytes, retry_after_s: float = 1.0) -> Marker | None:
    """Return the first marker anywhere in `body`, or None; raises MarkerError when it cannot be read.

    Fields: fault (a kind or a status), times (a count or `always`; 1 by default with a fault, else always), delay_ms,
    tokens (the least words in the answer), variant, retry_after_s.
    """
    if b"[[scripted" not in body:
        return None
    found = _MARKER.search(body)
    if found is None:
        raise MarkerError("a marker reads [[scripted name=value ...]]")
    words = [word.partition("=") for word in found[1].decode("utf-8", "replace").split()]
    try:
        fields = msgspec.convert({name: value for name, _, value in words}, _Fields, strict=False)
        return _marker(fields, retry_after_s)
    except (msgspec.ValidationError, ValueError) as error:
        raise MarkerError(str(error)) from None


def _marker(fields: _Fields, retry_after_s: float) -> Marker:
    fault = None if fields.fault is None else _marked_fault(fields.fault, fields, retry_after_s)
    times = fields.times or ("1" if fault else "always")
    return Marker(fault, None if times == "always" else int(times), fields.delay_ms, fields.tokens)


def _marked_fault(name: str, fields: _Fields, retry_after_s: float) -> Fault:
    kind = _KINDS_BY_STATUS.get(name) or FaultKind(name)
    ways = VARIANTS.get(kind, ("",))
    variant = ways[0] if fields.variant is None else fields.variant
    if variant not in ways:
        raise MarkerError(f"{kind} has no variant {variant!r}")
    return Fault(kind, variant, retry_after_s if fields.retry_after_s is None else fields.retry_after_s)


def fault_reply(fault: Fault, wall_s: int) -> Reply | None:
    """Return what the fault answers instead of the line's answer, or None when it needs that answer.

    `wall_s` is the time in Unix seconds, for a Retry-After given as a date.
    """
    if fault.kind in _PAGES:
        status, page = _PAGES[fault.kind]
        return Reply(status, page, HTML)
    if fault.kind is FaultKind.ERROR_IN_200:
        return json_reply(_inner_error(fault.variant))
    if fault.kind not in _ENVELOPES:
        return None
    status, error_type, code, message = _ENVELOPES[fault.kind]
    headers = _retry_headers(fault, wall_s) if fault.kind is FaultKind.RATE_LIMITED else ()
    return Reply(status, msgspec.json.encode(envelope(message, error_type, code)), headers=headers)


def _inner_error(variant: str) -> dict[str, object]:
    _, error_type, _, message = _ENVELOPES[_KINDS_BY_STATUS[variant]]
    return envelope(message, error_type, int(variant))


def _retry_headers(fault: Fault, wall_s: int) -> tuple[tuple[str, str], ...]:
    wait_s = fault.retry_after_s
    match fault.variant:
        case "seconds":
            return (("retry-after", str(math.ceil(wait_s))),)
        case "date":
            return (("retry-after", formatdate(wall_s + math.ceil(wait_s), usegmt=True)),)
        case "ms":
            return (("retry-after-ms", str(round(wait_s * 1000))),)
        case "reset":
            return (("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", f"{wait_s:g}s"))
        case _:
            return ()
