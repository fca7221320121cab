"""The one thread that runs the model: each step computes a token for every running answer, and parts of prompts.

The event loop hands it prompts and gets tokens back; nothing else is shared between the two.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

log = logging.getLogger("pronghorn.openvino")


class Tokens(msgspec.Struct, frozen=True):
    """New tokens of the choices of one prompt, by choice; `finish` has the reasons of those that have ended."""

    ids: dict[int, list[int]]
    logprobs: dict[int, list[float]]
    finish: dict[int, str]
    ended: bool


@dataclass(eq=False, slots=True)
class Run:
    """One prompt on its way through the model; `deliver` is called on the event loop with what comes out."""

    prompt: Sequence[int]
    config: Any
    deliver: Callable[[Tokens], None]
    each_step: bool
    handle: Any = None
    cancelled: bool = False
    finish: dict[int, str] = field(default_factory=dict)


class Pipeline:
    """OpenVINO GenAI's continuous batching, driven by a thread of its own; build it in a running loop."""

    def __init__(self, batching: Any) -> None:
        self._batching = batching
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._added: deque[Run] = deque()
        self._running: set[Run] = set()
        self._number = 0
        threading.Thread(target=self._drive, daemon=True, name="pipeline").start()

    @property
    def unfinished(self) -> int:
        """How many prompts are running or waiting."""
        return len(self._running) + len(self._added)

    @property
    def scheduled(self) -> int:
        """How many prompts had a part in the last step."""
        return int(self._batching.get_metrics().scheduled_requests) if self._running else 0

    def add(self, run: Run) -> None:
        with self._wake:
            self._added.append(run)
            self._wake.notify()

    def cancel(self, run: Run) -> None:
        """Give up a prompt; nothing more is delivered for it."""
        run.cancelled = True

    def _drive(self) -> None:
        try:
            while True:
                self._take_added()
                self._drop_cancelled()
                if self._running:
                    self._batching.step()
                    self._collect()
        except BaseException:
            # What the pipeline holds is unknown now. The lines in flight are lost with the process and sent again.
            log.critical("a step of the pipeline failed; ending so that a restart can recover", exc_info=True)
            os._exit(1)

    def _take_added(self) -> None:
        import openvino

        with self._wake:
            while not self._added and not self._running:
                self._wake.wait()
            added = [self._added.popleft() for _ in range(len(self._added))]
        for run in added:
            if not run.cancelled:
                tensor = openvino.Tensor(_row(run.prompt))
                run.handle = self._batching.add_request(self._number, tensor, run.config)
                self._number += 1
                self._running.add(run)

    def _drop_cancelled(self) -> None:
        for run in [run for run in self._running if run.cancelled]:
            run.handle.cancel()
            self._running.discard(run)

    def _collect(self) -> None:
        from openvino_genai import GenerationStatus

        delivered = []
        for run in list(self._running):
            ended = run.handle.get_status() != GenerationStatus.RUNNING
            if ended:
                self._running.discard(run)
            if ended or (run.each_step and run.handle.can_read()):
                delivered.append((run, _read(run, ended)))
        if delivered:
            self._loop.call_soon_threadsafe(_deliver, delivered)


def _deliver(results: list[tuple[Run, Tokens]]) -> None:
    for run, tokens in results:
        if not run.cancelled:
            run.deliver(tokens)


def _read(run: Run, ended: bool) -> Tokens:
    from openvino_genai import GenerationFinishReason

    ids: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}
    while run.handle.can_read():
        for choice, output in run.handle.read().items():
            ids.setdefault(choice, []).extend(output.generated_ids)
            logprobs.setdefault(choice, []).extend(output.generated_log_probs)
            if output.finish_reason != GenerationFinishReason.NONE:
                run.finish[choice] = "length" if output.finish_reason == GenerationFinishReason.LENGTH else "stop"
    return Tokens(ids, logprobs, dict(run.finish), ended)


def _row(tokens: Sequence[int]) -> Any:
    import numpy

    return numpy.array([tokens], dtype=numpy.int64)
