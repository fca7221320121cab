"""What makes an input line acceptable, and what is said about one that is not.

Codes and texts are OpenAI's where they are known; docs/WIRE.md lists them all.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from operator import itemgetter
from typing import Any, NamedTuple

import jiter
import msgspec

from pronghorn.domain.model import Endpoint
from pronghorn.limits import CUSTOM_ID_CHARS_MAX, JSON_DEPTH_MAX, LINE_VALUES_MAX

_REQUIRED_INPUT = {
    Endpoint.CHAT_COMPLETIONS: "messages",
    Endpoint.COMPLETIONS: "prompt",
    Endpoint.EMBEDDINGS: "input",
    Endpoint.RESPONSES: "input",
}
_STREAMING_NAME = {
    Endpoint.CHAT_COMPLETIONS: "Chat Completions",
    Endpoint.COMPLETIONS: "Completions",
    Endpoint.EMBEDDINGS: "Embeddings",
    Endpoint.RESPONSES: "Responses",
}
_TYPE_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Escapes in the order they are read: a whole pair, half of one (the group), any other.
_ESCAPE = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
# Each takes a byte and is parted from the next by another, so a shorter line cannot have too many that are no nesting.
_COUNTED_BYTES_MIN = 2 * LINE_VALUES_MAX
# Whatever is a key or a value, or opens one.
_VALUE = re.compile(rb'[\[{]|"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^][{}",:\s]++', re.DOTALL)
_DEPTH_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in _DEPTH_STEPS)

TOO_LONG = "line_too_long"


class Problem(NamedTuple):
    """One thing wrong with a batch's input: OpenAI's error code, its text, and where (1-based line)."""

    code: str
    message: str
    param: str | None
    line: int | None


class CheckedLine(msgspec.Struct, gc=False):
    """What planning needs of a line that can run."""

    custom_id: str
    model: str


class Rules:
    """What a batch asks of each line: its endpoint, and whether a model can be run there."""

    __slots__ = ("endpoint", "knows_model", "required_input")

    def __init__(self, endpoint: Endpoint, knows_model: Callable[[str], bool]) -> None:
        self.endpoint = endpoint
        self.knows_model = knows_model
        self.required_input = _REQUIRED_INPUT[endpoint]


def check_line(raw: bytes, rules: Rules) -> CheckedLine | None:
    """Return the line if nothing is wrong with it alone, else None: `explain` then says what is.

    `raw` is one line without its newline. The fast path of planning, and a single parse: about 2 us for a 1 KB line.
    """
    if len(raw) > _COUNTED_BYTES_MIN and has_too_many_values(raw):
        return None
    try:
        line = jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    except ValueError:
        line = _sound(raw)
    if type(line) is not dict or type(body := line.get("body")) is not dict:
        return None
    custom_id, model, stream = line.get("custom_id"), body.get("model"), body.get("stream")
    if (
        type(custom_id) is not str
        or len(custom_id) > CUSTOM_ID_CHARS_MAX
        or line.get("method") != "POST"
        or line.get("url") != rules.endpoint
        or type(model) is not str
        or rules.required_input not in body
        or (stream is not None and stream is not False)
        or not rules.knows_model(model)
    ):
        return None
    return CheckedLine(custom_id, model)


def explain(raw: bytes, number: int, rules: Rules) -> list[Problem]:
    """Return every problem of a line that `check_line` refused, in the order of its fields."""
    if has_too_many_values(raw):
        message = f"This line holds more than the {LINE_VALUES_MAX} keys and values that a line may have."
        return [Problem("invalid_json_line", message, None, number)]
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        message = f"This line is not valid UTF-8: byte {error.start + 1} of the line is wrong."
        return [Problem("invalid_json_line", message, None, number)]
    try:
        value = _read(text)
    except RecursionError:
        return [_too_deep(number)]
    except ValueError as error:
        return [Problem("invalid_json_line", _not_json(text, error), None, number)]
    if not isinstance(value, dict):
        message = f"This line is not a JSON object: expected an object, but got {type_name(value)} instead."
        return [Problem("invalid_json_line", message, None, number)]
    if is_too_deep(raw):
        return [_too_deep(number)]
    problems = list(_problems(value, number, rules))
    if _has_lone_surrogate(raw):
        message = "This line holds half of a UTF-16 surrogate pair (\\ud800-\\udfff), which is not text."
        problems.append(Problem("invalid_json_line", message, None, number))
    return problems or [Problem("invalid_json_line", "This line is not acceptable.", None, number)]


def duplicate(custom_id: str, number: int) -> Problem:
    """Return the problem of a custom_id that an earlier line has already used."""
    message = (
        f"The custom_id '{_shown(custom_id)}' for this request is a duplicate of another request. "
        "The custom_id parameter must be unique for each request in a batch."
    )
    return Problem("duplicate_custom_id", message, "custom_id", number)


def other_model(model: str, number: int) -> Problem:
    """Return the problem of a line whose model is not the first line's."""
    message = (
        f"The model '{_shown(model)}' for this request does not match the rest of the batch. "
        "Each batch must contain requests for a single model."
    )
    return Problem("mismatched_model", message, "body.model", number)


def too_long(bytes_max: int, number: int) -> Problem:
    """Return the problem of a line above the limit of `bytes_max` bytes."""
    message = f"This line is longer than the {bytes_max} bytes that a line may have."
    return Problem(TOO_LONG, message, None, number)


def empty_file() -> Problem:
    """Return the problem of an input file without a single line."""
    message = "The input file is empty. Please ensure that the batch contains at least one request."
    return Problem("empty_file", message, None, None)


