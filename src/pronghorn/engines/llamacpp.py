"""The embedded engine: llama.cpp's own server in child processes of ours, restarted when they die."""

from __future__ import annotations

import os
from pathlib import Path

from pronghorn.domain.model import Endpoint, Replica, part
from pronghorn.engines.child import ChildServer, cores, free_port
from pronghorn.engines.embedded import EmbeddedEngine
from pronghorn.engines.llamacpp_child import ChildOptions
from pronghorn.settings import LlamaCppSettings

# Measured, docs/ENGINES.md: a process with one thread a core is as fast as one process with many, and five times
# as fast while something else wants a core, because ggml's threads wait for each other by spinning. Beyond a few
# processes the memory that each needs outweighs that.
PROCESSES_MAX = 4
# Eight lines at once a core: throughput grows little beyond it. A token of context takes 24 KB in the built-in model.
SLOTS_PER_CORE = 8
SLOTS_MAX = 64
MEMORY_SHARE = 0.25
BYTES_PER_CONTEXT_TOKEN = 24 * 1024
EMBEDDING_SLOTS = 4
# OpenMP's threads spin for each other without end by default, which starves every other process.
_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}

_GENERATES = (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS, Endpoint.RESPONSES)
_EMBEDS = (Endpoint.EMBEDDINGS,)


class LlamaCppEngine(EmbeddedEngine):
    """llama.cpp, for what it is asked to do of generating and embedding."""

    def __init__(self, settings: LlamaCppSettings, *, generates: bool = True, embeds: bool = True) -> None:
        def servers(model: Path, names: tuple[str, ...]) -> list[ChildServer]:
            running = generators(settings, names[0], model) if generates else []
            embedders = [_embedder(settings, names[0], model)] if embeds else []
            return [_server(options, names, _GENERATES) for options in running] + [
                _server(options, names, _EMBEDS) for options in embedders
            ]

        super().__init__("llama.cpp", settings.model, servers)


def _server(options: ChildOptions, names: tuple[str, ...], endpoints: tuple[Endpoint, ...]) -> ChildServer:
    replica = Replica(
        base_url=f"http://127.0.0.1:{options.port}/v1",
        endpoints=endpoints,
        models=names,
        # A line that waits at the engine takes whichever slot is free next, not the one that has its prompt; only
        # embeddings keep no prompts.
        window=options.slots + options.embeddings,
        slots=options.slots,
    )
    module = "pronghorn.engines.llamacpp_child"
    return ChildServer(module, options, replica, engine="llama.cpp", model=options.model, environment=_ENVIRONMENT)


def generators(settings: LlamaCppSettings, name: str, model: Path) -> list[ChildOptions]:
    """Return the processes that share this machine's cores, and as many slots as its memory affords."""
    threads = settings.threads or cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * MEMORY_SHARE
    affordable = int(memory / (settings.context_tokens * BYTES_PER_CONTEXT_TOKEN))
    slots = max(1, settings.slots or min(threads * SLOTS_PER_CORE, SLOTS_MAX, affordable))
    processes = min(threads, slots, PROCESSES_MAX)
    return [
        ChildOptions(
            model=str(model),
            name=name,
            port=free_port(),
            slots=part(slots, index, processes),
            threads=part(threads, index, processes),
            context_tokens=settings.context_tokens,
            answer_tokens=settings.answer_tokens,
            embeddings=False,
        )
        for index in range(processes)
    ]


def _embedder(settings: LlamaCppSettings, name: str, model: Path) -> ChildOptions:
    return ChildOptions(
        model=str(model),
        name=name,
        port=free_port(),
        slots=EMBEDDING_SLOTS,
        threads=settings.threads or cores(),
        context_tokens=settings.context_tokens,
        answer_tokens=settings.answer_tokens,
        embeddings=True,
    )
