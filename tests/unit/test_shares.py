"""Limits that are stated hold for all who share them together."""

from __future__ import annotations

from pathlib import Path

import pytest

from pronghorn.domain.model import Replica
from pronghorn.engines.llamacpp import generators
from pronghorn.settings import LlamaCppSettings


@pytest.mark.parametrize("workers", [1, 3, 4, 64])
@pytest.mark.parametrize("window", [1, 8, 10])
def test_the_windows_of_all_workers_are_the_stated_one_together(window: int, workers: int) -> None:
    replica = Replica("http://engine/v1", window=window)
    shares = [share for index in range(workers) if (share := replica.share(index, workers))]
    windows = [share.window or 0 for share in shares]
    assert sum(windows) == window
    assert min(windows) >= 1
    assert max(windows) - min(windows) <= 1


def test_a_window_that_is_to_be_found_is_not_divided() -> None:
    share = Replica("http://engine/v1").share(1, 2)
    assert share is not None
    assert (share.window, share.slots, share.sharers) == (None, None, 2)


@pytest.mark.parametrize("slots", [1, 3, 6, 10, 64])
@pytest.mark.parametrize("threads", [1, 2, 6, 7])
def test_the_processes_of_llama_cpp_have_the_stated_slots_and_threads_together(slots: int, threads: int) -> None:
    processes = generators(LlamaCppSettings(slots=slots, threads=threads), "a-model", Path("a-model.gguf"))
    assert sum(process.slots for process in processes) == slots
    assert sum(process.threads for process in processes) == threads
    assert all(process.slots and process.threads for process in processes)
