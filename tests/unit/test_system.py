"""What the composition root refuses."""

from __future__ import annotations

import pytest

from pronghorn.errors import UsageError
from pronghorn.settings import Settings, UpstreamSettings
from pronghorn.system import build_engines


def test_an_upstream_is_named_once() -> None:
    same = UpstreamSettings("http://engine:8000"), UpstreamSettings("http://engine:8000/v1/")
    with pytest.raises(UsageError, match="upstream http://engine:8000/v1 is named 2 times"):
        build_engines(Settings(upstream=same))


async def test_an_upstream_may_be_named_once_for_each_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST", "1")
    monkeypatch.setenv("SECOND", "2")
    keys = (UpstreamSettings("http://engine:8000", api_key_env=name) for name in ("FIRST", "SECOND"))
    assert len(build_engines(Settings(upstream=tuple(keys))).replicas()) == 2
