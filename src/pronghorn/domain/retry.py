"""What an engine's answer means for the line that was asked, and for the engine.

docs/RELIABILITY.md has the same table for people. Waits are ranges in seconds: whoever acts on them draws from the
range (full jitter), so that lines that failed together do not come back together.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from pronghorn.domain.answers import Answer, Fault, FaultKind
from pronghorn.domain.model import Endpoint, Usage
from pronghorn.domain.retry_after import retry_after

# Tries that a line's own failures may use up. Three for 500, which is seldom cured by waiting; more for gateways.
ATTEMPTS_MAX = 5
SERVER_ERROR_ATTEMPTS_MAX = 3
# A Retry-After beyond this is the engine saying "not now" to everyone, not to this line.
RETRY_AFTER_LINE_S_MAX = 300.0
BACKOFF_S_MAX = 60.0
LOADING_BACKOFF_S_MAX = 30.0
# A model that an engine does not know is asked for again at least this often while it may still be loading.
ABSENT_MODEL_PAUSE_S = 30.0
# Connections that close, of which each line in flight has one, make room for others.
OUT_OF_FILES_WAIT_S = 1.0
# A line's record keeps each of its token counts in 32 bits.
TOKENS_MAX = (1 << 32) - 1


class Success(NamedTuple):
    """The answer is the line's outcome, for the output file."""

    usage: Usage


class Failure(NamedTuple):
    """The line's outcome, for the error file: the HTTP answer when `code` is None, else code and text.

    `status` replaces the answer's own where a 2xx holds an error.
    """

    code: str | None = None
    message: str = ""
    status: int | None = None


class Again(NamedTuple):
    """Try the line again after a wait between the two bounds; `or_else` is its outcome if time runs out before.

    `ours` tells that something of ours was lacking: it says nothing about the engine.
    """

    wait_s_min: float
    wait_s_max: float
    costs_attempt: bool
    or_else: Failure | None = None
    ours: bool = False


class Pause(NamedTuple):
    """Nothing is wrong with the line: leave the engine alone for a while, then probe it with one line.

    With `model_only` the engine goes on with other models. `or_else` is the line's outcome if time runs out before.
    """

    wait_s_min: float
    wait_s_max: float
    reason: str
    or_else: Failure | None = None
    model_only: bool = False


class Lost(NamedTuple):
    """No answer came, and whether line or engine is at fault shows only when the engine is asked something else.

    `failure` is the line's outcome once its attempts are used up; `hung` tells silence from a lost connection.
    """

    failure: Failure
    hung: bool


Verdict = Success | Failure | Again | Pause | Lost


class Effort(NamedTuple):
    """What a line has had: `tries` counts all, this one included; `charged` those that use up its attempts;
    `pauses` how often in a row the engine has been paused, or has not known the line's model; `absent_s` for how long
    it has not; `spared` tells that an engine which has not failed the line is only away, so that no failure is its
    last."""

    tries: int = 1
    charged: int = 1
    pauses: int = 0
    absent_s: float = 0.0
    spared: bool = False


class Patience(NamedTuple):
    """How long an engine is waited for, in seconds: one that refuses access or is out of quota is left alone for
    `refused_pause_s` at a time; one that does not know a model may take `model_grace_s` to learn it, and one that is
    away as long to come back, before lines that another has failed fail."""

    refused_pause_s: float = 300.0
    model_grace_s: float = 600.0


_PATIENCE = Patience()
_DISCONNECTED = Failure("upstream_disconnected", "The engine closed the connection before it had answered.")
_GARBLED = Failure("upstream_disconnected", "The engine's answer was not valid HTTP.")

_Count = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
_Kind = TypeVar("_Kind")


class _ChatTokens(msgspec.Struct):
    cached_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None


_NO_DETAILS = _ChatTokens()


