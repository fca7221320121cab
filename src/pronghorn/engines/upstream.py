"""Any OpenAI-compatible server: vLLM, SGLang, llama.cpp, TGI, Ray Serve, a hosted API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from pronghorn.domain.answers import Answer
from pronghorn.domain.model import Replica
from pronghorn.engines.base import ModelInfo, authorization
from pronghorn.engines.client import EngineClient
from pronghorn.errors import UsageError
from pronghorn.limits import MIB
from pronghorn.settings import UpstreamSettings

log = logging.getLogger("pronghorn.upstream")

# How often a server is asked what models it has, and how long one answer may take.
LIST_INTERVAL_S = 30.0
LIST_RETRY_S = 2.0
LIST_TIMEOUT_S = 5.0
# The longest lists, of gateways to hundreds of models with all that there is to say of each, are a fifth of it.
LIST_BYTES_MAX = 4 * MIB


class _Listed(msgspec.Struct):
    id: str


class _Listing(msgspec.Struct):
    data: list[_Listed]


class UpstreamEngine:
    """One base URL, whose list of models is asked for again and again."""

    def __init__(self, settings: UpstreamSettings) -> None:
        self._settings = settings
        self._base_url = base_url(settings.url)
        headers = authorization(settings.api_key_env)
        if settings.api_key_env and not headers:
            raise UsageError(f"upstream {settings.url}: environment variable {settings.api_key_env} is not set")
        self._client = EngineClient(self._base_url, headers=headers, answer_bytes_max=LIST_BYTES_MAX)
        self._models = settings.models
        self._trouble: str | None = None
        self._asking: asyncio.Task[None] | None = None

    async def start(self, changed: Callable[[], None]) -> None:
        if self._settings.models is None:
            await self._ask(changed)
            self._asking = asyncio.create_task(self._keep_asking(changed))
        if self._trouble:
            log.warning("%s: %s; lines wait until it answers", self._base_url, self._trouble)

    async def stop(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._client.close()

    def replicas(self) -> list[Replica]:
        return [
            Replica(
                base_url=self._base_url,
                models=self._models,
                window=self._settings.window,
                api_key_env=self._settings.api_key_env,
            )
        ]

    def models(self) -> list[ModelInfo]:
        owner = urlsplit(self._base_url).hostname or "upstream"
        ready = self._trouble is None
        return [ModelInfo(name, owner, self._base_url, ready, self._trouble) for name in self._models or ()]

    async def survey(self) -> list[ModelInfo]:
        await self._ask(lambda: None)
        return self.models() or [ModelInfo("any", "upstream", self._base_url, self._trouble is None, self._trouble)]

    async def _keep_asking(self, changed: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(LIST_RETRY_S if self._trouble else LIST_INTERVAL_S)
            await self._ask(changed)

    async def _ask(self, changed: Callable[[], None]) -> None:
        """Learn the server's models; a server without such a list takes any name.

        So does one whose list is empty: what serves its models is not there yet, and lines wait for it.
        """
        before = self._models, self._trouble
        answer = await self._client.request("GET", "/models", timeout_s=LIST_TIMEOUT_S)
        if not isinstance(answer, Answer):
            self._trouble = answer.detail
        elif answer.status in (401, 403):
            self._trouble = f"it refuses the key with status {answer.status}"
        elif answer.status not in (200, 404, 405):
            self._trouble = f"it answers with status {answer.status}"
        else:
            self._trouble = None
            self._models = _names(answer)
        if (self._models, self._trouble) != before:
            changed()


def base_url(url: str) -> str:
    """Return the URL as lines are sent below it: without a final slash, and with `/v1` if it has no path.

    Raises UsageError when it is not an http or https URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"upstream '{url}' is not an http:// or https:// URL")
    if parts.username or parts.password:
        raise UsageError("an upstream URL holds no user name or password: name the key's variable with api_key_env")
    path = parts.path.rstrip("/") or "/v1"
    return parts._replace(path=path, query="", fragment="").geturl()


def _names(answer: Answer) -> tuple[str, ...] | None:
    try:
        listing = msgspec.json.decode(answer.body, type=_Listing) if answer.status == 200 else None
    except (ValueError, RecursionError):
        return None
    return tuple(model.id for model in listing.data) or None if listing else None
