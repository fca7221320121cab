"""Which OpenVINO processes run, and whether this machine's processor is one that they suit."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines import smollm2
from pronghorn.engines.base import ModelInfo
from pronghorn.engines.child import ChildServer, cores, free_port
from pronghorn.engines.openvino.child import ChildOptions
from pronghorn.errors import EngineError
from pronghorn.limits import MIB
from pronghorn.settings import OpenVinoSettings

# So that the quickstart runs as written.
ALIAS = "your-model"
# Measured, docs/ENGINES.md: threads of one process wait for each other by spinning, so a process a core does more, and
# much more while something else wants a core. Beyond a few, the memory that each needs outweighs that.
PROCESSES_MAX = 4
# A step costs little more for many lines than for few, and a core gains nothing beyond so many.
SLOTS_PER_CORE = 32
SLOTS_MAX = 256
# What answers need while they grow, and prompts that may come again; when it is full, the prompt used longest ago goes.
CACHE_BYTES_MAX = 1024 * MIB
CACHE_MEMORY_SHARE = 0.25
CACHE_BYTES_PER_TOKEN = 24 * 1024
# A line in the socket for every few that run, so that a free slot is filled at once.
WINDOW_PER_SLOT = 1.25
_GENERATES = (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS, Endpoint.RESPONSES)


class OpenVinoEngine:
    """Runs a GGUF model on this machine's processor."""

    def __init__(self, settings: OpenVinoSettings) -> None:
        self._settings = settings
        self._name = Path(settings.model).stem.lower() if settings.model else smollm2.NAME
        self._source = settings.model or smollm2.SOURCE
        self._servers: list[ChildServer] = []

    async def start(self, changed: Callable[[], None]) -> None:
        if not _is_installed():
            raise EngineError("OpenVINO is not installed here: pip install 'pronghorn[openvino]'")
        gguf = await asyncio.to_thread(_find_model, self._settings.model)
        self._servers = _servers(self._settings, (self._name, ALIAS), gguf)
        await asyncio.gather(*(server.start() for server in self._servers))
        changed()

    async def stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self._servers))

    def replicas(self) -> list[Replica]:
        return [server.replica for server in self._servers]

    def models(self) -> list[ModelInfo]:
        """Return the model under each of its names; it is ready when every process is."""
        troubles = [server.trouble or "loading" for server in self._servers if not server.ready]
        why = next(iter(troubles), None) if self._servers else "loading"
        return [ModelInfo(name, "openvino", self._source, not why, why) for name in (self._name, ALIAS)]

    async def survey(self) -> list[ModelInfo]:
        if self._settings.model is None and not smollm2.cached_path().is_file():
            return [ModelInfo(smollm2.NAME, "openvino", self._source, False, "fetched at the first start")]
        await asyncio.to_thread(_find_model, self._settings.model)
        return [ModelInfo(name, "openvino", self._source, True) for name in (self._name, ALIAS)]


def suits() -> bool:
    """Tell whether OpenVINO is installed and runs faster here than llama.cpp (docs/ENGINES.md)."""
    return _is_installed() and "avx512_vnni" in _processor_flags()


def _is_installed() -> bool:
    return importlib.util.find_spec("openvino_genai") is not None


def _processor_flags() -> set[str]:
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _find_model(path: str | None) -> Path:
    if path is None:
        return smollm2.fetch()
    given = Path(path).expanduser()
    if not given.is_file():
        raise EngineError(f"there is no model at {given}")
    return given


def _servers(settings: OpenVinoSettings, names: tuple[str, ...], gguf: Path) -> list[ChildServer]:
    """Return the processes that share this machine's cores."""
    threads = settings.threads or cores()
    processes = min(threads, PROCESSES_MAX)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * CACHE_MEMORY_SHARE
    cached = int(min(memory, CACHE_BYTES_MAX)) // CACHE_BYTES_PER_TOKEN
    slots = settings.slots or min(threads * SLOTS_PER_CORE, SLOTS_MAX)
    return [
        _server(
            ChildOptions(
                gguf=str(gguf),
                names=names,
                port=free_port(),
                slots=max(1, slots // processes),
                threads=threads // processes,
                context_tokens=settings.context_tokens,
                answer_tokens=settings.answer_tokens,
                cache_tokens=max(cached // processes, settings.context_tokens),
            )
        )
        for _ in range(processes)
    ]


def _server(options: ChildOptions) -> ChildServer:
    replica = Replica(
        base_url=f"http://127.0.0.1:{options.port}/v1",
        endpoints=_GENERATES,
        models=options.names,
        window=max(options.slots + 1, round(options.slots * WINDOW_PER_SLOT)),
        slots=options.slots,
    )
    return ChildServer("pronghorn.engines.openvino.child", options, replica, engine="OpenVINO", model=options.gguf)
