"""What goes out for one attempt at one line, decided without any I/O."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

import msgspec

from pronghorn.engines.scripted.answers import Answer, Finish, Style, compose
from pronghorn.engines.scripted.faults import (
    Fault,
    FaultKind,
    FaultPlan,
    Marker,
    MarkerError,
    fault_reply,
    read_marker,
)
from pronghorn.engines.scripted.ledger import is_ok
from pronghorn.engines.scripted.replies import Reply, envelope, event_stream, invalid_request, json_reply
from pronghorn.engines.scripted.requests import Endpoint, InvalidBody, parse

if TYPE_CHECKING:
    from pronghorn.engines.scripted.options import ScriptedOptions
    from pronghorn.engines.scripted.requests import Asked


class Delivery(Enum):
    """What the server does with a reply."""

    WHOLE = auto()
    TRICKLE = auto()
    TRUNCATE = auto()
    CLOSE = auto()
    RESET = auto()
    NEVER = auto()
    EXIT = auto()


class Verdict(msgspec.Struct, frozen=True):
    """What goes out for one attempt.

    `tokens` is the line's output when the model has to serve it, None when it is answered before the model.
    """

    reply: Reply
    delivery: Delivery = Delivery.WHOLE
    fault: FaultKind | None = None
    tokens: int | None = None
    delay_s: float = 0.0

    @property
    def status(self) -> int | None:
        """The status of the complete reply the client gets, None when it gets none."""
        return self.reply.status if self.delivery in _COMPLETE else None

    @property
    def ok(self) -> bool:
        """Whether the client gets a good answer to its line."""
        return self.delivery in _COMPLETE and is_ok(self.reply.status, self.fault)


_COMPLETE = frozenset({Delivery.WHOLE, Delivery.TRICKLE})
_NO_REPLY = Reply(500, b"")

# Kinds that answer nothing at all, and so never reach the model.
_SILENT = {FaultKind.HANG: Delivery.NEVER, FaultKind.CRASH: Delivery.EXIT}
_DELIVERIES = {FaultKind.TRUNCATED: Delivery.TRUNCATE, FaultKind.TRICKLE: Delivery.TRICKLE}
_FINISHES = {
    FaultKind.ABORT_FINISH: Finish.ABORT,
    FaultKind.LENGTH: Finish.LENGTH,
    FaultKind.CONTENT_FILTER: Finish.CONTENT_FILTER,
}
# Where each endpoint keeps what a `null_choices` fault takes away.
_PAYLOAD_FIELDS = {
    Endpoint.CHAT: "choices",
    Endpoint.COMPLETIONS: "choices",
    Endpoint.EMBEDDINGS: "data",
    Endpoint.RESPONSES: "output",
}


class Judge:
    """Decides every attempt by the options alone: same options, line and attempt, same verdict."""

    def __init__(self, options: ScriptedOptions) -> None:
        self._options = options
        self._models = frozenset(options.models)
        self._style = Style(options.answer_bytes, 0, options.embedding_dimensions)
        self._plan = FaultPlan(
            options.seed,
            options.fault_rate,
            options.fault_kinds,
            options.fault_attempts_max,
            options.retry_after_s,
        )

    def decide(
        self, endpoint: Endpoint, body: bytes, key: bytes, attempt: int, faults_before: int, wall_s: int
    ) -> Verdict:
        """Return what goes out for one attempt.

        `key` is the body's SHA-256 digest, `attempt` counts from 0, `faults_before` counts the line's earlier faults,
        and `wall_s` is Unix time, which only a Retry-After given as a date depends on.
        """
        try:
            asked = parse(endpoint, body)
            marker = read_marker(body, self._options.retry_after_s)
        except InvalidBody as error:
            return Verdict(invalid_request(str(error), param=error.param))
        except MarkerError as error:
            return Verdict(invalid_request(str(error), code="invalid_marker"))
        if asked.model not in self._models:
            return Verdict(_unknown_model(asked.model))
        if marker is None:
            fault = self._plan.draw(key, attempt, faults_before)
            return self._judge(endpoint, asked, key, fault, self._style, wall_s)
        return self._judge_marked(endpoint, asked, key, marker, attempt, wall_s)

    def _judge_marked(
        self, endpoint: Endpoint, asked: Asked, key: bytes, marker: Marker, attempt: int, wall_s: int
    ) -> Verdict:
        style = msgspec.structs.replace(self._style, tokens_min=marker.tokens)
        if not marker.holds_on(attempt):
            return self._judge(endpoint, asked, key, None, style, wall_s)
        verdict = self._judge(endpoint, asked, key, marker.fault, style, wall_s)
        return msgspec.structs.replace(verdict, delay_s=marker.delay_ms / 1000)

    def _judge(
        self, endpoint: Endpoint, asked: Asked, key: bytes, fault: Fault | None, style: Style, wall_s: int
    ) -> Verdict:
        if fault is None:
            return _answered(compose(endpoint, asked, key.hex(), style))
        if fault.kind in _SILENT:
            return Verdict(_NO_REPLY, self._silence(fault.kind), fault.kind)
        if fault.kind is FaultKind.DISCONNECT:
            return Verdict(_NO_REPLY, _hang_up(fault), fault.kind)
        if (reply := fault_reply(fault, wall_s)) is not None:
            return Verdict(reply, fault=fault.kind)
        finish = _FINISHES.get(fault.kind, Finish.STOP)
        answer = compose(endpoint, asked, key.hex(), msgspec.structs.replace(style, finish=finish))
        return _spoiled(endpoint, answer, fault.kind)

    def _silence(self, kind: FaultKind) -> Delivery:
        if kind is FaultKind.CRASH and not self._options.allow_crash:
            return Delivery.CLOSE
        return _SILENT[kind]


def _hang_up(fault: Fault) -> Delivery:
    return Delivery.RESET if fault.variant == "reset" else Delivery.CLOSE


def _answered(answer: Answer) -> Verdict:
    if answer.events is not None:
        return Verdict(event_stream(answer.events), tokens=answer.output_tokens)
    return Verdict(json_reply(answer.document), tokens=answer.output_tokens)


def _spoiled(endpoint: Endpoint, answer: Answer, kind: FaultKind) -> Verdict:
    """Return an answer that the model worked for and that a fault then damaged, or only slowed or cut short."""
    if kind is FaultKind.NULL_CHOICES:
        document = {**answer.document, _PAYLOAD_FIELDS[endpoint]: None}
        return Verdict(json_reply(document), fault=kind, tokens=answer.output_tokens)
    if kind is FaultKind.ABORT_FINISH and endpoint is Endpoint.EMBEDDINGS:
        # An embedding has no finish reason; an engine that drops one can only say so in an error.
        error = envelope("The request was aborted.", "server_error", 500)
        return Verdict(json_reply(error), fault=kind, tokens=answer.output_tokens)
    whole = _answered(answer)
    return msgspec.structs.replace(whole, fault=kind, delivery=_DELIVERIES.get(kind, Delivery.WHOLE))


def _unknown_model(model: str) -> Reply:
    message = f"The model `{model}` does not exist."
    return invalid_request(message, status=404, code="model_not_found", param="model")
