"""Why lines failed, counted: the error summary of a batch."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

# A summary is read by people: a few samples each, and no more causes than fit a screen or two.
SAMPLES_MAX = 5
CAUSES_MAX = 50
MESSAGE_CHARS_MAX = 300
CODE_CHARS_MAX = 100
OTHER = "other"


class Cause(msgspec.Struct):
    """Lines that failed alike: the HTTP status if there was an answer, the error's code, one of the messages."""

    status_code: int | None
    code: str | None
    message: str | None
    count: int
    sample_custom_ids: list[str | None]


class _Error(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None
    message: str | None = None


class _Envelope(msgspec.Struct):
    error: _Error | str | None = None


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw


class _Result(msgspec.Struct):
    custom_id: str | None
    response: _Response | None
    error: _Error | None


_decode_result = msgspec.json.Decoder(_Result).decode
_decode_envelope = msgspec.json.Decoder(_Envelope).decode


def cause_of(result: bytes) -> Cause:
    """Return why one line of an error file is there; an answer that cannot be read is a cause of its own."""
    try:
        line = _decode_result(result)
    except (ValueError, RecursionError):
        return Cause(None, OTHER, None, 1, [])
    error = line.error or _Error()
    status = None
    if line.response is not None:
        status = line.response.status_code
        error = _error_in(line.response.body)
    code = error.code if error.code is not None else error.type
    message = error.message[:MESSAGE_CHARS_MAX] if error.message else None
    return Cause(status, None if code is None else str(code)[:CODE_CHARS_MAX], message, 1, [line.custom_id])


def merge(causes: Iterable[Cause]) -> list[Cause]:
    """Add up equal causes, the most frequent first; past a bound the rest are one cause named `other`."""
    found: dict[tuple[int | None, str | None], Cause] = {}
    for cause in causes:
        key = cause.status_code, cause.code
        if key not in found and len(found) >= CAUSES_MAX:
            key = None, OTHER
        known = found.get(key)
        if known is None:
            found[key] = Cause(*key, cause.message, cause.count, cause.sample_custom_ids[:SAMPLES_MAX])
        else:
            known.count += cause.count
            room = SAMPLES_MAX - len(known.sample_custom_ids)
            known.sample_custom_ids += cause.sample_custom_ids[:room]
    return sorted(found.values(), key=lambda cause: -cause.count)


def _error_in(body: bytes | msgspec.Raw) -> _Error:
    try:
        error = _decode_envelope(body).error
    except (ValueError, RecursionError):
        return _Error()
    return error if isinstance(error, _Error) else _Error(message=error)
