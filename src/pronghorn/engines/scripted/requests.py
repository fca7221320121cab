"""What a line asks for: the body of each endpoint, read as far as an answer needs it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Endpoint(StrEnum):
    """The endpoints that answer lines."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"


class InvalidBody(ValueError):
    """The body is not a request that the endpoint can serve; `param` names the field where one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class _Part(msgspec.Struct):
    text: str | None = None


class _Message(msgspec.Struct):
    role: str = "user"
    content: str | list[_Part] | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Generation(msgspec.Struct, kw_only=True):
    model: str
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _Chat(_Generation, kw_only=True):
    messages: Annotated[list[_Message], Meta(min_length=1)]


class _Completion(_Generation, kw_only=True):
    prompt: str | Annotated[list[Any], Meta(min_length=1)]


class _Embedding(msgspec.Struct, kw_only=True):
    model: str
    input: str | Annotated[list[Any], Meta(min_length=1)]
    dimensions: Annotated[int, Meta(ge=1, le=8192)] | None = None
    encoding_format: Literal["float", "base64"] | None = None


class _Response(_Generation, kw_only=True):
    input: str | Annotated[list[_Message], Meta(min_length=1)]
    instructions: str | None = None


class Asked(msgspec.Struct):
    """A request as the answers need it: one text to answer a choice, and how to shape the whole."""

    model: str
    texts: list[str]
    prompt_tokens: int
    choices_per_text: int = 1
    stream: bool = False
    include_usage: bool = False
    dimensions: int | None = None
    base64: bool = False


def parse(endpoint: Endpoint, body: bytes) -> Asked:
    """Read a request's body; raises InvalidBody."""
    try:
        return _PARSERS[endpoint](body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidBody(str(error), _field_in(str(error))) from None


def _field_in(message: str) -> str | None:
    _, found, path = message.partition("`$.")
    return path.rstrip("`") if found else None


_decode_chat = msgspec.json.Decoder(_Chat).decode
_decode_completion = msgspec.json.Decoder(_Completion).decode
_decode_embedding = msgspec.json.Decoder(_Embedding).decode
_decode_response = msgspec.json.Decoder(_Response).decode


def _parse_chat(body: bytes) -> Asked:
    request = _decode_chat(body)
    return _generation(request, [_last_user_text(request.messages)], _message_words(request.messages))


def _parse_completion(body: bytes) -> Asked:
    request = _decode_completion(body)
    texts = _texts(request.prompt, "prompt")
    return _generation(request, texts, sum(map(word_count, texts)))


def _parse_response(body: bytes) -> Asked:
    request = _decode_response(body)
    if request.stream:
        raise InvalidBody("The scripted engine does not stream responses.", "stream")
    messages = [_Message(content=request.input)] if isinstance(request.input, str) else request.input
    words = _message_words(messages) + word_count(request.instructions or "")
    return _generation(request, [_last_user_text(messages)], words)


def _parse_embedding(body: bytes) -> Asked:
    request = _decode_embedding(body)
    texts = _texts(request.input, "input")
    return Asked(
        request.model,
        texts,
        sum(map(word_count, texts)),
        dimensions=request.dimensions,
        base64=request.encoding_format == "base64",
    )


def _generation(request: _Generation, texts: list[str], prompt_tokens: int) -> Asked:
    options = request.stream_options
    return Asked(
        request.model,
        texts,
        prompt_tokens,
        choices_per_text=request.n or 1,
        stream=bool(request.stream),
        include_usage=options is not None and options.include_usage,
    )


def _texts(given: str | list[Any], param: str) -> list[str]:
    """Return the texts in a prompt: one text, several, one list of token ids, or several such lists."""
    if isinstance(given, str):
        return [given]
    if all(isinstance(each, int) for each in given):
        return [" ".join(map(str, given))]
    if all(isinstance(each, str) for each in given):
        return given
    if all(isinstance(each, list) for each in given):
        return [" ".join(map(str, each)) for each in given]
    raise InvalidBody("Expected a string, strings, tokens or lists of tokens.", param)


def _last_user_text(messages: list[_Message]) -> str:
    for message in reversed(messages):
        if message.role == "user":
            return _text_of(message)
    return _text_of(messages[-1])


def _text_of(message: _Message) -> str:
    if isinstance(message.content, list):
        return "".join([part.text or "" for part in message.content])
    return message.content or ""


def _message_words(messages: Iterable[_Message]) -> int:
    return sum([word_count(_text_of(message)) for message in messages])


def word_count(text: str) -> int:
    """Return how many tokens a text counts for: its words."""
    return len(text.split())


_PARSERS: dict[Endpoint, Callable[[bytes], Asked]] = {
    Endpoint.CHAT: _parse_chat,
    Endpoint.COMPLETIONS: _parse_completion,
    Endpoint.EMBEDDINGS: _parse_embedding,
    Endpoint.RESPONSES: _parse_response,
}
