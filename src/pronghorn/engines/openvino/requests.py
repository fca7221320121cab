"""What a request's body asks for; raises InvalidRequest for what is wrong or cannot be done."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pronghorn.errors import InvalidRequest

# What is used where a request says nothing: the values of llama.cpp's server, so that both embedded engines are alike.
TEMPERATURE = 0.8
TOP_P = 0.95
TOP_K = 40
MIN_P = 0.05

STOP_STRINGS_MAX = 16
PROMPTS_MAX = 128
ANY_OBJECT = '{"type":"object"}'

Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
_Body = TypeVar("_Body", bound="_Sampling")
_Value = TypeVar("_Value")


class Message(msgspec.Struct):
    """One message of a chat, as chat templates take it."""

    role: str
    content: str


class Settings(msgspec.Struct, frozen=True):
    """How to generate; `tokens_max` None leaves it to the engine."""

    n: int
    tokens_max: int | None
    tokens_min: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    schema: str | None
    logprobs: bool
    top_logprobs: int
    stream: bool
    stream_usage: bool

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Sampling(msgspec.Struct):
    """What the three endpoints have in common."""

    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, lt=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=STOP_STRINGS_MAX)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    def settings(
        self, tokens_max: int | None, *, schema: str | None = None, logprobs: bool = False, top_logprobs: int = 0
    ) -> Settings:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        settings = Settings(
            n=self.n or 1,
            tokens_max=tokens_max,
            tokens_min=self.min_tokens or 0,
            temperature=_or(self.temperature, TEMPERATURE),
            top_p=_or(self.top_p, TOP_P),
            top_k=_or(self.top_k, TOP_K),
            min_p=_or(self.min_p, MIN_P),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or self.repeat_penalty or 1.0,
            seed=self.seed,
            stop=tuple(stop),
            ignore_eos=bool(self.ignore_eos),
            schema=schema,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            stream=bool(self.stream),
            stream_usage=bool(self.stream_options and self.stream_options.include_usage),
        )
        if top_logprobs > (1 if settings.greedy else 0):
            raise _cannot("give the log-probabilities of tokens other than the chosen one", "top_logprobs")
        return settings


class _Schema(msgspec.Struct):
    schema: dict[str, Any] | None = None


class _Format(msgspec.Struct):
    type: str
    json_schema: _Schema | None = None
    schema: dict[str, Any] | None = None


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None
    tool_calls: list[Any] | None = None


class _Chat(_Sampling):
    messages: Annotated[list[_Message], Meta(min_length=1)] | UnsetType = UNSET
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    response_format: _Format | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logit_bias: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None


class _Completion(_Sampling):
    prompt: str | list[str | list[int] | int] | UnsetType = UNSET
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logit_bias: dict[str, Any] | None = None


class _Item(msgspec.Struct):
    type: str | None = None
    role: str | None = None
    content: str | list[_Part] | None = None


class _Text(msgspec.Struct):
    format: _Format | None = None


class _Response(_Sampling):
    input: str | Annotated[list[_Item], Meta(min_length=1)] | UnsetType = UNSET
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    text: _Text | None = None
    tools: list[Any] | None = None
    previous_response_id: str | None = None
    background: bool | None = None


def chat(body: bytes) -> tuple[list[Message], Settings]:
    """Read a body of /v1/chat/completions."""
    asked = _read(body, _Chat)
    _refuse(asked, tools="call tools", functions="call functions", logit_bias="bias tokens", audio="speak")
    if isinstance(asked.messages, UnsetType):
        raise _missing("messages")
    if any(message.tool_calls for message in asked.messages):
        raise _cannot("call tools", "messages")
    messages = [_message(message.role, message.content) for message in asked.messages]
    settings = asked.settings(
        asked.max_completion_tokens or asked.max_tokens,
        schema=_schema(asked.response_format, "response_format"),
        logprobs=bool(asked.logprobs),
        top_logprobs=asked.top_logprobs or 0,
    )
    return messages, settings


def completion(body: bytes) -> tuple[list[str | list[int]], Settings]:
    """Read a body of /v1/completions: its prompts, each text or tokens."""
    asked = _read(body, _Completion)
    _refuse(asked, echo="repeat the prompt", suffix="fill in before a suffix", logit_bias="bias tokens")
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise _cannot("choose the best of several answers", "best_of")
    if isinstance(asked.prompt, UnsetType):
        raise _missing("prompt")
    prompts = _prompts(asked.prompt)
    if not 1 <= len(prompts) <= PROMPTS_MAX:
        raise InvalidRequest(f"There can be 1 to {PROMPTS_MAX} prompts in a request.", param="prompt")
    settings = asked.settings(asked.max_tokens, logprobs=asked.logprobs is not None, top_logprobs=asked.logprobs or 0)
    return prompts, settings


def response(body: bytes) -> tuple[list[Message], Settings]:
    """Read a body of /v1/responses."""
    asked = _read(body, _Response)
    _refuse(
        asked,
        tools="call tools",
        previous_response_id="go on from an earlier response",
        background="answer in the background",
    )
    items = asked.input
    if isinstance(items, UnsetType):
        raise _missing("input")
    messages = [Message("system", asked.instructions)] if asked.instructions else []
    if isinstance(items, str):
        messages.append(Message("user", items))
    else:
        for item in items:
            if item.type not in (None, "message") or item.role is None:
                raise _cannot(f"read input of the type '{item.type}'", "input")
            messages.append(_message(item.role, item.content))
    schema = _schema(asked.text.format if asked.text else None, "text.format")
    return messages, asked.settings(asked.max_output_tokens, schema=schema)


def _read(body: bytes, kind: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        raise InvalidRequest(f"{text}.", param=path.strip("`.") or None) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest("The body is not valid JSON.") from error


def _prompts(prompt: str | list[str | list[int] | int]) -> list[str | list[int]]:
    """Return the prompts of a completion: a list of numbers is one prompt, any other list has several."""
    if isinstance(prompt, str):
        return [prompt]
    tokens = [part for part in prompt if isinstance(part, int)]
    prompts = [part for part in prompt if not isinstance(part, int)]
    if tokens and prompts:
        raise InvalidRequest("The prompts mix tokens with texts or lists.", param="prompt")
    return [tokens] if tokens else prompts


def _message(role: str, content: str | list[_Part] | None) -> Message:
    if isinstance(content, list):
        for part in content:
            if part.text is None:
                raise _cannot(f"read content of the type '{part.type}'", "messages")
        content = "".join(part.text or "" for part in content)
    return Message("system" if role == "developer" else role, content or "")


def _schema(format_: _Format | None, param: str) -> str | None:
    """Return the JSON schema that the answer has to keep to."""
    if format_ is None or format_.type == "text":
        return None
    if format_.type == "json_object":
        return _encode(format_.schema) if format_.schema else ANY_OBJECT
    if format_.type == "json_schema":
        schema = format_.json_schema.schema if format_.json_schema else format_.schema
        if schema is None:
            raise InvalidRequest("A format of the type 'json_schema' needs a schema.", param=param)
        return _encode(schema)
    raise _cannot(f"answer in the format '{format_.type}'", param)


def _encode(schema: dict[str, Any]) -> str:
    return msgspec.json.encode(schema).decode()


def _refuse(asked: msgspec.Struct, **what: str) -> None:
    for name, cannot in what.items():
        if getattr(asked, name):
            raise _cannot(cannot, name)


def _cannot(what: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"The engine that answers here (openvino) cannot {what}.", param=param, code="unsupported")


def _missing(name: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def _or(value: _Value | None, default: _Value) -> _Value:
    return default if value is None else value
