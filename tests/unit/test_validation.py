"""What is said about each thing that can be wrong with an input line."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from pronghorn.domain import validation
from pronghorn.domain.model import Endpoint
from pronghorn.domain.validation import Problem, Rules, check_line, explain
from pronghorn.limits import CUSTOM_ID_CHARS_MAX, JSON_DEPTH_MAX, LINE_VALUES_MAX

CHAT = Rules(Endpoint.CHAT_COMPLETIONS, lambda model: model == "m")
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}}
WRONG_URL = "The URL provided for this request does not match the batch endpoint."
HALF_A_PAIR = "This line holds half of a UTF-16 surrogate pair (\\ud800-\\udfff), which is not text."
TOO_DEEP = "This line is nested too deeply."
ABSENT = object()


def line(**changes: Any) -> bytes:
    """A good line with some of its fields replaced, or left out where the value is ABSENT."""
    return json.dumps({name: value for name, value in (LINE | changes).items() if value is not ABSENT}).encode()


def body(**changes: Any) -> bytes:
    """A good line with some of its body's fields replaced or left out."""
    changed = {"model": "m", "messages": []} | changes
    return line(body={name: value for name, value in changed.items() if value is not ABSENT})


def holding(json_text: bytes) -> bytes:
    """A line whose messages are exactly these bytes."""
    return line().replace(b"[]", json_text)


def problems(raw: bytes, rules: Rules = CHAT) -> list[tuple[str, str | None, str]]:
    assert check_line(raw, rules) is None
    found = explain(raw, 7, rules)
    assert {problem.line for problem in found} == {7}
    return [(problem.code, problem.param, problem.message) for problem in found]


def test_a_good_line_comes_back_with_what_planning_needs() -> None:
    checked = check_line(line(custom_id="é"), CHAT)
    assert checked is not None
    assert (checked.custom_id, checked.model) == ("é", "m")


@pytest.mark.parametrize(
    ("raw", "code", "param", "message"),
    [
        (line(custom_id=ABSENT), "missing_required_parameter", "custom_id", "Missing required parameter: 'custom_id'."),
        (line(method=ABSENT), "missing_required_parameter", "method", "Missing required parameter: 'method'."),
        (line(url=ABSENT), "missing_required_parameter", "url", "Missing required parameter: 'url'."),
        (line(body=ABSENT), "missing_required_parameter", "body", "Missing required parameter: 'body'."),
        (line(method="GET"), "invalid_value", "method", "Invalid value: 'GET'. Supported values are: 'POST'."),
        (line(url="/v1/embeddings"), "invalid_url", "url", WRONG_URL),
        (line(url="/v1/unheard"), "invalid_url", "url", WRONG_URL),
        (body(model=ABSENT), "invalid_request", "body.model", "Model parameter is required."),
        (body(model=None), "invalid_request", "body.model", "Model parameter is required."),
        (
            body(model="x"),
            "model_not_found",
            "body.model",
            "The provided model 'x' is not supported by the Batch API.",
        ),
        (body(messages=ABSENT), "invalid_request", "body.messages", "Messages parameter is required."),
        (
            body(stream=True),
            "streaming_unsupported",
            "body.stream",
            "Chat Completions: Streaming is not supported in the Batch API.",
        ),
        (
            line(custom_id="x" * (CUSTOM_ID_CHARS_MAX + 1)),
            "string_above_max_length",
            "custom_id",
            "Invalid 'custom_id': string too long. Expected a string with maximum length 512, "
            "but got a string with length 513 instead.",
        ),
    ],
)
def test_one_thing_wrong_is_one_problem(raw: bytes, code: str, param: str, message: str) -> None:
    assert problems(raw) == [(code, param, message)]


@pytest.mark.parametrize(
    ("raw", "field", "expected", "got"),
    [
        (line(custom_id=1), "custom_id", "a string", "an integer"),
        (line(custom_id=None), "custom_id", "a string", "null"),
        (line(method=1.5), "method", "a string", "a decimal number"),
        (line(url={}), "url", "a string", "an object"),
        (line(body=[]), "body", "an object", "an array"),
        (line(body="{}"), "body", "an object", "a string"),
        (line(body=None), "body", "an object", "null"),
        (body(model=True), "body.model", "a string", "a boolean"),
        (body(stream="yes"), "body.stream", "a boolean", "a string"),
        (body(stream=0), "body.stream", "a boolean", "an integer"),
        (body(stream=1.0), "body.stream", "a boolean", "a decimal number"),
    ],
)
def test_a_wrong_type_is_named_with_the_one_expected(raw: bytes, field: str, expected: str, got: str) -> None:
    message = f"Invalid type for '{field}': expected {expected}, but got {got} instead."
    assert problems(raw) == [("invalid_type", field, message)]