def type_name(value: object) -> str:
    """Return how OpenAI's messages name a JSON value's type."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "an integer" if isinstance(value, int) else "a decimal number"
    return _TYPE_NAMES[type(value)]


def _problems(line: dict[str, Any], number: int, rules: Rules) -> Iterator[Problem]:
    for field in ("custom_id", "method", "url", "body"):
        if field not in line:
            message = f"Missing required parameter: '{field}'."
            yield Problem("missing_required_parameter", message, field, number)
    for field in ("custom_id", "method", "url"):
        if field in line and not isinstance(line[field], str):
            yield _wrong_type(field, "a string", line[field], number)
    yield from _custom_id_problems(line.get("custom_id"), number)
    method = line.get("method")
    if isinstance(method, str) and method != "POST":
        message = f"Invalid value: '{_shown(method)}'. Supported values are: 'POST'."
        yield Problem("invalid_value", message, "method", number)
    url = line.get("url")
    if isinstance(url, str) and url != rules.endpoint:
        message = "The URL provided for this request does not match the batch endpoint."
        yield Problem("invalid_url", message, "url", number)
    if "body" in line:
        yield from _body_problems(line["body"], number, rules)


def _custom_id_problems(custom_id: object, number: int) -> Iterator[Problem]:
    if isinstance(custom_id, str) and len(custom_id) > CUSTOM_ID_CHARS_MAX:
        message = (
            f"Invalid 'custom_id': string too long. Expected a string with maximum length {CUSTOM_ID_CHARS_MAX}, "
            f"but got a string with length {len(custom_id)} instead."
        )
        yield Problem("string_above_max_length", message, "custom_id", number)


def _body_problems(body: object, number: int, rules: Rules) -> Iterator[Problem]:
    if not isinstance(body, dict):
        yield _wrong_type("body", "an object", body, number)
        return
    model = body.get("model")
    if model is None:
        yield Problem("invalid_request", "Model parameter is required.", "body.model", number)
    elif not isinstance(model, str):
        yield _wrong_type("body.model", "a string", model, number)
    elif not rules.knows_model(model):
        message = f"The provided model '{_shown(model)}' is not supported by the Batch API."
        yield Problem("model_not_found", message, "body.model", number)
    field = _REQUIRED_INPUT[rules.endpoint]
    if field not in body:
        message = f"{field.capitalize()} parameter is required."
        yield Problem("invalid_request", message, f"body.{field}", number)
    stream = body.get("stream")
    if stream is True:
        name = _STREAMING_NAME[rules.endpoint]
        message = f"{name}: Streaming is not supported in the Batch API."
        yield Problem("streaming_unsupported", message, "body.stream", number)
    elif stream is not None and stream is not False:
        yield _wrong_type("body.stream", "a boolean", stream, number)


def _wrong_type(field: str, expected: str, value: object, number: int) -> Problem:
    message = f"Invalid type for '{field}': expected {expected}, but got {type_name(value)} instead."
    return Problem("invalid_type", message, field, number)


def _too_deep(number: int) -> Problem:
    return Problem("invalid_json_line", "This line is nested too deeply.", None, number)


def _shown(text: str) -> str:
    """Return what a message shows of a client's text: not all of a long one, and nothing that is not text."""
    shown = text if len(text) <= CUSTOM_ID_CHARS_MAX else text[:CUSTOM_ID_CHARS_MAX] + "…"
    return shown.encode(errors="replace").decode()


def _sound(raw: bytes) -> Any:
    """Return what a line says that jiter has refused, or None, which is no line either, if jiter was right.

    What jiter takes is JSON in UTF-8 without repeated keys, half surrogate pairs or too deep nesting; about some depths
    and very long numbers it is stricter than we are.
    """
    try:
        line = _read(raw.decode())
    except (ValueError, RecursionError):
        return None
    return None if _has_lone_surrogate(raw) or is_too_deep(raw) else line


def _read(text: str) -> Any:
    """Return what a JSON text says; raises ValueError, and RecursionError far beyond JSON_DEPTH_MAX."""
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_short_int)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        repeated = max(Counter(key for key, _ in pairs).items(), key=itemgetter(1))[0]
        raise ValueError(f"the key '{_shown(repeated)}' comes twice in one object")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _short_int(digits: str) -> int:
    """Read an integer whose size does not matter: int() refuses one of more than 4,300 digits."""
    return int(digits[:20])


def _not_json(text: str, error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"This line is not parseable as valid JSON: {error}."
    if error.pos >= len(text):
        return "This line is not parseable as valid JSON: it ends too early."
    return f"This line is not parseable as valid JSON: {error.msg} at column {error.colno}."


def _has_lone_surrogate(raw: bytes) -> bool:
    """Tell whether a string of a JSON text escapes half of a UTF-16 pair without the other."""
    return _SURROGATE.search(raw) is not None and any(escape[1] for escape in _ESCAPE.finditer(raw))


def is_too_deep(raw: bytes) -> bool:
    """Tell whether a JSON text is nested more than JSON_DEPTH_MAX deep."""
    if raw.count(b"[") + raw.count(b"{") <= JSON_DEPTH_MAX:
        return False
    brackets = _STRING.sub(b"", raw).translate(None, _NO_BRACKETS)
    return max(accumulate(_DEPTH_STEPS[bracket] for bracket in brackets), default=0) > JSON_DEPTH_MAX


def has_too_many_values(raw: bytes) -> bool:
    """Tell whether a JSON text has more than LINE_VALUES_MAX keys and values, without building any of them."""
    values = _VALUE.finditer(raw)
    return len(raw) > _COUNTED_BYTES_MIN and next(islice(values, LINE_VALUES_MAX, None), None) is not None
