"""Which schemas the OpenVINO pipeline can read is found out by a process of its own, whose end is no schema's fault."""

from __future__ import annotations

import sys

import pytest

from pronghorn.engines.child import end_child
from pronghorn.engines.openvino import grammars
from pronghorn.engines.openvino.grammars import Grammars
from pronghorn.errors import EngineFailed

READS_ALL = "print('READY', flush=True)\nwhile input(): print('OK', flush=True)"


def trying(script: str) -> Grammars:
    found = Grammars("model.gguf")
    found._command = (sys.executable, "-c", script)
    return found


async def test_a_process_that_has_ended_between_two_schemas_is_started_again() -> None:
    tried = trying(READS_ALL)
    await tried.check("{}")
    first = tried._process
    assert first is not None
    first.kill()
    await first.wait()
    await tried.check('{"type": "object"}')
    second = tried._process
    assert second is not None
    assert second is not first
    await end_child(second)


async def test_a_process_that_does_not_start_in_time_is_an_error_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "START_S_MAX", 0.0)
    with pytest.raises(EngineFailed):
        await trying("input()").check("{}")