class _Tokens(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    prompt_tokens_details: _ChatTokens | None = None
    completion_tokens_details: _ChatTokens | None = None
    input_tokens_details: _ChatTokens | None = None
    output_tokens_details: _ChatTokens | None = None

    def usage(self) -> Usage:
        read = self.prompt_tokens_details or self.input_tokens_details or _NO_DETAILS
        written = self.completion_tokens_details or self.output_tokens_details or _NO_DETAILS
        return Usage(
            self.prompt_tokens or self.input_tokens or 0,
            read.cached_tokens or 0,
            self.completion_tokens or self.output_tokens or 0,
            written.reasoning_tokens or 0,
        )


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Body(msgspec.Struct):
    usage: _Tokens | None = None
    choices: list[_Choice] | None = None
    error: Any = None


class _Uncounted(msgspec.Struct):
    choices: list[_Choice] | None = None
    error: Any = None


class _Error(NamedTuple):
    code: object = None
    type: object = None
    message: object = None


class _Envelope(msgspec.Struct):
    error: Any = None


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_uncounted = msgspec.json.Decoder(_Uncounted).decode
_decode_envelope = msgspec.json.Decoder(_Envelope).decode

# Failures that time is likelier to cure than those of the engine itself.
_MAY_PASS = (408, 409, 425, 502, 504, 529)
_OVERLOADED = (
    FaultKind.CONNECT_TIMEOUT,
    FaultKind.DISCONNECTED,
    FaultKind.FIRST_BYTE_TIMEOUT,
    FaultKind.IDLE_TIMEOUT,
    FaultKind.TOTAL_TIMEOUT,
    FaultKind.OUT_OF_FILES,
)


def judge(
    answer: Answer | Fault, endpoint: Endpoint, effort: Effort, now: float, patience: Patience = _PATIENCE
) -> Verdict:
    """Decide what becomes of a line; `now` is Unix seconds, for Retry-After dates."""
    if isinstance(answer, Fault):
        return _judge_fault(answer, effort)
    if 200 <= answer.status < 300:
        return _judge_success(answer, endpoint, effort, now, patience)
    return _judge_refusal(answer.status, _error_of(answer.body), answer.headers, effort, now, patience)


def charge(lost: Lost, effort: Effort) -> Failure | Again:
    """Decide what becomes of a line that a living engine has lost."""
    return _retry_or(lost.failure, effort, wait_s_max=LOADING_BACKOFF_S_MAX)


def shows_overload(answer: Answer | Fault) -> bool:
    """Tell whether an engine shows by this that it has more than it can take, or that we have."""
    if isinstance(answer, Fault):
        return answer.kind in _OVERLOADED
    return answer.status == 429 or answer.status >= 500


def may_be_away(answer: Answer | Fault) -> bool:
    """Tell whether an engine that is not there, rather than overloaded, would show the same."""
    if isinstance(answer, Fault):
        return answer.kind in (FaultKind.DISCONNECTED, FaultKind.CONNECT_TIMEOUT)
    return answer.status >= 500


def has_failed(answer: Answer | Fault, verdict: Verdict) -> bool:
    """Tell whether an answer is no outcome but a failure that may pass, were it the last that the line can have."""
    match verdict:
        case Again(or_else=Failure()):
            return True
        case Failure(code=None, status=status) if isinstance(answer, Answer):
            status = status or answer.status
            return status >= 500 or status in _MAY_PASS
        case Failure():
            return True
        case _:
            return False


def shows_absence(answer: Answer | Fault) -> bool:
    """Tell whether an engine that is to be left alone is not there, rather than there and refusing."""
    return isinstance(answer, Fault) or answer.status == 503


def complaint(answer: Answer | Fault | None, again: Again) -> str:
    """Say for people why a line has to be tried again."""
    match answer:
        case Fault():
            return answer.detail
        case Answer(status=429):
            return "the engine limits the rate (429); lines are tried again when it lets them"
        case Answer(status=status) if not 200 <= status < 300:
            return f"the engine answers with status {status}; lines are tried again"
        case _:
            return again.or_else.message if again.or_else else "the engine puts lines off"


def backoff(attempt: int, wait_s_max: float = BACKOFF_S_MAX) -> tuple[float, float]:
    """Return the range of waits before try `attempt` + 1: it doubles from one second up to the bound."""
    return 0.0, min(wait_s_max, _doubled(attempt - 1))


def engine_wait(pauses: int) -> tuple[float, float]:
    """Return the range of waits before an engine that has been paused so often in a row is probed."""
    return 1.0, min(LOADING_BACKOFF_S_MAX, _doubled(pauses))


def _judge_fault(fault: Fault, effort: Effort) -> Verdict:
    match fault.kind:
        case FaultKind.REFUSED | FaultKind.DNS | FaultKind.CONNECT_TIMEOUT | FaultKind.TLS:
            return Pause(*engine_wait(effort.pauses), fault.detail)
        case FaultKind.OUT_OF_FILES:
            return Again(OUT_OF_FILES_WAIT_S / 2, OUT_OF_FILES_WAIT_S, costs_attempt=False, ours=True)
        case FaultKind.ABORTED:
            return Again(0.0, 0.0, costs_attempt=False)
        case FaultKind.FIRST_BYTE_TIMEOUT | FaultKind.IDLE_TIMEOUT | FaultKind.TOTAL_TIMEOUT:
            return Lost(Failure("request_timeout", "The engine did not answer in time."), hung=True)
        case FaultKind.TOO_LARGE:
            return Failure("upstream_answer_too_large", "The engine's answer was larger than the limit.")
        case FaultKind.DISCONNECTED:
            return Lost(_DISCONNECTED, hung=False)
        case FaultKind.PROTOCOL:
            return _retry_or(_GARBLED, effort, wait_s_max=LOADING_BACKOFF_S_MAX)


def _judge_success(answer: Answer, endpoint: Endpoint, effort: Effort, now: float, patience: Patience) -> Verdict:
    try:
        body = _read(answer.body)
    except (ValueError, RecursionError):
        failure = Failure("upstream_disconnected", "The engine's answer was not valid JSON.")
        return _retry_or(failure, effort, wait_s_max=LOADING_BACKOFF_S_MAX)
    if body.error:  # some engines say null, others an empty text or object, where there is none
        error = _as_error(body.error)
        status = _status_in(error)
        return _with_status(_judge_refusal(status, error, answer.headers, effort, now, patience), status)
    if endpoint in (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS):
        if not body.choices:
            return _retry_or(Failure("upstream_empty", "The engine's answer held no choices."), effort)
        for choice in body.choices:
            if choice.finish_reason in ("abort", "error"):
                failure = Failure("upstream_aborted", "The engine broke off its answer.")
                return _retry_or(failure, effort, wait_s_max=1.0)
    return Success(body.usage.usage() if body.usage else Usage())


def _status_in(error: _Error) -> int:
    """Return the status that an error in a 2xx answer names as its code, be it as text; 500 if it names none."""
    code = error.code
    if isinstance(code, str) and code.isascii() and code.isdigit():
        code = int(code[:4])
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _with_status(verdict: Verdict, status: int) -> Verdict:
    """Return a verdict on an error in a 2xx answer: whatever outcome it has in store carries the error's status."""
    match verdict:
        case Failure():
            return verdict._replace(status=status)
        case Again(or_else=Failure() as failure) | Pause(or_else=Failure() as failure):
            return verdict._replace(or_else=failure._replace(status=status))
        case _:
            return verdict


def _judge_refusal(
    status: int, error: _Error, headers: dict[bytes, bytes], effort: Effort, now: float, patience: Patience
) -> Verdict:
    match status:
        case 429:
            return _judge_rate_limit(error, headers, effort, now, patience)
        case 401 | 403:
            reason = f"the engine refuses access with status {status}"
            # The key may be refused, or one line only: that shows with the next ones.
            wait_s = min(patience.refused_pause_s, _doubled(effort.pauses))
            return Pause(wait_s, wait_s, reason, or_else=Failure())
        case 404 if (effort.spared or effort.absent_s < patience.model_grace_s) and _is_about_model(error):
            reason = "the engine does not know the model (404)"
            # It may be loading, or one of several engines behind one address may be another: that shows at once.
            wait_s = min(ABSENT_MODEL_PAUSE_S, _doubled(effort.pauses), patience.model_grace_s)
            return Pause(wait_s, wait_s, reason, or_else=Failure(), model_only=True)
        case 503:
            wait = retry_after(headers, now)
            wait = None if wait is None else min(max(wait, 1.0), RETRY_AFTER_LINE_S_MAX)
            bounds = (wait, wait) if wait is not None else engine_wait(effort.pauses)
            return Pause(*bounds, "the engine answers 503 (loading or overloaded)")
        case _ if status in _MAY_PASS:
            return _retry_or(Failure(), effort)
        case _ if status >= 500:
            return _retry_or(
                Failure(), effort, attempts_max=SERVER_ERROR_ATTEMPTS_MAX, wait_s_max=LOADING_BACKOFF_S_MAX
            )
        case _:
            return Failure()


def _judge_rate_limit(
    error: _Error, headers: dict[bytes, bytes], effort: Effort, now: float, patience: Patience
) -> Verdict:
    wait = retry_after(headers, now)
    pause_s = patience.refused_pause_s
    if error.code == "insufficient_quota" or error.type == "insufficient_quota":
        return Pause(pause_s, pause_s, "the engine says the quota is used up")
    if wait is None:
        return Again(*backoff(effort.tries), costs_attempt=False)
    if wait > RETRY_AFTER_LINE_S_MAX:
        return Pause(pause_s, pause_s, f"the engine asks to be left alone for {wait:g} s (429)")
    return Again(wait, wait + max(1.0, wait / 10), costs_attempt=False)


def _is_about_model(error: _Error) -> bool:
    """Tell whether a 404 is about the model; of a wrong path vLLM says `Not Found` and others send a page."""
    about_model = isinstance(error.message, str) and "model" in error.message.lower()
    return error.code == "model_not_found" or about_model


def _doubled(times: int) -> float:
    """Return one second doubled so often; how often has no bound when an engine stays away, but a float has one."""
    return 2.0 ** min(times, 10)


def _retry_or(
    failure: Failure, effort: Effort, *, attempts_max: int = ATTEMPTS_MAX, wait_s_max: float = BACKOFF_S_MAX
) -> Failure | Again:
    if effort.spared:
        return Again(*backoff(effort.tries, LOADING_BACKOFF_S_MAX), costs_attempt=False, or_else=failure)
    if effort.charged >= attempts_max:
        return failure
    return Again(*backoff(effort.charged, wait_s_max), costs_attempt=True, or_else=failure)


def _read(body: bytes) -> _Body:
    """Return the parts of an answer that are looked at; an odd one counts as saying nothing, and the answer stands.

    Raises ValueError or RecursionError for what is not JSON.
    """
    try:
        return _decode_body(body)
    except msgspec.ValidationError:
        pass
    try:
        value = msgspec.json.decode(body)
    except msgspec.ValidationError:  # JSON has no largest number, decoders have
        said = _decode_uncounted(body)
        return _Body(choices=said.choices, error=said.error)
    parts = value if isinstance(value, dict) else {}
    choices = parts.get("choices")
    found = choices if isinstance(choices, list) else [choices]
    return _Body(
        usage=_fitting(parts.get("usage"), _Tokens),
        choices=[_fitting(choice, _Choice) or _Choice() for choice in found] if choices else None,
        error=parts.get("error"),
    )


def _fitting(value: object, kind: type[_Kind]) -> _Kind | None:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        return None


def _error_of(body: bytes) -> _Error:
    try:
        return _as_error(_decode_envelope(body).error)
    except (ValueError, RecursionError):
        return _Error()


def _as_error(error: object) -> _Error:
    if isinstance(error, dict):
        return _Error(error.get("code"), error.get("type"), error.get("message"))
    return _Error()
