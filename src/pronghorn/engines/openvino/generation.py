"""From prompts and settings to finished answers: tokenizing, what the pipeline is told, and what it has said so far."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

from pronghorn.engines.openvino.answers import Choice, Count
from pronghorn.engines.openvino.grammars import Grammars
from pronghorn.engines.openvino.pipeline import Pipeline, Run, Tokens
from pronghorn.engines.openvino.requests import Message, Settings
from pronghorn.engines.openvino.text import Pieces, Text, pieces
from pronghorn.errors import EngineFailed, InvalidRequest, TooManyRequests

# Prompts in memory beyond those that run: far more than a stated window sends, and a few MB at most.
UNFINISHED_MAX = 2048

Pairs = tuple[tuple[str, float], ...]


class Generator:
    """One loaded model: starts generations on it."""

    def __init__(
        self,
        pipeline: Pipeline,
        tokenizer: Any,
        grammars: Grammars,
        *,
        choices_max: int,
        context_tokens: int,
        answer_tokens: int,
    ) -> None:
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._choices_max = choices_max
        self._context_tokens = context_tokens
        self._answer_tokens = answer_tokens
        vocabulary = tokenizer.get_vocab()
        self._tokens = max(vocabulary.values()) + 1
        self._prompt_bytes_max = context_tokens * max(map(len, vocabulary))

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Return a chat as the tokens of a prompt, up to where the answer begins."""
        history = [{"role": message.role, "content": message.content} for message in messages]
        self._check_size(sum(len(message.content) for message in messages), "messages")
        try:
            prompt = self._tokenizer.apply_chat_template(history, True)
        except RuntimeError as error:
            raise InvalidRequest("The model's chat template does not take these messages.", param="messages") from error
        return self._encode(prompt, add_special_tokens=False)

    async def start(self, prompts: Sequence[str | list[int]], settings: Settings) -> Generation:
        """Begin to answer; raises InvalidRequest for what cannot be generated and TooManyRequests."""
        tokens = [self._tokens_of(prompt) for prompt in prompts]
        if settings.n > self._choices_max:
            raise InvalidRequest(f"The engine gives at most {self._choices_max} choices.", param="n")
        if self._pipeline.unfinished + len(tokens) > UNFINISHED_MAX:
            raise TooManyRequests(f"The engine has {UNFINISHED_MAX} prompts to answer already.", code="engine_full")
        if settings.schema is not None:
            await self._grammars.check(settings.schema)
        configs = [self._config(settings, self._context_tokens - len(prompt)) for prompt in tokens]
        return Generation(self._pipeline, self._tokenizer, tokens, configs, settings)

    def gauges(self) -> tuple[int, int]:
        """Return how many prompts run and how many wait."""
        scheduled = min(self._pipeline.scheduled, self._pipeline.unfinished)
        return scheduled, self._pipeline.unfinished - scheduled

    def _tokens_of(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._check_size(len(prompt), "prompt")
            prompt = self._encode(prompt, add_special_tokens=True)
        elif any(not 0 <= token < self._tokens for token in prompt):
            raise InvalidRequest(f"A token of the prompt is not between 0 and {self._tokens - 1}.", param="prompt")
        if not prompt:
            raise InvalidRequest("The prompt is empty.", param="prompt")
        if len(prompt) >= self._context_tokens:
            raise self._too_long(f"the prompt has {len(prompt)}", "prompt")
        return prompt

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        encoded = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).input_ids.data
        tokens: list[int] = encoded.reshape(-1).tolist()
        return tokens

    def _check_size(self, chars: int, param: str) -> None:
        """Refuse a text that cannot fit before it is cut into tokens, which takes seconds for megabytes."""
        if chars > self._prompt_bytes_max:
            raise self._too_long(f"the prompt has {chars} characters", param)

    def _too_long(self, what: str, param: str) -> InvalidRequest:
        return InvalidRequest(
            f"This model's maximum context length is {self._context_tokens} tokens, but {what}.",
            param=param,
            code="context_length_exceeded",
        )

    def _config(self, settings: Settings, room: int) -> Any:
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = min(settings.tokens_max or self._answer_tokens, room)
        config.min_new_tokens = min(settings.tokens_min, config.max_new_tokens)
        config.ignore_eos = settings.ignore_eos
        config.set_eos_token_id(self._tokenizer.get_eos_token_id())
        config.stop_strings = set(settings.stop)
        config.include_stop_str_in_output = True  # cut by us, to the character
        config.presence_penalty = settings.presence_penalty
        config.frequency_penalty = settings.frequency_penalty
        config.repetition_penalty = settings.repetition_penalty
        config.logprobs = int(settings.logprobs)
        if settings.schema is not None:
            config.structured_output_config = openvino_genai.StructuredOutputConfig(json_schema=settings.schema)
        if not settings.greedy:
            config.do_sample = True
            config.num_return_sequences = settings.n
            config.temperature = settings.temperature
            config.top_p = settings.top_p
            config.min_p = settings.min_p
            if settings.top_k:
                config.top_k = settings.top_k
            seed = random.getrandbits(32) if settings.seed is None else settings.seed % (1 << 32)
            config.rng_seed = seed
        return config


