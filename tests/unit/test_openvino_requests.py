"""What a body asks of the openvino engine, and which bodies it refuses, naming what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pronghorn.engines.openvino import requests
from pronghorn.errors import InvalidRequest

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> tuple[list[requests.Message], requests.Settings]:
    return requests.chat(json.dumps({"messages": MESSAGES} | fields).encode())


def test_content_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages, _ = chat(messages=[{"role": "developer", "content": parts}])
    assert [(message.role, message.content) for message in messages] == [("system", "ab")]


def test_the_newer_name_of_the_longest_answer_wins() -> None:
    assert chat(max_tokens=5)[1].tokens_max == 5
    assert chat(max_tokens=5, max_completion_tokens=6)[1].tokens_max == 6
    assert chat()[1].tokens_max is None


def test_nothing_but_temperature_zero_and_one_candidate_is_greedy() -> None:
    assert chat(temperature=0)[1].greedy
    assert chat(top_k=1)[1].greedy
    assert not chat()[1].greedy


@pytest.mark.parametrize(
    ("format_", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}, {"type": "array"}),
    ],
)
def test_formats(format_: dict[str, Any], schema: object) -> None:
    found = chat(response_format=format_)[1].schema
    assert (json.loads(found) if found else None) == schema


@pytest.mark.parametrize(
    ("prompt", "prompts"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], "a"], [[1], "a"])]
)
def test_prompts(prompt: object, prompts: object) -> None:
    assert requests.completion(json.dumps({"prompt": prompt}).encode())[0] == prompts


def test_a_response_begins_with_its_instructions() -> None:
    body = {"instructions": "Be brief", "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}
    messages, _ = requests.response(json.dumps(body).encode())
    assert [(message.role, message.content) for message in messages] == [("system", "Be brief"), ("user", "hi")]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "x"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"tools": [{}]}, "tools"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 2, "temperature": 0}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1}, "top_logprobs"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages":' + b"[" * 100_000])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    for read in (requests.chat, requests.completion, requests.response):
        with pytest.raises(InvalidRequest):
            read(body)
