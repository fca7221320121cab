"""The commands that talk to a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from pronghorn.errors import PronghornError

TIMEOUT_S = 30.0


class ServerError(PronghornError):
    """The server cannot be reached, or refuses."""


class NoServer(ServerError):
    """Nothing answers at the base URL."""


def create_job(base_url: str, name: str, weight: int) -> None:
    """Make a job and print its id alone, for scripts."""
    print(_ask(base_url, "POST", "/v1/jobs", {"name": name, "weight": weight})["id"])


def show_jobs(base_url: str) -> None:
    """Print a table of jobs."""
    rows = [(job["id"], job["name"], str(job["weight"])) for job in _ask(base_url, "GET", "/v1/jobs")["data"]]
    _print_table(("job", "name", "weight"), rows)


def show_models(base_url: str, config: Path | None, upstream: list[str] | None) -> None:
    """Print what lines can name: what the server has, or without one what `serve` would start with."""
    if config is not None or upstream:
        models = asyncio.run(_configured(config, upstream))
    else:
        try:
            models = _ask(base_url, "GET", "/v1/models")["data"]
        except NoServer:
            models = asyncio.run(_configured(config, upstream))
            would = f"No server at {base_url}; this is what `pronghorn serve` would offer:"
            Console(stderr=True).print(would, style="dim")
    rows = [(m["id"], m["source"], "ready" if m["ready"] else m["detail"] or "not ready") for m in models]
    _print_table(("model", "from", "state"), rows)


async def _configured(config: Path | None, upstream: list[str] | None) -> list[dict[str, Any]]:
    import msgspec

    from pronghorn.cli.serve import settings_from
    from pronghorn.system import build_engines

    engines = build_engines(settings_from(config, upstream=upstream))
    try:
        return [msgspec.to_builtins(model) for model in await engines.survey()]
    finally:
        await engines.stop()


def _ask(base_url: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    try:
        answer = httpx2.request(method, base_url.rstrip("/") + path, json=body, timeout=TIMEOUT_S)
    except httpx2.ConnectError as error:
        raise NoServer(f"no server answers at {base_url}; start one with `pronghorn serve`") from error
    except httpx2.HTTPError as error:
        raise ServerError(f"the server at {base_url} does not answer: {error}") from error
    try:
        content = answer.json()
        if answer.status_code == 200:
            return content
        reason = content["error"]["message"]
    except (ValueError, LookupError, TypeError) as error:
        status = f"{answer.status_code} {answer.reason_phrase}"
        raise ServerError(f"no Pronghorn answers at {base_url}: {status}") from error
    raise ServerError(reason)


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*headings, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
