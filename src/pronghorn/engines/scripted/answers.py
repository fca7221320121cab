"""What a line is answered: a pure function of the request's body, in the shapes OpenAI's API returns."""

from __future__ import annotations

import base64
import hashlib
from array import array
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec

from pronghorn.engines.scripted.requests import Endpoint, word_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from pronghorn.engines.scripted.requests import Asked

ECHO_CHARS_MAX = 200
"""Prompt characters that an answer repeats, so that a long prompt does not make a long answer."""

CREATED_S = 1_700_000_000
"""The time in every answer, fixed so that the same body always gets the same bytes."""

_PADDING = " and on it goes"
_STREAM_PIECES = 3


class Finish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"
    ABORT = "abort"


class Style(msgspec.Struct, frozen=True):
    """How answers are made: text padding in bytes and in words, embedding length, and why the answer ended."""

    answer_bytes: int | None = None
    tokens_min: int = 0
    embedding_dimensions: int = 8
    finish: Finish = Finish.STOP


class Answer(msgspec.Struct, frozen=True):
    """An answer: its JSON document, or the documents of its stream, and its size in output tokens."""

    document: dict[str, Any]
    events: list[dict[str, Any]] | None
    output_tokens: int


def compose(endpoint: Endpoint, asked: Asked, key: str, style: Style) -> Answer:
    """Answer a request; `key` is its body's SHA-256 in hex."""
    return _COMPOSERS[endpoint](asked, key[:16], style)


def echo(key: str, text: str) -> str:
    """Return the text that answers `text` in a body with this SHA-256 in hex, before any padding."""
    return f"echo {key[:16]}: {text[:ECHO_CHARS_MAX]}"


def _answer_text(key: str, text: str, style: Style) -> str:
    answer = echo(key, text)
    if style.tokens_min and (missing := style.tokens_min - word_count(answer)) > 0:
        answer += " on" * missing
    if style.answer_bytes and (missing := style.answer_bytes - len(answer.encode())) > 0:
        answer += (_PADDING * (missing // len(_PADDING) + 1))[:missing]
    return answer


def _choice_texts(asked: Asked, key: str, style: Style) -> list[str]:
    texts = [_answer_text(key, text, style) for text in asked.texts]
    if asked.choices_per_text == 1:
        return texts
    return [text for text in texts for _ in range(asked.choices_per_text)]


def _usage(prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _compose_chat(asked: Asked, key: str, style: Style) -> Answer:
    texts = _choice_texts(asked, key, style)
    tokens = sum(map(word_count, texts))
    document = {
        "id": f"chatcmpl-{key}",
        "object": "chat.completion",
        "created": CREATED_S,
        "model": asked.model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": style.finish,
            }
            for index, text in enumerate(texts)
        ],
        "usage": _usage(asked.prompt_tokens, tokens),
        "service_tier": "default",
        "system_fingerprint": "fp_scripted",
    }
    return Answer(document, _chat_events(document, texts, asked) if asked.stream else None, tokens)


def _compose_completion(asked: Asked, key: str, style: Style) -> Answer:
    texts = _choice_texts(asked, key, style)
    tokens = sum(map(word_count, texts))
    document = {
        "id": f"cmpl-{key}",
        "object": "text_completion",
        "created": CREATED_S,
        "model": asked.model,
        "choices": [
            {"index": index, "text": text, "logprobs": None, "finish_reason": style.finish}
            for index, text in enumerate(texts)
        ],
        "usage": _usage(asked.prompt_tokens, tokens),
        "system_fingerprint": "fp_scripted",
    }
    return Answer(document, _completion_events(document, texts, asked) if asked.stream else None, tokens)


def _compose_embedding(asked: Asked, key: str, style: Style) -> Answer:
    dimensions = asked.dimensions or style.embedding_dimensions
    vectors = [_vector(text, dimensions) for text in asked.texts]
    document = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode() if asked.base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ],
        "model": asked.model,
        "usage": {"prompt_tokens": asked.prompt_tokens, "total_tokens": asked.prompt_tokens},
    }
    return Answer(document, None, 0)


# A response has no finish reason: its status says how it ended.
_RESPONSE_ENDINGS: dict[Finish, tuple[str, dict[str, str] | None]] = {
    Finish.STOP: ("completed", None),
    Finish.LENGTH: ("incomplete", {"reason": "max_output_tokens"}),
    Finish.CONTENT_FILTER: ("incomplete", {"reason": "content_filter"}),
    Finish.ABORT: ("cancelled", None),
}


def _compose_response(asked: Asked, key: str, style: Style) -> Answer:
    text = _answer_text(key, asked.texts[0], style)
    tokens = word_count(text)
    status, incomplete = _RESPONSE_ENDINGS[style.finish]
    content = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    document = {
        "id": f"resp_{key}",
        "object": "response",
        "created_at": CREATED_S,
        "status": status,
        "error": None,
        "incomplete_details": incomplete,
        "instructions": None,
        "metadata": {},
        "model": asked.model,
        "output": [
            {
                "id": f"msg_{key}",
                "type": "message",
                "status": "completed" if status == "completed" else "incomplete",
                "role": "assistant",
                "content": [content],
            }
        ],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": {
            "input_tokens": asked.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": asked.prompt_tokens + tokens,
        },
    }
    return Answer(document, None, tokens)


def _vector(text: str, dimensions: int) -> array[float]:
    """Return a vector of length one, drawn from the text's hash."""
    raw = array("h", hashlib.shake_256(text.encode()).digest(2 * dimensions))
    norm = sum(value * value for value in raw) ** 0.5 or 1.0
    return array("f", [value / norm for value in raw])


# Streaming


def _pieces(text: str) -> list[str]:
    size = max(1, -(-len(text) // _STREAM_PIECES))
    return [text[at : at + size] for at in range(0, len(text), size)]


def _chat_events(document: dict[str, Any], texts: list[str], asked: Asked) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = []
    for whole, text in zip(document["choices"], texts, strict=True):
        deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in _pieces(text)), {}]
        of_text = [{**_open_choice(whole["index"]), "delta": delta} for delta in deltas]
        of_text[-1]["finish_reason"] = whole["finish_reason"]
        choices += of_text
    return _events(document, "chat.completion.chunk", choices, asked)


def _completion_events(document: dict[str, Any], texts: list[str], asked: Asked) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = []
    for whole, text in zip(document["choices"], texts, strict=True):
        of_text = [{**_open_choice(whole["index"]), "text": piece} for piece in _pieces(text)]
        of_text[-1]["finish_reason"] = whole["finish_reason"]
        choices += of_text
    return _events(document, "text_completion", choices, asked)


def _open_choice(index: int) -> dict[str, Any]:
    return {"index": index, "logprobs": None, "finish_reason": None}


def _events(document: dict[str, Any], kind: str, choices: list[dict[str, Any]], asked: Asked) -> list[dict[str, Any]]:
    frame = {name: document[name] for name in ("id", "created", "model", "system_fingerprint")}
    frame["object"] = kind
    if not asked.include_usage:
        return [{**frame, "choices": [choice]} for choice in choices]
    events = [{**frame, "choices": [choice], "usage": None} for choice in choices]
    return [*events, {**frame, "choices": [], "usage": document["usage"]}]


_COMPOSERS: dict[Endpoint, Callable[[Asked, str, Style], Answer]] = {
    Endpoint.CHAT: _compose_chat,
    Endpoint.COMPLETIONS: _compose_completion,
    Endpoint.EMBEDDINGS: _compose_embedding,
    Endpoint.RESPONSES: _compose_response,
}
