"""What the embedded engines have in common: which GGUF files they run under which names, and the processes that do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from pronghorn.domain.model import Replica
from pronghorn.engines import smollm2
from pronghorn.engines.base import Engine, ModelInfo
from pronghorn.engines.child import ChildServer
from pronghorn.errors import EngineError

log = logging.getLogger("pronghorn.embedded")

# So that the quickstart runs as written.
ALIAS = "your-model"


class EmbeddedEngine:
    """Runs GGUF files on this machine, in processes that `servers` makes for a file and its names."""

    def __init__(
        self, owner: str, model: str | None, servers: Callable[[Path, tuple[str, ...]], list[ChildServer]]
    ) -> None:
        self._owner = owner
        self._model = model
        self._source = model or smollm2.SOURCE
        self._servers_of = servers
        self._servers: list[ChildServer] = []

    async def start(self, changed: Callable[[], None]) -> None:
        models = await asyncio.to_thread(_find_models, self._model)
        for name, names in _names_of(models).items():
            self._servers += self._servers_of(models[name], names)
        try:
            async with asyncio.TaskGroup() as tasks:
                for server in self._servers:
                    tasks.create_task(server.start())
        except (ExceptionGroup, asyncio.CancelledError) as error:
            await self.stop()
            if isinstance(error, ExceptionGroup):
                raise error.exceptions[0] from error
            raise
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
        return [ModelInfo(name, self._owner, self._source, not why, why) for name, why in troubles.items()]

    async def survey(self) -> list[ModelInfo]:
        if self._model is None and not smollm2.cached_path().is_file():
            return [ModelInfo(smollm2.NAME, self._owner, self._source, False, "fetched at the first start")]
        names = _names_of(await asyncio.to_thread(_find_models, self._model))
        return [ModelInfo(name, self._owner, self._source, True) for group in names.values() for name in group]


class PreferredEngine:
    """The first of two engines if it starts, else the second: for a choice that nobody made by hand."""

    def __init__(self, first: Engine, second: Engine) -> None:
        self._engine = first
        self._second = second

    async def start(self, changed: Callable[[], None]) -> None:
        try:
            await self._engine.start(changed)
        except EngineError as error:
            log.warning("%s; another engine answers in its place", error)
            self._engine = self._second
            await self._engine.start(changed)

    async def stop(self) -> None:
        await self._engine.stop()

    def replicas(self) -> list[Replica]:
        return self._engine.replicas()

    def models(self) -> list[ModelInfo]:
        return self._engine.models()

    async def survey(self) -> list[ModelInfo]:
        return await self._engine.survey()


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


def _names_of(models: Mapping[str, Path]) -> dict[str, tuple[str, ...]]:
    """Return the names that each model answers to; one that is alone also answers to the alias."""
    alias = (ALIAS,) if len(models) == 1 else ()
    return {name: (name, *alias) for name in models}
