"""What engines say about themselves, as they write it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.domain.gauging import Gauges
from pronghorn.engines import scripted
from pronghorn.engines.gauges import GaugeReader, parse_metrics, parse_slots
from pronghorn.engines.scripted import ScriptedOptions

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a"} 3.0
vllm:num_requests_running{engine="1",model_name="a"} 4.0
vllm:num_requests_waiting{engine="0",model_name="a"} 2.0
vllm:num_requests_waiting{engine="1",model_name="a"} 0.0 1395066363000
vllm:num_requests_waiting_by_reason{engine="0",model_name="a",reason="capacity"} 2.0
vllm:num_preemptions_total{engine="0",model_name="a"} 11.0
vllm:num_preemptions_created{engine="0",model_name="a"} 1.7e+09
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.25
"""
VLLM_V0 = b"""vllm:num_requests_running{model_name="a } {"} 3.0
vllm:num_requests_swapped{model_name="a } {"} 1.0
vllm:num_requests_waiting{model_name="a } {"} 2.0
"""
SGLANG = b"""sglang:num_running_reqs{model_name="a"} 5.0
sglang:num_queue_reqs{model_name="a"} 1e+01
sglang:num_retracted_reqs{model_name="a"} 1.0
sglang:num_retracted_requests_total{model_name="a"} 7.0
sglang:token_usage{model_name="a"} 0.28
"""
LLAMACPP = b"llamacpp:requests_processing 4\nllamacpp:requests_deferred 9\nllamacpp:kv_cache_usage_ratio nan\n"
TGI = b"tgi_batch_current_size 6\ntgi_queue_size 2\n"


@pytest.mark.parametrize(
    ("page", "gauges"),
    [
        (VLLM, Gauges(7, 2, 11)),
        (VLLM_V0, Gauges(3, 3, 0)),
        (SGLANG, Gauges(5, 10, 7)),
        (LLAMACPP, Gauges(4, 9, 0)),
        (TGI, Gauges(6, 2, 0)),
        (b"process_cpu_seconds_total 1\n", None),
        (b"vllm:num_requests_running 1\n", None),
        (b"tgi_batch_current_size 6\ntgi_queue_size\n", None),
        (b"tgi_batch_current_size 6\ntgi_queue_size NaN\n", None),
        (b"<html>", None),
    ],
)
def test_each_engine_has_names_of_its_own(page: bytes, gauges: Gauges | None) -> None:
    assert parse_metrics(page) == gauges


def test_lines_beyond_the_slots_of_llama_cpp_wait() -> None:
    busy, free = b'{"id":0,"is_processing":true,"n_ctx":512}', b'{"id":1,"is_processing":false}'
    assert parse_slots(b"[%b,%b]" % (busy, busy), 5) == Gauges(2, 3)
    assert parse_slots(b"[%b,%b]" % (busy, free), 5) == Gauges(1, 0)
    assert parse_slots(b"[]", 5) is None
    assert parse_slots(b'{"error":{"code":501}}', 5) is None


@given(st.binary(max_size=200))
def test_no_page_breaks_the_reader(page: bytes) -> None:
    parse_slots(page, 1)
    parse_metrics(page)
    parse_metrics(b"vllm:num_requests_running" + page + b"\nvllm:num_requests_waiting 1\n")


async def test_gauges_are_beside_the_base_url() -> None:
    engine = await scripted.start(ScriptedOptions())
    reader = GaugeReader(engine.base_url, {})
    try:
        assert await reader.read(0) == Gauges(0, 0, 0)
    finally:
        await reader.close()
        await engine.stop()


async def test_an_engine_without_gauges_or_none_at_all_has_none() -> None:
    engine = await scripted.start(ScriptedOptions(gauges=False))
    reader = GaugeReader(engine.base_url, {})
    try:
        assert await reader.read(0) is None
        await engine.stop()
        assert await reader.read(0) is None
    finally:
        await reader.close()
