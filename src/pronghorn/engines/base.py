"""What answers lines: an engine is one or more replicas behind OpenAI's HTTP, started by us or by others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from pronghorn.domain.model import Endpoint, Replica


class ModelInfo(msgspec.Struct, frozen=True):
    """A model that lines can name: where it comes from, whether it can answer now, and if not, why."""

    id: str
    owned_by: str
    source: str
    ready: bool
    detail: str | None = None


class Engine(Protocol):
    """A way to get lines answered."""

    async def start(self, changed: Callable[[], None]) -> None:
        """Begin; call `changed` whenever `replicas` or `models` answers something new.

        Raises EngineError when it can never work as configured.
        """
        ...

    async def stop(self) -> None:
        """End what was started."""
        ...

    def replicas(self) -> list[Replica]:
        """Return the base URLs to send lines to."""
        ...

    def models(self) -> list[ModelInfo]:
        """Return what can be asked for by name."""
        ...

    async def survey(self) -> list[ModelInfo]:
        """Return what could be asked for if the engine were started, without starting it."""
        ...


class EnginePool:
    """All engines of a server, seen as one set of replicas."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self._listeners: list[Callable[[], None]] = []

    async def start(self) -> None:
        """Start every engine; an error of one, or being cancelled, stops those that had started."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for engine in self._engines:
                    tasks.create_task(engine.start(self._changed))
        except (ExceptionGroup, asyncio.CancelledError) as error:
            await self.stop()
            if isinstance(error, ExceptionGroup):
                raise error.exceptions[0] from error
            raise

    async def stop(self) -> None:
        await asyncio.gather(*(engine.stop() for engine in self._engines))

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the replicas or models change."""
        self._listeners.append(listener)

    def replicas(self) -> list[Replica]:
        return [replica for engine in self._engines for replica in engine.replicas()]

    def models(self) -> list[ModelInfo]:
        """Return each model once, in the engines' order."""
        found: dict[str, ModelInfo] = {}
        for engine in self._engines:
            for model in engine.models():
                if model.id not in found or (model.ready and not found[model.id].ready):
                    found[model.id] = model
        return list(found.values())

    async def survey(self) -> list[ModelInfo]:
        """Return what the engines would offer, without starting them."""
        return [model for engine in self._engines for model in await engine.survey()]

    def answers(self, endpoint: Endpoint, model: str) -> bool:
        """Tell whether some replica takes lines for `endpoint` that name `model`."""
        return any(replica.answers(endpoint, model) for replica in self.replicas())

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def authorization(api_key_env: str | None) -> dict[str, str]:
    """Return the header that shows an engine the key in this environment variable; none where there is no key."""
    key = os.environ.get(api_key_env) if api_key_env else None
    return {"Authorization": f"Bearer {key}"} if key else {}