@pytest.mark.parametrize("stream", [None, False, ABSENT])
def test_a_stream_that_is_not_asked_for_is_fine(stream: object) -> None:
    assert check_line(body(stream=stream), CHAT) is not None


@pytest.mark.parametrize(
    ("endpoint", "field", "streaming_name"),
    [
        (Endpoint.CHAT_COMPLETIONS, "messages", "Chat Completions"),
        (Endpoint.COMPLETIONS, "prompt", "Completions"),
        (Endpoint.EMBEDDINGS, "input", "Embeddings"),
        (Endpoint.RESPONSES, "input", "Responses"),
    ],
)
def test_each_endpoint_requires_its_own_input(endpoint: Endpoint, field: str, streaming_name: str) -> None:
    rules = Rules(endpoint, lambda _: True)
    assert check_line(line(url=endpoint.value, body={"model": "m", field: "x"}), rules) is not None
    assert problems(line(url=endpoint.value, body={"model": "m", "stream": True}), rules) == [
        ("invalid_request", f"body.{field}", f"{field.capitalize()} parameter is required."),
        ("streaming_unsupported", "body.stream", f"{streaming_name}: Streaming is not supported in the Batch API."),
    ]


def test_everything_wrong_with_a_line_is_said_at_once_in_the_order_of_its_fields() -> None:
    raw = json.dumps({"custom_id": 1, "method": "PUT", "url": "x", "body": {"model": "y", "stream": "no"}}).encode()
    assert [(code, param) for code, param, _ in problems(raw)] == [
        ("invalid_type", "custom_id"),
        ("invalid_value", "method"),
        ("invalid_url", "url"),
        ("model_not_found", "body.model"),
        ("invalid_request", "body.messages"),
        ("invalid_type", "body.stream"),
    ]
    assert [param for _, param, _ in problems(b"{}")] == ["custom_id", "method", "url", "body"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (line()[:-5], "This line is not parseable as valid JSON: it ends too early."),
        (b"hello", "This line is not parseable as valid JSON: Expecting value at column 1."),
        (line() + b"{}", "This line is not parseable as valid JSON: Extra data at column 108."),
        (holding(b"[NaN]"), "This line is not parseable as valid JSON: NaN is not JSON."),
        (holding(b"[Infinity]"), "This line is not parseable as valid JSON: Infinity is not JSON."),
        (holding(b"[-Infinity]"), "This line is not parseable as valid JSON: -Infinity is not JSON."),
        (b"[]", "This line is not a JSON object: expected an object, but got an array instead."),
        (b'"x"', "This line is not a JSON object: expected an object, but got a string instead."),
        (b"null", "This line is not a JSON object: expected an object, but got null instead."),
        (b"true", "This line is not a JSON object: expected an object, but got a boolean instead."),
        (b"1", "This line is not a JSON object: expected an object, but got an integer instead."),
        (b"1.5", "This line is not a JSON object: expected an object, but got a decimal number instead."),
        (line(custom_id="ab").replace(b"ab", b"a\xff"), "This line is not valid UTF-8: byte 17 of the line is wrong."),
        (holding(b'["\xed\xa0\x80"]'), "This line is not valid UTF-8: byte 106 of the line is wrong."),
    ],
)
def test_what_is_no_json_object_is_said_with_its_place(raw: bytes, message: str) -> None:
    assert problems(raw) == [("invalid_json_line", None, message)]


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_of_any_depth_is_a_problem_of_the_line_and_not_a_crash(opening: bytes, closing: bytes) -> None:
    assert problems(holding(opening * 100_000)) == [("invalid_json_line", None, TOO_DEEP)]
    nested = opening * 100_000 + b"1" + closing * 100_000
    assert problems(holding(nested)) == [("invalid_json_line", None, TOO_DEEP)]


def test_how_deep_a_line_may_be_does_not_depend_on_the_stack_it_is_read_on() -> None:
    room = JSON_DEPTH_MAX - 2  # the line's own object and the body's
    assert check_line(holding(b"[" * room + b"]" * room), CHAT) is not None
    assert problems(holding(b"[" * (room + 1) + b"]" * (room + 1))) == [("invalid_json_line", None, TOO_DEEP)]


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (line()[:-1] + b', "body": {}}', "body"),
        (line()[:-1] + b', "\\u0062ody": {}}', "body"),
        (holding(b'[{"role": "user", "content": {"a": 1, "b": 2, "a": 1}}]'), "a"),
        (holding(b'[{"": 1, "": 1}]'), ""),
        (holding(b'[{"a": 1, "a": ' + b"9" * 5000 + b"}]"), "a"),
        (holding(b'[{"a": 1, "a": ' + b"[" * 220 + b"]" * 220 + b"}]"), "a"),
    ],
    ids=["line", "escaped", "inside", "empty", "long number", "deep"],
)
def test_a_key_that_comes_twice_in_one_object_is_named(raw: bytes, key: str) -> None:
    message = f"This line is not parseable as valid JSON: the key '{key}' comes twice in one object."
    assert problems(raw) == [("invalid_json_line", None, message)]


