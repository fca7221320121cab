"""Every setting, once: the configuration file and docs/SETTINGS.md come from this table, and flags are laid over it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import platformdirs
from msgspec import Meta

from pronghorn.domain.addresses import ALLOWED_PATTERN
from pronghorn.errors import UsageError
from pronghorn.limits import LINE_BYTES_MAX, MIB

Positive = Annotated[int, Meta(ge=1)]


class UpstreamSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An OpenAI-compatible server that lines go to."""

    url: Annotated[str, Meta(description="base URL, ending in /v1 as OpenAI clients write it")]
    api_key_env: Annotated[
        str | None, Meta(description="environment variable that holds the key; no key is sent without it")
    ] = None
    models: Annotated[
        tuple[str, ...] | None, Meta(description="model names it answers; asked from its /v1/models when left out")
    ] = None
    window: Annotated[
        Positive | None, Meta(description="lines in flight at once; found by measurement when left out")
    ] = None


class EmbeddedSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the embedded engines have in common."""

    model: Annotated[
        str | None, Meta(description="a GGUF file, or a directory of them; the built-in small model when left out")
    ] = None
    slots: Annotated[Positive | None, Meta(description="lines run at once; from cores and memory when left out")] = None
    threads: Annotated[Positive | None, Meta(description="threads of the engine; one a core when left out")] = None
    context_tokens: Annotated[int, Meta(ge=256, description="prompt and answer of one line, in tokens")] = 2048
    answer_tokens: Annotated[
        int, Meta(ge=1, description="longest answer to a line that sets no max_tokens of its own, in tokens")
    ] = 512


class LlamaCppSettings(EmbeddedSettings, forbid_unknown_fields=True, frozen=True):
    """The embedded engine."""


class OpenVinoSettings(EmbeddedSettings, forbid_unknown_fields=True, frozen=True):
    """The embedded engine for processors that it suits."""

    use: Annotated[
        Literal["auto", "always", "never"],
        Meta(description="whether it generates; auto: where it is installed and faster, unless llamacpp has a model"),
    ] = "auto"


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The server's settings."""

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 picks a free one")] = 8080
    data_dir: Annotated[str, Meta(description="where files, batches and the database live")] = ""
    default_job: Annotated[
        str | None, Meta(description="job of batches that name none, for clients that cannot send a job_id")
    ] = None
    upstream: Annotated[
        tuple[UpstreamSettings, ...], Meta(description="servers to send lines to; the embedded engine when empty")
    ] = ()
    llamacpp: Annotated[LlamaCppSettings, Meta(description="the embedded engine")] = LlamaCppSettings()
    openvino: Annotated[OpenVinoSettings, Meta(description="the embedded engine for processors that it suits")] = (
        OpenVinoSettings()
    )
    prompt_order: Annotated[
        bool, Meta(description="send lines whose prompts begin alike one after the other, not in the order of the file")
    ] = True
    workers: Annotated[int, Meta(ge=1, le=64, description="worker processes that send lines")] = 1
    line_bytes_max: Annotated[int, Meta(ge=1024, description="longest input line, in bytes")] = LINE_BYTES_MAX
    line_timeout_s: Annotated[float, Meta(gt=0, description="longest time an engine may take for one line")] = 3600.0
    refused_pause_s: Annotated[
        float,
        Meta(gt=0, description="how long an engine that refuses the key, or whose quota is used up, is left alone"),
    ] = 300.0
    model_grace_s: Annotated[
        float,
        Meta(
            ge=0,
            description="how long an engine that does not know a model, or is away while another fails lines, "
            "is waited for before lines fail",
        ),
    ] = 600.0
    answer_bytes_max: Annotated[int, Meta(ge=1024, description="largest answer of an engine, in bytes")] = 64 * MIB
    webhook_allow: Annotated[
        tuple[Annotated[str, Meta(pattern=ALLOWED_PATTERN)], ...],
        Meta(description="hosts, or host:port, that webhooks may go to although not public, and by http:// too"),
    ] = ()
    batch_file_expires_s: Annotated[
        Positive | None,
        Meta(description="life of an uploaded batch input that asks for none, in seconds; for ever when left out"),
    ] = None
    drain_s: Annotated[float, Meta(ge=0, description="how long a stopping server waits for lines in flight")] = 10.0


def default_data_dir() -> Path:
    """Return the user's own directory for Pronghorn's data."""
    return Path(platformdirs.user_data_dir("pronghorn", appauthor=False))


def load(config: Path | None, overrides: dict[str, object]) -> Settings:
    """Read a configuration file, lay the command line's values over it, and check the whole.

    Raises UsageError naming the file and the setting.
    """
    values: dict[str, object] = {}
    if config is not None:
        try:
            values = tomllib.loads(config.read_text())
        except OSError as error:
            raise UsageError(f"cannot read {config}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{config} is not TOML: {error}") from error
    values |= overrides
    try:
        settings = msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise UsageError(f"{config or 'command line'}: {error}") from error
    return msgspec.structs.replace(settings, data_dir=settings.data_dir or str(default_data_dir()))
