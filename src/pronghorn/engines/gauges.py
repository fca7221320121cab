"""Reads an engine's own gauges: how many lines it runs and how many wait, from all its clients together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from pronghorn.domain.answers import Answer, Fault
from pronghorn.domain.gauging import Gauges
from pronghorn.engines.client import EngineClient

# vLLM's page has about 100 KiB, SGLang's less; llama.cpp's list of slots had prompts in it once.
PAGE_BYTES_MAX = 1 << 20
# A server that takes longer is too busy to be asked, and what it says too old.
READ_S_MAX = 2.0

# vLLM, whose first engine also knew swapped lines; SGLang; llama.cpp; TGI.
_RUNNING = {
    b"vllm:num_requests_running",
    b"sglang:num_running_reqs",
    b"llamacpp:requests_processing",
    b"tgi_batch_current_size",
}
_WAITING = {
    b"vllm:num_requests_waiting",
    b"vllm:num_requests_swapped",
    b"sglang:num_queue_reqs",
    b"llamacpp:requests_deferred",
    b"tgi_queue_size",
}
_PREEMPTIONS = {b"vllm:num_preemptions_total", b"sglang:num_retracted_requests_total"}


class _Slot(msgspec.Struct):
    is_processing: bool


class GaugeReader:
    """Asks one replica for its gauges: a page of metrics, or llama.cpp's list of slots."""

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        root = base_url.removesuffix("/v1")
        self._client = EngineClient(root, headers=headers, answer_bytes_max=PAGE_BYTES_MAX)

    async def read(self, in_flight: int) -> Gauges | None:
        """Return the gauges, or None where there are none; `in_flight` is what we have there ourselves."""
        gauges = parse_metrics(await self._page("/metrics"))
        return gauges or parse_slots(await self._page("/slots"), in_flight)

    async def close(self) -> None:
        await self._client.close()

    async def _page(self, path: str) -> bytes:
        answer: Answer | Fault = await self._client.request("GET", path, timeout_s=READ_S_MAX)
        return answer.body if isinstance(answer, Answer) and answer.status == 200 else b""


def parse_metrics(page: bytes) -> Gauges | None:
    """Return what a page in Prometheus' text format says, summed over models and replicas, or None if nothing."""
    sums: dict[bytes, float] = {}
    for line in page.splitlines():
        name = line.partition(b"{")[0].partition(b" ")[0]
        if name in _RUNNING or name in _WAITING or name in _PREEMPTIONS:
            sums[name] = sums.get(name, 0.0) + _number(line[len(name) :])
    if not sums.keys() & _RUNNING or not sums.keys() & _WAITING or not all(map(math.isfinite, sums.values())):
        return None
    running, waiting, preemptions = (
        sum(max(0, int(sums[name])) for name in sums.keys() & names) for names in (_RUNNING, _WAITING, _PREEMPTIONS)
    )
    return Gauges(running, waiting, preemptions)


def parse_slots(page: bytes, in_flight: int) -> Gauges | None:
    """Return what llama.cpp's slots tell: once none is free, what we have beyond them waits."""
    try:
        slots = msgspec.json.decode(page, type=list[_Slot])
    except (ValueError, RecursionError):
        return None
    busy = sum(slot.is_processing for slot in slots)
    waiting = max(0, in_flight - busy) if busy == len(slots) else 0
    return Gauges(busy, waiting) if slots else None


def _number(rest: bytes) -> float:
    """Read the value of a sample, which follows its labels and may be followed by a time."""
    try:
        return float(rest.rpartition(b"}")[2].split()[0])
    except (ValueError, IndexError):
        return math.nan
