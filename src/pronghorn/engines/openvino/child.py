"""The child process: loads a model, then serves it: `python -m pronghorn.engines.openvino.child OPTIONS`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import uvicorn
import uvloop

from pronghorn.engines.child import end_failed, end_with_parent, take_stdout
from pronghorn.engines.openvino.face import Face
from pronghorn.engines.openvino.generation import Generator
from pronghorn.engines.openvino.grammars import Grammars
from pronghorn.engines.openvino.pipeline import Pipeline

# Tokens that one step computes at most: larger steps gain nothing and delay every running answer.
STEP_TOKENS_MAX = 256
# OpenVINO's own size on processors.
BLOCK_TOKENS = 32


class ChildOptions(msgspec.Struct, frozen=True):
    """What one process runs."""

    gguf: str
    names: tuple[str, ...]
    port: int
    slots: int
    threads: int
    context_tokens: int
    answer_tokens: int
    cache_tokens: int


def main() -> None:
    """Serve until told to stop."""
    options = msgspec.json.decode(sys.argv[1], type=ChildOptions)
    status = take_stdout()
    # Sent to the whole group, they are the server's, which ends us.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    try:
        batching, tokenizer = _load(options)
    except Exception as error:
        end_failed(status, error)
    uvloop.run(_serve(options, batching, tokenizer, lambda: status.write("READY\n")))


def _load(options: ChildOptions) -> tuple[Any, Any]:
    import openvino_genai

    config = openvino_genai.SchedulerConfig()
    # One more than the longest line fills: a pipeline that cannot fit even that fails as a whole.
    config.num_kv_blocks = -(-options.cache_tokens // BLOCK_TOKENS) + 1
    config.max_num_seqs = options.slots
    config.max_num_batched_tokens = STEP_TOKENS_MAX
    config.dynamic_split_fuse = True
    config.enable_prefix_caching = True
    # Pinned, the first thread of every process would be on the same core.
    properties = {"INFERENCE_NUM_THREADS": options.threads, "ENABLE_CPU_PINNING": False}
    tokenizer = openvino_genai.Tokenizer(options.gguf, **properties)
    # How it multiplies is left to OpenVINO, which knows the processor (docs/ENGINES.md has what else was measured).
    batching = openvino_genai.ContinuousBatchingPipeline(options.gguf, tokenizer, config, "CPU", **properties)
    return batching, tokenizer


async def _serve(options: ChildOptions, batching: Any, tokenizer: Any, ready: Callable[[], object]) -> None:
    generator = Generator(
        Pipeline(batching),
        tokenizer,
        Grammars(options.gguf),
        choices_max=min(options.slots, options.cache_tokens // options.context_tokens),
        context_tokens=options.context_tokens,
        answer_tokens=options.answer_tokens,
    )
    config = uvicorn.Config(
        Face(generator, options.names).app,
        host="127.0.0.1",
        port=options.port,
        lifespan="off",
        access_log=False,
        log_config=None,
        timeout_keep_alive=3600,
        http="httptools",
        ws="none",
    )
    server = _Server(config)
    server.ready = ready
    await server.serve()


class _Server(uvicorn.Server):
    """Says when it listens, and leaves signals alone."""

    ready: Callable[[], object]

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


if __name__ == "__main__":
    main()
