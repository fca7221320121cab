"""The embedded engine: llama.cpp's own server in child processes of ours, restarted when they die."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines import smollm2
from pronghorn.engines.base import ModelInfo
from pronghorn.engines.child import ChildServer, cores, free_port
from pronghorn.engines.llamacpp_child import ChildOptions
from pronghorn.errors import EngineError
from pronghorn.settings import LlamaCppSettings

# So that the quickstart runs as written.
ALIAS = "your-model"
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


class LlamaCppEngine:
    """Runs GGUF models on this machine; with `embeds_only` it leaves generation to another engine."""

    def __init__(self, settings: LlamaCppSettings, *, embeds_only: bool = False) -> None:
        self._settings = settings
        self._embeds_only = embeds_only
        self._servers: list[ChildServer] = []
        self._source = settings.model or smollm2.SOURCE

    async def start(self, changed: Callable[[], None]) -> None:
        models = await asyncio.to_thread(_find_models, self._settings.model)
        for name, names in _names_of(models).items():
            if not self._embeds_only:
                generators = _generators(self._settings, name, models[name])
                self._servers += [_server(options, names, _GENERATES) for options in generators]
            self._servers.append(_server(_embedder(self._settings, name, models[name]), names, _EMBEDS))
        await asyncio.gather(*(server.start() for server in self._servers))
        changed()

    async def stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self._servers))

    def replicas(self) -> list[Replica]:
        return [server.replica for server in self._servers]

    def models(self) -> list[ModelInfo]:
        """Return each name once; it is ready when every server of its model is."""
        troubles: dict[str, str | None] = {}
        for server in self._servers:
            for name in server.names:
                troubles[name] = troubles.get(name) or (None if server.ready else server.trouble or "loading")
        return [ModelInfo(name, "llama.cpp", self._source, not why, why) for name, why in troubles.items()]

    async def survey(self) -> list[ModelInfo]:
        if self._settings.model is None and not smollm2.cached_path().is_file():
            return [ModelInfo(smollm2.NAME, "llama.cpp", self._source, False, "fetched at the first start")]
        names = _names_of(await asyncio.to_thread(_find_models, self._settings.model))
        return [ModelInfo(name, "llama.cpp", self._source, True) for group in names.values() for name in group]


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


def _find_models(path: str | None) -> dict[str, Path]:
    """Return the GGUF files to run, by model name."""
    if path is None:
        return {smollm2.NAME: smollm2.fetch()}
    given = Path(path).expanduser()
    if given.is_dir():
        found = {file.stem.lower(): file for file in sorted(given.glob("*.gguf"))}
        if not found:
            raise EngineError(f"there is no .gguf file in {given}")
        return found
    if not given.is_file():
        raise EngineError(f"there is no model at {given}")
    return {given.stem.lower(): given}


def _names_of(models: dict[str, Path]) -> dict[str, tuple[str, ...]]:
    """Return the names that each model answers to; one that is alone also answers to the alias."""
    alias = (ALIAS,) if len(models) == 1 else ()
    return {name: (name, *alias) for name in models}


def _generators(settings: LlamaCppSettings, name: str, model: Path) -> list[ChildOptions]:
    """Return the processes that share this machine's cores, and as many slots as its memory affords."""
    threads = settings.threads or cores()
    processes = min(threads, PROCESSES_MAX)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * MEMORY_SHARE
    affordable = int(memory / (settings.context_tokens * BYTES_PER_CONTEXT_TOKEN))
    slots = settings.slots or min(threads * SLOTS_PER_CORE, SLOTS_MAX, affordable)
    return [
        ChildOptions(
            model=str(model),
            name=name,
            port=free_port(),
            slots=max(1, slots // processes),
            threads=threads // processes,
            context_tokens=settings.context_tokens,
            answer_tokens=settings.answer_tokens,
            embeddings=False,
        )
        for _ in range(processes)
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
