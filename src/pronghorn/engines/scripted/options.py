"""Every setting of the scripted engine, in one table: name, type and bounds, default, help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pronghorn.engines.scripted.faults import TRANSIENT_KINDS, FaultKind

CapacityName = Literal["unlimited", "slots", "kv", "rate_limit"]


class ScriptedOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one scripted engine answers; each field's help is its `Meta.description`.

    Raises msgspec.ValidationError, naming the field, when a value is out of its bounds.
    """

    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 picks a free one.")] = 0
    models: Annotated[tuple[str, ...], Meta(min_length=1, description="Models it serves; any other answers 404.")] = (
        "scripted",
    )

    answer_bytes: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Pad every answer's text to this many bytes; unset leaves it as short as it is."),
    ] = None
    embedding_dimensions: Annotated[
        int, Meta(ge=1, le=8192, description="Length of an embedding where the line names none.")
    ] = 8

    capacity: Annotated[
        CapacityName,
        Meta(
            description="Model of the server: unlimited, slots (queue beyond them), kv (slots whose tokens share a "
            "memory; where it is full, the youngest line waits again), rate_limit (429 beyond it)."
        ),
    ] = "unlimited"
    latency_ms: Annotated[float, Meta(ge=0, description="Time that every answer takes, in milliseconds.")] = 0.0
    token_ms: Annotated[float, Meta(ge=0, description="Time added for each output token, in milliseconds.")] = 0.0
    slots: Annotated[int, Meta(ge=1, description="Lines served at once, with capacity slots or kv.")] = 16
    kv_tokens: Annotated[
        int,
        Meta(ge=1, description="Tokens in memory, prompts (four bytes each) and answers so far, with capacity kv."),
    ] = 16_384
    dip_at_s: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="Halve the slots so many seconds after the first line; unset never does."),
    ] = None
    dip_s: Annotated[float, Meta(gt=0, description="Give the slots back after so many seconds.")] = 60.0
    gauges: Annotated[
        bool, Meta(description="Offer vLLM's gauges at /metrics; without them the engine is a black box.")
    ] = True
    requests_per_s: Annotated[
        float, Meta(gt=0, description="Lines accepted a second, with capacity rate_limit; the burst is one second's.")
    ] = 100.0

    seed: Annotated[int, Meta(description="Chooses which attempts are faulty; the same seed, the same faults.")] = 0
    fault_rate: Annotated[float, Meta(ge=0, le=1, description="Share of attempts that get a fault.")] = 0.0
    fault_kinds: Annotated[
        tuple[FaultKind, ...], Meta(min_length=1, description="Faults to draw from, with equal chances.")
    ] = TRANSIENT_KINDS
    fault_attempts_max: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Drawn faults a line gets before it is answered properly; unset means no end."),
    ] = None
    retry_after_s: Annotated[
        float, Meta(ge=0, description="What a rate_limited fault asks the client to wait, in seconds.")
    ] = 1.0
    trickle_ms: Annotated[
        float, Meta(ge=0, description="Time over which a trickle fault spreads an answer, in milliseconds.")
    ] = 2000.0
    allow_crash: Annotated[
        bool, Meta(description="Let a crash fault end the process; otherwise it only disconnects.")
    ] = False

    keep_alive_timeout_s: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Close a connection idle for so long; unset never does. vLLM's is 5 s."),
    ] = 5.0
    body_bytes_max: Annotated[int, Meta(ge=1, description="A longer request body is refused with 413.")] = 64 << 20

    ledger_path: Annotated[
        Path | None,
        Meta(description="Append one JSON line a request to this file; a restarted engine counts on from it."),
    ] = None
    ledger_keys_max: Annotated[
        int, Meta(ge=1, description="Lines to remember, about 170 bytes each; the oldest are forgotten first.")
    ] = 1_000_000

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(type(self)):
            try:
                msgspec.convert(getattr(self, field.name), field.type)
            except msgspec.ValidationError as error:
                raise msgspec.ValidationError(f"{field.name}: {error}") from None
