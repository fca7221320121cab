"""What both embedded engines promise on the wire, with the built-in model: one process an engine for all tests."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import jsonschema
import psutil
import pytest

from pronghorn.domain.model import Endpoint
from pronghorn.engines.base import Engine
from pronghorn.engines.llamacpp import LlamaCppEngine
from pronghorn.engines.openvino.engine import OpenVinoEngine
from pronghorn.settings import LlamaCppSettings, OpenVinoSettings

CONTEXT_TOKENS = 512
SLOTS = 4
MESSAGES = [{"role": "user", "content": "Name three colours."}]
CHAT = "/chat/completions"


class Wire:
    """A client of one engine."""

    def __init__(self, base_url: str, name: str) -> None:
        self.name = name
        self.root = base_url.removesuffix("/v1")
        self._http = httpx2.Client(base_url=base_url, timeout=100, limits=httpx2.Limits(max_keepalive_connections=0))

    def close(self) -> None:
        self._http.close()

    def post(self, path: str, **fields: Any) -> httpx2.Response:
        return self._http.post(path, content=json.dumps({"model": "your-model"} | fields))

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        answer = self.post(path, **fields)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def text(self, **fields: Any) -> str:
        text = self.ask(CHAT, messages=MESSAGES, temperature=0, **fields)["choices"][0]["message"]["content"]
        assert isinstance(text, str)
        return text

    def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        answer = self.post(path, stream=True, **fields)
        assert answer.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        return [json.loads(one) for one in data if one != "[DONE]"]

    def raw(self, method: str, path: str, content: bytes = b"") -> httpx2.Response:
        return self._http.request(method, path, content=content)

    def streaming(self, **fields: Any) -> Any:
        return self._http.stream("POST", CHAT, content=json.dumps(fields | {"stream": True}))


@pytest.fixture(scope="module", params=["llama.cpp", "openvino"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    fields = {"slots": SLOTS, "context_tokens": CONTEXT_TOKENS, "threads": 1}
    engine: Engine = (
        LlamaCppEngine(LlamaCppSettings(**fields))
        if request.param == "llama.cpp"
        else OpenVinoEngine(OpenVinoSettings(**fields))
    )
    with asyncio.Runner() as runner:
        runner.run(engine.start(lambda: None))
        [replica] = [one for one in engine.replicas() if Endpoint.CHAT_COMPLETIONS in one.endpoints]
        wire = Wire(replica.base_url, request.param)
        yield wire
        wire.close()
        runner.run(engine.stop())


def test_a_greedy_answer_is_the_same_again_and_is_counted(wire: Wire) -> None:
    first, second = (wire.ask(CHAT, messages=MESSAGES, temperature=0, max_tokens=12) for _ in range(2))
    assert first["choices"][0]["message"] == second["choices"][0]["message"]
    assert first["choices"][0]["message"]["content"]
    assert first["choices"][0]["finish_reason"] in ("length", "stop")
    assert first["usage"]["prompt_tokens"] == 34
    assert first["usage"]["completion_tokens"] <= 12


def test_the_longest_answer_is_kept_to(wire: Wire) -> None:
    answer = wire.ask(CHAT, messages=MESSAGES, max_tokens=3, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_ends_the_text_to_the_character(wire: Wire) -> None:
    whole = wire.text(max_tokens=12)
    stop = whole[4:7]
    answer = wire.ask(CHAT, messages=MESSAGES, temperature=0, max_tokens=12, stop=["never", stop])
    assert answer["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_streamed_chat_is_the_whole_one_in_pieces(wire: Wire) -> None:
    events = wire.events(CHAT, messages=MESSAGES, temperature=0, max_tokens=12, stream_options={"include_usage": True})
    choices = [choice for event in events for choice in event["choices"]]
    pieces = [choice["delta"].get("content") or "" for choice in choices]
    assert "".join(pieces) == wire.text(max_tokens=12)
    assert len([piece for piece in pieces if piece]) > 2
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] in (["length"], ["stop"])
    assert events[-1]["usage"]["prompt_tokens"] == 34


def test_several_choices(wire: Wire) -> None:
    answer = wire.ask(CHAT, messages=MESSAGES, n=3, seed=1, max_tokens=8, temperature=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1


def test_a_seed_repeats_an_answer(wire: Wire) -> None:
    def drawn(seed: int) -> str:
        answer = wire.ask(CHAT, messages=MESSAGES, seed=seed, max_tokens=8, temperature=1.5)
        return str(answer["choices"][0]["message"]["content"])

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_an_answer_keeps_to_a_schema(wire: Wire) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = wire.ask(CHAT, messages=MESSAGES, temperature=0, max_tokens=60, response_format=format_)
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), schema)


def test_log_probabilities_of_the_tokens(wire: Wire) -> None:
    answer = wire.ask(CHAT, messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=1)
    [choice] = answer["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    assert all(token["logprob"] <= 0 and token["top_logprobs"][0]["token"] == token["token"] for token in tokens)
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == choice["message"]["content"]


def test_completions_of_several_prompts(wire: Wire) -> None:
    prompts = ["Once upon a time", "The capital of France is"]
    together = wire.ask("/completions", prompt=prompts, temperature=0, max_tokens=6)
    assert [choice["index"] for choice in together["choices"]] == [0, 1]
    assert all(choice["text"] for choice in together["choices"])


def test_a_response_and_its_events(wire: Wire) -> None:
    fields = {"input": "Name three colours.", "max_output_tokens": 8, "temperature": 0}
    whole = wire.ask("/responses", **fields)
    [item] = whole["output"]
    text = item["content"][0]["text"]
    assert text
    events = wire.events("/responses", **fields)
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == text
    assert events[0]["type"] == "response.created"
    assert events[-1]["response"]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_a_prompt_that_does_not_fit_is_refused(wire: Wire) -> None:
    refused = wire.post(CHAT, messages=[{"role": "user", "content": "word " * CONTEXT_TOKENS}])
    assert refused.status_code == 400
    assert "context" in refused.text


def test_an_answer_that_reaches_the_end_of_the_context_is_cut(wire: Wire) -> None:
    messages = [{"role": "user", "content": "word " * (CONTEXT_TOKENS - 50)}]
    answer = wire.ask(CHAT, messages=messages, max_tokens=400, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] <= CONTEXT_TOKENS


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"messages": 1}', b"\xff\xfe", b"{}"])
def test_a_bad_body_is_refused_in_the_envelope_and_harms_nothing(wire: Wire, content: bytes) -> None:
    refused = wire.raw("POST", CHAT, content)
    assert 400 <= refused.status_code <= 500
    assert refused.json()["error"]["message"]
    if wire.name == "openvino":
        assert refused.status_code == 400
    assert wire.text(max_tokens=2)


def test_more_lines_than_slots_are_all_answered(wire: Wire) -> None:
    lines = 4 * SLOTS
    with ThreadPoolExecutor(lines) as pool:
        asked = [pool.submit(wire.ask, "/completions", prompt=f"Line {n}:", max_tokens=4) for n in range(lines)]
        assert all(one.result()["choices"][0]["finish_reason"] for one in asked)


def test_the_model_is_listed(wire: Wire) -> None:
    assert "smollm2-135m" in [model["id"] for model in wire.raw("GET", "/models").json()["data"]]


# What only the openvino engine does this way

only_openvino = pytest.mark.parametrize("wire", ["openvino"], indirect=True)


@only_openvino
@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "(["}])
def test_a_schema_that_cannot_be_followed_is_refused_and_harms_nothing(wire: Wire, schema: dict[str, Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(wire.text, max_tokens=100, ignore_eos=True)
        format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        refused = wire.post(CHAT, messages=MESSAGES, response_format=format_)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
        assert "time or memory" not in refused.text, "it was read, and found wrong"
        assert beside.result()


@only_openvino
@pytest.mark.parametrize("prompt", ["", [1, 10_000_000], [-1], [], [[]]])
def test_a_prompt_that_is_none_is_refused(wire: Wire, prompt: object) -> None:
    refused = wire.post("/completions", prompt=prompt)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


@only_openvino
def test_more_choices_than_slots_are_refused(wire: Wire) -> None:
    assert wire.post(CHAT, messages=MESSAGES, n=SLOTS + 1).status_code == 400
    greedy = wire.ask(CHAT, messages=MESSAGES, n=SLOTS, temperature=0, max_tokens=3)
    assert len({choice["message"]["content"] for choice in greedy["choices"]}) == 1


@only_openvino
def test_an_answer_that_nobody_waits_for_ends(wire: Wire) -> None:
    with wire.streaming(messages=MESSAGES, max_tokens=450, ignore_eos=True, temperature=0) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        assert sum(gauges(wire)) == 1
    while gauges(wire) != (0, 0):  # at the latest when the answer is whole, and then the time limit strikes
        pass


@only_openvino
def test_no_thread_is_tied_to_a_core_on_which_those_of_other_processes_wait(wire: Wire) -> None:
    [child] = [one for one in psutil.Process().children() if "pronghorn.engines.openvino.child" in one.cmdline()]
    with wire.streaming(messages=MESSAGES, max_tokens=200, ignore_eos=True, temperature=0) as answer:
        for _ in answer.iter_lines():  # it computes between one line and the next
            cores = {frozenset(os.sched_getaffinity(thread.id)) for thread in child.threads()}
            assert cores == {frozenset(os.sched_getaffinity(0))}


def gauges(wire: Wire) -> tuple[int, int]:
    lines = wire.raw("GET", f"{wire.root}/metrics").text.split()
    return int(lines[1]), int(lines[3])
