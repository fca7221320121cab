"""Which OpenVINO processes run, and whether this machine's processor is one that they suit."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines.child import ChildServer, cores, free_port
from pronghorn.engines.embedded import EmbeddedEngine
from pronghorn.engines.openvino.child import ChildOptions
from pronghorn.errors import EngineError
from pronghorn.limits import MIB
from pronghorn.settings import OpenVinoSettings

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


class OpenVinoEngine(EmbeddedEngine):
    """OpenVINO GenAI, which generates only."""

    def __init__(self, settings: OpenVinoSettings) -> None:
        super().__init__("openvino", settings.model, lambda model, names: _servers(settings, names, model))

    async def start(self, changed: Callable[[], None]) -> None:
        if not _is_installed():
            raise EngineError("OpenVINO is not installed here: pip install 'pronghorn[openvino]'")
        await super().start(changed)


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
