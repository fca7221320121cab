"""What each answer and each fault means: one row here for each row of the fault table."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.domain.answers import Answer, Fault, FaultKind
from pronghorn.domain.model import Endpoint, Usage
from pronghorn.domain.retry import (
    ATTEMPTS_MAX,
    SERVER_ERROR_ATTEMPTS_MAX,
    TOKENS_MAX,
    Again,
    Effort,
    Failure,
    Lost,
    Patience,
    Pause,
    Success,
    Verdict,
    backoff,
    charge,
    judge,
    shows_overload,
)
from pronghorn.domain.retry_after import retry_after

NOW = 1_000_000_000.0  # Sun, 09 Sep 2001 01:46:40 GMT
CHAT = Endpoint.CHAT_COMPLETIONS
OK = {"choices": [{"finish_reason": "stop"}]}


def answer(status: int, body: Any = None, **headers: str) -> Answer:
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return Answer(status, named, body if isinstance(body, bytes) else json.dumps(body).encode())


def error(code: object = None, type: object = None) -> dict[str, Any]:
    return {"error": {"message": "no", "type": type, "param": None, "code": code}}


def fault(kind: FaultKind) -> Fault:
    return Fault(kind, "what happened")


def verdict(of: Answer | Fault, effort: Effort = Effort(), endpoint: Endpoint = CHAT) -> Verdict:  # noqa: B008
    return judge(of, endpoint, effort, NOW)


DISCONNECTED = Failure("upstream_disconnected", "The engine closed the connection before it had answered.")
GARBLED = Failure("upstream_disconnected", "The engine's answer was not valid HTTP.")
NOT_JSON = Failure("upstream_disconnected", "The engine's answer was not valid JSON.")
EMPTY = Failure("upstream_empty", "The engine's answer held no choices.")
ABORTED = Failure("upstream_aborted", "The engine broke off its answer.")
TIMEOUT = Failure("request_timeout", "The engine did not answer in time.")
UNKNOWN_MODEL = "the engine does not know the model (404)"


def once_more(or_else: Failure) -> Again:
    """Return the verdict on a line that has failed for the first time, by its own doing."""
    return Again(0.0, 1.0, costs_attempt=True, or_else=or_else)


FREE = Again(0.0, 1.0, costs_attempt=False)
LOADING = "the engine answers 503 (loading or overloaded)"
QUOTA = Pause(300, 300, "the engine says the quota is used up")


@pytest.mark.parametrize(
    ("symptom", "meaning"),
    [
        pytest.param(answer(429), FREE, id="429"),
        pytest.param(answer(429, retry_after="20"), Again(20.0, 22.0, False), id="429 with Retry-After"),
        pytest.param(answer(429, error("insufficient_quota")), QUOTA, id="429 insufficient_quota as code"),
        pytest.param(answer(429, error(None, "insufficient_quota")), QUOTA, id="429 insufficient_quota as type"),
        pytest.param(
            answer(429, retry_after="3600"),
            Pause(300, 300, "the engine asks to be left alone for 3600 s (429)"),
            id="429 with Retry-After beyond minutes",
        ),
        pytest.param(answer(503), Pause(1.0, 1.0, LOADING), id="503 while loading"),
        pytest.param(answer(503, retry_after="7"), Pause(7.0, 7.0, LOADING), id="503 with Retry-After"),
        pytest.param(answer(503, retry_after="0"), Pause(1.0, 1.0, LOADING), id="503 that asks to be hammered"),
        pytest.param(answer(503, retry_after="9" * 99), Pause(300, 300, LOADING), id="503 that asks for ever"),
        pytest.param(fault(FaultKind.REFUSED), Pause(1.0, 1.0, "what happened"), id="refused"),
        pytest.param(fault(FaultKind.DNS), Pause(1.0, 1.0, "what happened"), id="DNS"),
        pytest.param(fault(FaultKind.CONNECT_TIMEOUT), Pause(1.0, 1.0, "what happened"), id="connect timeout"),
        pytest.param(fault(FaultKind.TLS), Pause(1.0, 1.0, "what happened"), id="TLS"),
        *(
            pytest.param(answer(status), once_more(Failure()), id=str(status))
            for status in (408, 409, 425, 500, 502, 504, 529)
        ),
        pytest.param(fault(FaultKind.OUT_OF_FILES), Again(0.5, 1.0, costs_attempt=False, ours=True), id="out of files"),
        pytest.param(fault(FaultKind.ABORTED), Again(0.0, 0.0, costs_attempt=False), id="given up by us"),
        pytest.param(fault(FaultKind.DISCONNECTED), Lost(DISCONNECTED, hung=False), id="disconnect"),
        pytest.param(fault(FaultKind.PROTOCOL), once_more(GARBLED), id="no HTTP"),
        pytest.param(answer(200, b'{"choices": [{"mess'), once_more(NOT_JSON), id="truncated JSON"),
        pytest.param(answer(200, b""), once_more(NOT_JSON), id="200 with nothing"),
        *(
            pytest.param(fault(kind), Lost(TIMEOUT, hung=True), id=kind.value)
            for kind in (FaultKind.FIRST_BYTE_TIMEOUT, FaultKind.IDLE_TIMEOUT, FaultKind.TOTAL_TIMEOUT)
        ),
        pytest.param(answer(200, error(429)), FREE, id="200 with error 429 in the body"),
        pytest.param(answer(200, error(400)), Failure(status=400), id="200 with error 400 in the body"),
        pytest.param(answer(200, error(503)), Pause(1.0, 1.0, LOADING), id="200 with error 503 in the body"),
        pytest.param(
            answer(200, error("server_error")), once_more(Failure(status=500)), id="200 with a named error in the body"
        ),
        pytest.param(answer(200, error(0)), once_more(Failure(status=500)), id="200 with a code that is no status"),
        pytest.param(answer(200, error(502)), once_more(Failure(status=502)), id="200 with error 502 in the body"),
        pytest.param(
            answer(200, error(401)),
            Pause(1.0, 1.0, "the engine refuses access with status 401", Failure(status=401)),
            id="200 with error 401 in the body",
        ),
        pytest.param(
            answer(200, {"error": "no"}), once_more(Failure(status=500)), id="200 with an error that is a text"
        ),
        pytest.param(answer(200, {"choices": None}), once_more(EMPTY), id="200 with null choices"),
        pytest.param(answer(200, {"choices": []}), once_more(EMPTY), id="200 with no choices"),
        pytest.param(answer(200, []), once_more(EMPTY), id="200 with an array"),
        pytest.param(
            answer(200, {"choices": [{"finish_reason": "abort"}]}), once_more(ABORTED), id="finish_reason abort"
        ),
        pytest.param(
            answer(200, {"choices": [{"finish_reason": "error"}]}), once_more(ABORTED), id="finish_reason error"
        ),
        *(pytest.param(answer(status, error()), Failure(), id=str(status)) for status in (400, 404, 413, 422, 302)),
        *(
            pytest.param(
                answer(status),
                Pause(1.0, 1.0, f"the engine refuses access with status {status}", Failure()),
                id=str(status),
            )
            for status in (401, 403)
        ),
        *(
            pytest.param(
                answer(404, body), Pause(1.0, 1.0, UNKNOWN_MODEL, Failure(), model_only=True), id=f"404 model, {source}"
            )
            for source, body in {
                "OpenAI": error("model_not_found"),
                "vLLM": {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}},
            }.items()
        ),
        pytest.param(answer(404, {"detail": "Not Found"}), Failure(), id="404 of a path"),
        pytest.param(answer(404, b"<html>"), Failure(), id="404 of a gateway"),
        pytest.param(answer(200, OK), Success(Usage()), id="200"),
        pytest.param(answer(201, OK), Success(Usage()), id="201"),
        pytest.param(answer(200, OK | {"error": None}), Success(Usage()), id="200 with a null error"),
        *(pytest.param(answer(200, OK | {"error": no}), Success(Usage()), id=f"200, error {no!r}") for no in ("", {})),
        pytest.param(answer(200, {"error": {"code": "422"}}), Failure(status=422), id="200 with a code that is a text"),
        pytest.param(answer(200, {"choices": [{"finish_reason": "length"}]}), Success(Usage()), id="length"),
        pytest.param(answer(200, {"choices": [{"finish_reason": "content_filter"}]}), Success(Usage()), id="filtered"),
        pytest.param(
            fault(FaultKind.TOO_LARGE),
            Failure("upstream_answer_too_large", "The engine's answer was larger than the limit."),
            id="answer too large",
        ),
    ],
)
def test_a_symptom_has_one_meaning(symptom: Answer | Fault, meaning: Verdict) -> None:
    assert verdict(symptom) == meaning


@pytest.mark.parametrize(
    ("symptom", "attempts", "end"),
    [
        (answer(500), SERVER_ERROR_ATTEMPTS_MAX, Failure()),
        (answer(502), ATTEMPTS_MAX, Failure()),
        (answer(200, error("x")), SERVER_ERROR_ATTEMPTS_MAX, Failure(status=500)),
        (fault(FaultKind.PROTOCOL), ATTEMPTS_MAX, GARBLED),
        (answer(200, b"{"), ATTEMPTS_MAX, NOT_JSON),
        (answer(200, {}), ATTEMPTS_MAX, EMPTY),
        (answer(200, {"choices": [{"finish_reason": "abort"}]}), ATTEMPTS_MAX, ABORTED),
    ],
)
def test_a_line_s_own_failures_use_up_its_attempts(symptom: Answer | Fault, attempts: int, end: Failure) -> None:
    for charged in range(1, attempts):
        again = verdict(symptom, Effort(tries=9, charged=charged))
        assert isinstance(again, Again)
        assert again.costs_attempt
        assert again.or_else == end
    assert verdict(symptom, Effort(tries=9, charged=attempts)) == end


@pytest.mark.parametrize("end", [DISCONNECTED, TIMEOUT])
def test_a_line_that_a_living_engine_lost_is_charged(end: Failure) -> None:
    lost = Lost(end, hung=end is TIMEOUT)
    assert charge(lost, Effort(charged=1)) == once_more(end)
    assert charge(lost, Effort(charged=4)) == Again(0.0, 8.0, costs_attempt=True, or_else=end)
    assert charge(lost, Effort(charged=ATTEMPTS_MAX)) == end


@pytest.mark.parametrize(
    ("of", "end"),
    [
        (answer(500), Failure()),
        (answer(502), Failure()),
        (answer(200, b"{"), NOT_JSON),
        (answer(200, {}), EMPTY),
    ],
)
def test_no_failure_is_the_last_while_another_engine_is_away(of: Answer, end: Failure) -> None:
    spared = Effort(tries=9, charged=ATTEMPTS_MAX, spared=True)
    assert verdict(of, spared) == Again(0.0, 30.0, costs_attempt=False, or_else=end)
    assert charge(Lost(end, hung=False), spared) == Again(0.0, 30.0, costs_attempt=False, or_else=end)


def test_an_engine_without_the_model_is_not_taken_at_its_word_while_another_is_away() -> None:
    found = verdict(answer(404, error("model_not_found")), Effort(absent_s=1e9, spared=True))
    assert isinstance(found, Pause)
    assert found.model_only


@pytest.mark.parametrize(("status", "code", "longest_s"), [(404, "model_not_found", 30.0), (401, "invalid_key", 300.0)])
def test_an_engine_that_goes_on_refusing_is_asked_ever_more_rarely(status: int, code: str, longest_s: float) -> None:
    def wait_s(pauses: int) -> float:
        found = verdict(answer(status, error(code)), Effort(pauses=pauses))
        assert isinstance(found, Pause)
        return found.wait_s_max

    assert [wait_s(pauses) for pauses in range(5)] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert wait_s(1000) == longest_s


def test_an_unknown_model_is_waited_for_and_then_given_up() -> None:
    unknown, patience = answer(404, error("model_not_found")), Patience(model_grace_s=600)
    assert isinstance(judge(unknown, CHAT, Effort(absent_s=599), NOW, patience), Pause)
    assert judge(unknown, CHAT, Effort(absent_s=600), NOW, patience) == Failure()
    assert judge(unknown, CHAT, Effort(), NOW, Patience(model_grace_s=0)) == Failure()


@pytest.mark.parametrize(
    "symptom",
    [
        *(answer(status) for status in (429, 500, 502, 503, 504, 520, 529)),
        fault(FaultKind.CONNECT_TIMEOUT),
        fault(FaultKind.DISCONNECTED),
        fault(FaultKind.IDLE_TIMEOUT),
        fault(FaultKind.OUT_OF_FILES),
    ],
)
def test_some_symptoms_show_overload(symptom: Answer | Fault) -> None:
    assert shows_overload(symptom)


@pytest.mark.parametrize("symptom", [*(answer(status) for status in (200, 400, 403)), fault(FaultKind.REFUSED)])
def test_others_do_not(symptom: Answer | Fault) -> None:
    assert not shows_overload(symptom)


@pytest.mark.parametrize("status", [401, 403])
def test_an_engine_is_left_alone_the_longer_the_more_lines_it_refuses_in_a_row(status: int) -> None:
    for pauses, wait_s in [(0, 1.0), (1, 2.0), (8, 256.0), (9, 300.0), (10**6, 300.0)]:
        found = verdict(answer(status), Effort(pauses=pauses))
        assert isinstance(found, Pause)
        assert (found.wait_s_min, found.wait_s_max) == (wait_s, wait_s)


@pytest.mark.parametrize("symptom", [answer(429), answer(503), answer(401), fault(FaultKind.REFUSED)])
def test_an_engine_s_own_trouble_never_ends_a_line(symptom: Answer | Fault) -> None:
    for count in (1, 10, 100_000):
        assert not isinstance(verdict(symptom, Effort(count, count, count)), Failure)


def test_waits_double_up_to_their_bound_however_long_it_goes_on() -> None:
    assert [backoff(attempt)[1] for attempt in (1, 2, 3, 6, 7, 8, 5000)] == [1, 2, 4, 32, 60, 60, 60]
    loading = [verdict(answer(503), Effort(pauses=pauses)) for pauses in (0, 1, 4, 5, 5000)]
    assert [pause[:2] for pause in loading] == [(1, 1), (1, 2), (1, 16), (1, 30), (1, 30)]
    assert verdict(answer(429), Effort(tries=5000)) == Again(0.0, 60.0, costs_attempt=False)
    assert verdict(answer(502), Effort(charged=4)) == Again(0.0, 8.0, costs_attempt=True, or_else=Failure())


# How long to wait


@pytest.mark.parametrize(
    ("header", "value", "seconds"),
    [
        ("retry-after", "0", 0.0),
        ("retry-after", "120", 120.0),
        ("retry-after", "1.5", 1.5),
        ("retry-after", "Sun, 09 Sep 2001 01:47:40 GMT", 60.0),
        ("retry-after", "Sun, 09 Sep 2001 03:46:40 +0200", 0.0),
        ("retry-after", "Sun, 09 Sep 2001 01:00:00 GMT", 0.0),
        ("retry-after-ms", "250", 0.25),
        ("x-ratelimit-reset-requests", "6m0s", 360.0),
        ("x-ratelimit-reset-requests", "1.5s", 1.5),
        ("x-ratelimit-reset-tokens", "20ms", 0.02),
        ("x-ratelimit-reset-tokens", "1h2m3s4ms", 3723.004),
        ("x-ratelimit-reset-tokens", "12", 12.0),
    ],
)
def test_an_engine_says_in_many_ways_how_long_to_wait(header: str, value: str, seconds: float) -> None:
    assert retry_after({header.encode(): value.encode()}, NOW) == pytest.approx(seconds)


def test_a_date_is_read_against_the_clock_that_wrote_it() -> None:
    headers = {b"retry-after": b"Sun, 09 Sep 2001 01:47:40 GMT", b"date": b"Sun, 09 Sep 2001 01:47:10 GMT"}
    assert retry_after(headers, NOW - 86_400) == 30.0


def test_only_a_limit_that_is_used_up_holds_up() -> None:
    headers = {
        b"x-ratelimit-remaining-requests": b"12",
        b"x-ratelimit-reset-requests": b"9s",
        b"x-ratelimit-remaining-tokens": b"0",
        b"x-ratelimit-reset-tokens": b"2s",
    }
    assert retry_after(headers, NOW) == 2.0
    assert retry_after(headers | {b"x-ratelimit-remaining-requests": b"0"}, NOW) == 9.0


def test_the_most_exact_header_counts() -> None:
    headers = {b"retry-after": b"2", b"retry-after-ms": b"1500", b"x-ratelimit-reset-requests": b"9s"}
    assert retry_after(headers, NOW) == 1.5
    assert retry_after({b"x-ratelimit-reset-requests": b"soon", b"x-ratelimit-reset-tokens": b"2s"}, NOW) == 2.0


@pytest.mark.parametrize("header", ["retry-after", "retry-after-ms", "x-ratelimit-reset-requests"])
@pytest.mark.parametrize(
    "value",
    [
        *["", " ", "soon", "-5", "nan", "inf", "-inf", "1.2.3s", "s", "5x", "5 parsecs", "\x00", "é", "9" * 5000 + "x"],
        "Mon, 99999999999999999999 Jan 2026 00:00:00 GMT",
        "Thu, 01 Jan 2026 00:00:00 +99999999999999999",
    ],
)
def test_garbage_says_nothing_about_how_long_to_wait(header: str, value: str) -> None:
    assert retry_after({header.encode(): value.encode("latin-1")}, NOW) is None


@given(st.binary(max_size=30) | st.from_regex(rb"[A-Z][a-z]{2}, \d{1,25} Jan \d{1,12} \d\d:\d\d:\d\d [+-]?\d{1,9}"))
def test_no_header_whatever_breaks_the_judge(value: bytes) -> None:
    for name in (b"retry-after", b"retry-after-ms", b"x-ratelimit-reset-tokens"):
        assert judge(Answer(429, {name: value}, b""), CHAT, Effort(), NOW)


# Tokens


@pytest.mark.parametrize(
    ("endpoint", "body", "usage"),
    [
        (
            Endpoint.CHAT_COMPLETIONS,
            OK
            | {
                "usage": {
                    "prompt_tokens": 10,
                    "completion_tokens": 20,
                    "prompt_tokens_details": {"cached_tokens": 4},
                    "completion_tokens_details": {"reasoning_tokens": 5},
                }
            },
            Usage(10, 4, 20, 5),
        ),
        (
            Endpoint.COMPLETIONS,
            OK | {"usage": {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": None}},
            Usage(1, 0, 2, 0),
        ),
        (Endpoint.EMBEDDINGS, {"data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}}, Usage(8, 0, 0, 0)),
        (
            Endpoint.RESPONSES,
            {
                "output": [],
                "error": None,
                "usage": {
                    "input_tokens": 7,
                    "output_tokens": 6,
                    "input_tokens_details": {"cached_tokens": 3},
                    "output_tokens_details": {"reasoning_tokens": 2},
                },
            },
            Usage(7, 3, 6, 2),
        ),
        (Endpoint.RESPONSES, {"output": []}, Usage()),
    ],
)
def test_tokens_are_read_from_each_endpoint_s_own_fields(
    endpoint: Endpoint, body: dict[str, Any], usage: Usage
) -> None:
    assert verdict(answer(200, body), endpoint=endpoint) == Success(usage)


# Answers that are odd, or hostile


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (5, Usage()),
        ("many", Usage()),
        ([], Usage()),
        ({"prompt_tokens": "many"}, Usage()),
        ({"prompt_tokens": -1}, Usage()),
        ({"prompt_tokens": 1e300}, Usage()),
        ({"prompt_tokens": TOKENS_MAX + 1}, Usage()),
        ({"prompt_tokens": 10**40}, Usage()),
        ({"prompt_tokens": 3, "prompt_tokens_details": 5}, Usage()),
        ({"prompt_tokens": 12.0}, Usage(12)),
        ({"prompt_tokens": TOKENS_MAX}, Usage(TOKENS_MAX)),
    ],
)
def test_an_answer_with_an_odd_usage_stands(usage: object, counted: Usage) -> None:
    assert verdict(answer(200, OK | {"usage": usage})) == Success(counted)


@pytest.mark.parametrize(
    "choices", ["x", 3, {"a": 1}, [1], ["x"], [None], [{"finish_reason": 3}], [{"finish_reason": {"type": "stop"}}]]
)
def test_an_answer_with_odd_choices_stands(choices: object) -> None:
    usage = {"prompt_tokens": 2}
    assert verdict(answer(200, {"choices": choices, "usage": usage})) == Success(Usage(2))


def test_a_number_that_no_decoder_holds_does_not_spoil_an_answer() -> None:
    body = b'{"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 1e400}}'
    assert verdict(Answer(200, {}, body)) == Success(Usage())


def test_one_odd_part_does_not_hide_what_another_says() -> None:
    broken_off = {"usage": 5, "choices": [{"finish_reason": 3}, {"finish_reason": "abort"}]}
    assert verdict(answer(200, broken_off)) == once_more(ABORTED)
    assert verdict(answer(200, {"usage": 5, "choices": []})) == once_more(EMPTY)
    assert verdict(answer(200, {"usage": 5, **error(400)})) == Failure(status=400)
    assert verdict(answer(200, b'{"usage": 5, "choices": [{}], "text": "cut o')) == once_more(NOT_JSON)
    assert verdict(answer(429, error("insufficient_quota", type=5))) == QUOTA


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"[" * 100_000, b'{"a":' * 100_000, b'"\x00"', b"01"])
def test_what_is_no_json_was_cut_off(text: bytes) -> None:
    assert verdict(answer(200, b'{"choices": [{}], "x": ' + text + b"}")) == once_more(NOT_JSON)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["abort", 429]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["usage", "choices", "error", "code", "type", "finish_reason", "prompt_tokens"]), inner
        )
    ),
    max_leaves=8,
)


@given(nested.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30), st.integers(100, 599))
def test_no_body_whatever_breaks_the_judge(body: bytes, status: int) -> None:
    for endpoint in Endpoint:
        for some in (200, status):
            found = judge(Answer(some, {}, body), endpoint, Effort(), NOW)
            if isinstance(found, Success):
                assert all(0 <= count <= TOKENS_MAX for count in (found.usage.input_tokens, found.usage.output_tokens))
