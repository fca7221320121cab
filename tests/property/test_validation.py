"""The fast check of a line and the slow explanation never disagree."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from pronghorn.domain.model import Endpoint
from pronghorn.domain.validation import Rules, check_line, explain
from pronghorn.worker.shard_run import decode_line

RULES = Rules(Endpoint.CHAT_COMPLETIONS, lambda model: model == "m")
AT_A_LOSS = "This line is not acceptable."

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["m", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def mostly(value: Any) -> st.SearchStrategy[Any]:
    return st.just(value) | st.just(value) | anything


bodies = st.fixed_dictionaries(
    {}, optional={"model": mostly("m"), "messages": mostly([]), "stream": mostly(None), "temperature": anything}
)
lines = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": mostly("a"),
        "method": mostly("POST"),
        "url": mostly("/v1/chat/completions"),
        "body": bodies | anything,
    },
)


@given(lines.map(lambda line: json.dumps(line).encode()) | anything.map(lambda v: json.dumps(v).encode()))
@example(b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[]}}')
@example(
    b'{"custom_id":1,"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":1}}'
)
def test_a_line_is_refused_exactly_when_something_can_be_said_against_it(raw: bytes) -> None:
    refused = check_line(raw, RULES) is None
    said = [problem.message for problem in explain(raw, 1, RULES)]
    assert (said != [AT_A_LOSS]) == refused
    assert all(message.encode() for message in said)
    if not refused:
        decode_line(raw)  # what a worker does with it must not fail


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_no_bytes_whatever_are_accepted_or_break_the_check(raw: bytes) -> None:
    assert check_line(raw, RULES) is None
    [problem] = explain(raw, 1, RULES)[:1]
    assert problem.message != AT_A_LOSS
