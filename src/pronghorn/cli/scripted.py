"""`pronghorn engine scripted`: the scripted engine as a process of its own."""

from __future__ import annotations

import asyncio
import signal

import msgspec
import uvloop

from pronghorn.engines.scripted import ScriptedOptions, serve_scripted
from pronghorn.errors import UsageError


def serve(port: int, settings: list[str]) -> None:
    """Serve until SIGTERM or ^C."""
    uvloop.run(_serve(_options(port, settings)))


async def _serve(options: ScriptedOptions) -> None:
    serving = asyncio.create_task(serve_scripted(options, lambda base_url: print(base_url, flush=True)))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    await asyncio.wait({serving})
    if not serving.cancelled():
        serving.result()


def _options(port: int, settings: list[str]) -> ScriptedOptions:
    values: dict[str, object] = {"port": port}
    fields = {field.name: field for field in msgspec.structs.fields(ScriptedOptions)}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in fields:
            known = ", ".join(fields)
            raise UsageError(f"--set {setting}: expected NAME=VALUE with one of the names {known}")
        default = fields[name].default
        values[name] = value.split(",") if isinstance(default, tuple) else value
    try:
        return msgspec.convert(values, ScriptedOptions, strict=False, dec_hook=_path)
    except msgspec.ValidationError as error:
        raise UsageError(f"scripted engine: {error}") from error


def _path(kind: type, value: object) -> object:
    """Return the path that a setting's text names; msgspec asks for no other type that it does not know."""
    return kind(value)
