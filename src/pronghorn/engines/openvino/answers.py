"""What goes out: the bodies and the events of the three endpoints, in OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import msgspec

Json = dict[str, Any]


class Choice(NamedTuple):
    """One finished answer: its text, why it ended, and what each token added to it with its log-probability."""

    text: str
    finish_reason: str
    tokens: tuple[tuple[str, float], ...] | None


class Count(NamedTuple):
    """Tokens read and written."""

    prompt: int
    completion: int


class Shape(Protocol):
    """How one endpoint puts things; made anew for each request."""

    def body(self, choices: list[Choice], count: Count) -> Json:
        """Return a whole answer."""
        ...

    def opening(self) -> Iterator[bytes]:
        """Return the events before the first text."""
        ...

    def delta(self, index: int, text: str, tokens: tuple[tuple[str, float], ...] | None) -> Iterator[bytes]:
        """Return the events that carry more text of a choice."""
        ...

    def closing(self, choices: list[Choice], count: Count, *, usage: bool) -> Iterator[bytes]:
        """Return the events after the last text."""
        ...


class ChatShape:
    """/v1/chat/completions"""

    def __init__(self, model: str, top_logprobs: int) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._top = top_logprobs

    def body(self, choices: list[Choice], count: Count) -> Json:
        return self._head | {
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.tokens),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": _usage(count),
        }

    def opening(self) -> Iterator[bytes]:
        yield from ()

    def delta(self, index: int, text: str, tokens: tuple[tuple[str, float], ...] | None) -> Iterator[bytes]:
        delta = {"role": "assistant", "content": text}
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": None}
        yield self._event([choice])

    def closing(self, choices: list[Choice], count: Count, *, usage: bool) -> Iterator[bytes]:
        for index, choice in enumerate(choices):
            yield self._event([{"index": index, "delta": {}, "finish_reason": choice.finish_reason}])
        if usage:
            yield self._event([], usage=_usage(count))
        yield _DONE

    def _event(self, choices: list[Json], **more: Json) -> bytes:
        return _event(self._head | {"object": "chat.completion.chunk", "choices": choices} | more)

    def _logprobs(self, tokens: tuple[tuple[str, float], ...] | None) -> Json | None:
        if tokens is None:
            return None
        found = [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in tokens]
        return {"content": [one | {"top_logprobs": [one] * self._top} for one in found], "refusal": None}


class CompletionShape:
    """/v1/completions"""

    def __init__(self, model: str, top_logprobs: int) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._top = top_logprobs

    def body(self, choices: list[Choice], count: Count) -> Json:
        return self._head | {
            "choices": [
                {
                    "index": index,
                    "text": choice.text,
                    "logprobs": self._logprobs(choice.tokens),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": _usage(count),
        }

    def opening(self) -> Iterator[bytes]:
        yield from ()

    def delta(self, index: int, text: str, tokens: tuple[tuple[str, float], ...] | None) -> Iterator[bytes]:
        choice = {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": None}
        yield _event(self._head | {"choices": [choice]})

    def closing(self, choices: list[Choice], count: Count, *, usage: bool) -> Iterator[bytes]:
        for index, choice in enumerate(choices):
            ended = {"index": index, "text": "", "logprobs": None, "finish_reason": choice.finish_reason}
            yield _event(self._head | {"choices": [ended]})
        if usage:
            yield _event(self._head | {"choices": [], "usage": _usage(count)})
        yield _DONE

    def _logprobs(self, tokens: tuple[tuple[str, float], ...] | None) -> Json | None:
        if tokens is None:
            return None
        starts, place = [], 0
        for text, _ in tokens:
            starts.append(place)
            place += len(text)
        return {
            "tokens": [text for text, _ in tokens],
            "token_logprobs": [value for _, value in tokens],
            "top_logprobs": [{text: value} for text, value in tokens] if self._top else None,
            "text_offset": starts,
        }


class ResponseShape:
    """/v1/responses"""

    def __init__(self, model: str) -> None:
        self._id = f"resp_{uuid.uuid4().hex}"
        self._item = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._number = 0

    def body(self, choices: list[Choice], count: Count) -> Json:
        [choice] = choices
        cut = choice.finish_reason == "length"
        return self._response(
            "incomplete" if cut else "completed",
            output=[self._message("incomplete" if cut else "completed", [_output_text(choice.text)])],
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage={
                "input_tokens": count.prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": count.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": sum(count),
            },
        )

    def opening(self) -> Iterator[bytes]:
        begun = self._response("in_progress", output=[], incomplete_details=None, usage=None)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("response.content_part.added", **self._place(), part=_output_text(""))

    def delta(self, index: int, text: str, tokens: tuple[tuple[str, float], ...] | None) -> Iterator[bytes]:
        yield self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def closing(self, choices: list[Choice], count: Count, *, usage: bool) -> Iterator[bytes]:
        whole = self.body(choices, count)
        [item] = whole["output"]
        [part] = item["content"]
        yield self._event("response.output_text.done", **self._place(), text=part["text"], logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _response(self, status: str, **fields: Any) -> Json:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "instructions": None,
            "metadata": {},
            "model": self._model,
            "parallel_tool_calls": False,
            "temperature": None,
            "tool_choice": "none",
            "tools": [],
            "top_p": None,
        } | fields

    def _message(self, status: str, content: list[Json]) -> Json:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _place(self) -> Json:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return f"event: {kind}\n".encode() + _event({"type": kind, "sequence_number": number} | fields)


def _usage(count: Count) -> Json:
    return {"prompt_tokens": count.prompt, "completion_tokens": count.completion, "total_tokens": sum(count)}


def _output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _event(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


_DONE = b"data: [DONE]\n\n"