class Generation:
    """The answers to the prompts of one request; leaving it gives up what has not ended."""

    def __init__(
        self,
        pipeline: Pipeline,
        decoder: Any,
        prompts: Sequence[list[int]],
        configs: Sequence[Any],
        settings: Settings,
    ) -> None:
        self._pipeline = pipeline
        # A greedy answer is always the same, so it is computed once.
        self._copies = settings.n if settings.greedy else 1
        self._prompt_tokens = sum(map(len, prompts))
        self._answers = [
            [_Answer(decoder, settings) for _ in range(1 if settings.greedy else settings.n)] for _ in prompts
        ]
        self._left = len(prompts)
        self._progress = asyncio.Event()
        self._fresh: list[tuple[int, str, Pairs | None]] = []
        self._runs = [
            Run(prompt, config, self._receiver(place), each_step=settings.stream)
            for place, (prompt, config) in enumerate(zip(prompts, configs, strict=True))
        ]

    def __enter__(self) -> Generation:
        for run in self._runs:
            self._pipeline.add(run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run in self._runs:
            self._pipeline.cancel(run)

    async def pieces(self) -> AsyncIterator[tuple[int, str, Pairs | None]]:
        """Yield text as it comes: the choice's number, its new text, and the tokens behind it when asked for."""
        while self._left or self._fresh:
            if not self._fresh:
                await self._wait()
            fresh, self._fresh = self._fresh, []
            for piece in fresh:
                yield piece

    async def whole(self) -> tuple[list[Choice], Count]:
        """Return the choices once all have ended; raises EngineFailed when one could not be finished."""
        while self._left:
            await self._wait()
        answers = [answer for group in self._answers for answer in group for _ in range(self._copies)]
        written = sum(len(answer.ids) for group in self._answers for answer in group) * self._copies
        return [answer.choice() for answer in answers], Count(self._prompt_tokens, written)

    async def _wait(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    def _receiver(self, place: int) -> Any:
        answers = self._answers[place]
        # The pipeline's own numbers of the choices, in the order in which they showed up.
        numbers: dict[int, int] = {}

        def receive(tokens: Tokens) -> None:
            for number in tokens.ids:
                numbers.setdefault(number, len(numbers))
            for number, index in numbers.items():
                answer = answers[index]
                text, pairs = answer.add(tokens, number)
                if text or pairs:
                    first = (place * len(answers) + index) * self._copies
                    self._fresh += [(first + copy, text, pairs) for copy in range(self._copies)]
            self._left -= tokens.ended
            self._progress.set()

        return receive


class _Answer:
    """One choice as its tokens come."""

    def __init__(self, decoder: Any, settings: Settings) -> None:
        self.ids: list[int] = []
        self._decoder = decoder
        self._text = Text(decoder, settings.stop)
        self._logprobs: list[float] = []
        self._finish: str | None = None
        # Cuts the tokens of a streamed answer that come with log-probabilities.
        self._cutter = Pieces(decoder) if settings.logprobs and settings.stream else None
        self._wants_logprobs = settings.logprobs

    def add(self, tokens: Tokens, number: int) -> tuple[str, Pairs | None]:
        """Take what is new of the pipeline's choice of that number, and return what may be shown of it."""
        new, logprobs = tokens.ids.get(number, []), tokens.logprobs.get(number, [])
        self.ids += new
        self._logprobs += logprobs
        self._finish = tokens.finish.get(number)
        text = self._text.add(new, last=tokens.ended)
        if self._cutter is None:
            return text, None
        return text, tuple((self._cutter.add([token]), value) for token, value in zip(new, logprobs, strict=True))

    def choice(self) -> Choice:
        if self._finish is None:
            raise EngineFailed("The engine had no memory left to finish the answer.", code="engine_out_of_memory")
        text = self._text.text
        pairs = None
        if self._wants_logprobs:
            pairs = tuple(zip(pieces(self._decoder, self.ids, len(text)), self._logprobs, strict=False))
        return Choice(text, self._finish, pairs)