def test_a_key_may_come_again_in_another_object_and_in_text() -> None:
    assert check_line(holding(b'[{"a": {"a": "{\\"a\\": 1, \\"a\\": 2}"}}, {"a": 1}]'), CHAT) is not None


def test_many_brackets_are_not_deep() -> None:
    assert check_line(holding(b"[" + b"[],{}," * 1000 + b"1]"), CHAT) is not None
    text = json.dumps(["[{" * 1000 + '"\\' + "[" * 1000]).encode()
    assert check_line(holding(text), CHAT) is not None


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1", b'"ab"', b'{"a": 1}', b'[{"a": []}]'])
@pytest.mark.parametrize("wrong", [b"POST", b"PUT"])
def test_a_line_that_is_made_to_fill_memory_is_refused_before_its_values_are_built(value: bytes, wrong: bytes) -> None:
    raw = holding(b"[" + (value + b",") * (LINE_VALUES_MAX + 1) + b"1]").replace(b"POST", wrong)
    tracemalloc.start()
    try:
        found = problems(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = "This line holds more than the 500000 keys and values that a line may have."
    assert found == [("invalid_json_line", None, message)]
    assert peak < 1_000_000


def test_a_long_line_may_hold_as_many_values_as_a_large_request_has() -> None:
    assert check_line(holding(b"[" + b"100257," * (LINE_VALUES_MAX - 20) + b"1]"), CHAT) is not None
    text = json.dumps([':,[{1 "' * 300_000]).encode()
    assert check_line(holding(text), CHAT) is not None


@pytest.mark.parametrize(
    "text", [rb'["\ud800"]', rb'["\uDC00x"]', rb'["\ud83dx\ude00"]', rb'[{"\ud83d": 1}]', rb'["\\\ud83d"]']
)
def test_half_a_surrogate_pair_is_not_text(text: bytes) -> None:
    assert problems(holding(text)) == [("invalid_json_line", None, HALF_A_PAIR)]


@pytest.mark.parametrize("text", [rb'["\ud83d\ude00"]', rb'["\\ud83d"]', rb'["\\\\ud800"]', rb'["\u00e9"]'])
def test_whole_pairs_and_escaped_backslashes_are_text(text: bytes) -> None:
    assert check_line(holding(text), CHAT) is not None


def test_half_a_pair_is_found_beside_a_number_that_python_would_not_read() -> None:
    assert problems(holding(rb'["\ud800", ' + b"9" * 5000 + b"]")) == [("invalid_json_line", None, HALF_A_PAIR)]


def test_a_message_that_quotes_a_client_is_text_of_a_bounded_length() -> None:
    _, _, long = problems(body(model="x" * 1_000_000))[0]
    assert len(long) < 1000
    halved = problems(body(model="\ud800"))
    assert halved[0][2] == "The provided model '?' is not supported by the Batch API."


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"1e-999", b"9" * 5000, b"-0", b"1E+5"])
def test_a_number_beyond_a_double_is_for_the_engine_to_judge(number: bytes) -> None:
    assert check_line(holding(b"[" + number + b"]"), CHAT) is not None


def test_the_size_of_a_number_does_not_hide_what_is_wrong() -> None:
    raw = holding(b"[" + b"9" * 5000 + b"]").replace(b"POST", b"PUT")
    assert [code for code, _, _ in problems(raw)] == ["invalid_value"]


def test_a_byte_order_mark_inside_a_file_is_no_json() -> None:
    [(code, _, message)] = problems(b"\xef\xbb\xbf" + line())
    assert code == "invalid_json_line"
    assert message.startswith("This line is not parseable as valid JSON: ")


def test_fields_we_do_not_know_and_odd_ids_are_let_through() -> None:
    assert check_line(line(custom_id="", extra={"a": 1}), CHAT) is not None
    assert check_line(line(custom_id="é" * CUSTOM_ID_CHARS_MAX), CHAT) is not None


def test_problems_between_lines_have_openai_s_codes_and_texts() -> None:
    assert validation.duplicate("r-1", 3) == Problem(
        "duplicate_custom_id",
        "The custom_id 'r-1' for this request is a duplicate of another request. "
        "The custom_id parameter must be unique for each request in a batch.",
        "custom_id",
        3,
    )
    assert validation.other_model("x", 3) == Problem(
        "mismatched_model",
        "The model 'x' for this request does not match the rest of the batch. "
        "Each batch must contain requests for a single model.",
        "body.model",
        3,
    )
    assert validation.too_long(10, 3) == Problem(
        "line_too_long", "This line is longer than the 10 bytes that a line may have.", None, 3
    )
    assert validation.empty_file() == Problem(
        "empty_file",
        "The input file is empty. Please ensure that the batch contains at least one request.",
        None,
        None,
    )
