"""The composition root of everything behind the wire: storage, engines, workers, coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sqlalchemy import URL

from pronghorn.checking import InputChecker
from pronghorn.clock import Clock, SystemClock
from pronghorn.control.coordinator import Coordinator
from pronghorn.control.finalizer import Finalizer
from pronghorn.control.maintenance import Maintenance
from pronghorn.control.orphans import Orphans
from pronghorn.control.planner import Planner
from pronghorn.control.webhooks import Courier
from pronghorn.domain.addresses import AllowedHosts
from pronghorn.domain.model import DEFAULT_ACCOUNT
from pronghorn.engines.base import Engine, EnginePool
from pronghorn.engines.embedded import PreferredEngine
from pronghorn.engines.live import Relay
from pronghorn.engines.llamacpp import LlamaCppEngine
from pronghorn.engines.openvino.engine import OpenVinoEngine
from pronghorn.engines.openvino.engine import suits as openvino_suits
from pronghorn.engines.upstream import UpstreamEngine, base_url
from pronghorn.errors import UsageError
from pronghorn.executors.local import LocalExecutor
from pronghorn.ids import Ids, RandomIds
from pronghorn.settings import Settings
from pronghorn.storage import durable
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata
from pronghorn.storage.room import Room
from pronghorn.storage.segments import Segments
from pronghorn.storage.uploads import Uploads
from pronghorn.storage.webhooks import Webhooks
from pronghorn.worker.protocol import Configure

log = logging.getLogger("pronghorn.system")


@dataclass(frozen=True, slots=True)
class System:
    """The running parts that a front (the HTTP server, `pronghorn run`) builds on."""

    metadata: Metadata
    files: Files
    uploads: Uploads
    blobs: Blobs
    engines: EnginePool
    checker: InputChecker
    coordinator: Coordinator
    relay: Relay
    webhooks: Webhooks
    courier: Courier
    clock: Clock
    ids: Ids


def build_engines(settings: Settings) -> EnginePool:
    """Return the engines that the settings name: the upstreams if there are any, else the embedded ones.

    Raises UsageError for an upstream that is named twice with the same key: it would get twice its window.
    """
    named = Counter((base_url(upstream.url), upstream.api_key_env) for upstream in settings.upstream)
    for (url, _), times in named.items():
        if times > 1:
            raise UsageError(f"upstream {url} is named {times} times")
    engines: list[Engine] = [UpstreamEngine(upstream) for upstream in settings.upstream]
    return EnginePool(engines or _embedded(settings))


def _embedded(settings: Settings) -> list[Engine]:
    """Return OpenVINO, with llama.cpp for embeddings, where that is wanted or suits; else llama.cpp alone."""
    openvino, embedder = OpenVinoEngine(settings.openvino), LlamaCppEngine(settings.llamacpp, generates=False)
    match settings.openvino.use:
        case "always":
            return [openvino, embedder]
        case "auto" if settings.llamacpp.model is None and openvino_suits():
            same_model = msgspec.structs.replace(settings.llamacpp, model=settings.openvino.model)
            return [PreferredEngine(openvino, LlamaCppEngine(same_model, embeds=False)), embedder]
        case _:
            return [LlamaCppEngine(settings.llamacpp)]


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[System]:
    """Start everything, and on leaving drain the lines in flight and stop it.

    Raises UsageError when another process uses the data directory, EngineError when no engine can work.
    """
    data_dir = Path(settings.data_dir)
    _allow_open_files()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_locked(data_dir))
        clock, ids = SystemClock(), RandomIds()
        database = await asyncio.to_thread(Database, URL.create("sqlite", database=str(data_dir / "pronghorn.db")))
        metadata = Metadata(database)
        stack.push_async_callback(metadata.close)
        await metadata.add_account(DEFAULT_ACCOUNT, "default", clock.now())
        await asyncio.to_thread(durable.make_directory, data_dir / "blobs")
        blobs, segments = Blobs(data_dir / "blobs", Room(data_dir)), Segments(data_dir / "segments")
        files, uploads = Files(database), Uploads(database)
        await uploads.drop_interrupted()
        orphans = await asyncio.to_thread(Orphans, metadata, files, blobs, segments)
        engines = build_engines(settings)
        await engines.start()
        stack.push_async_callback(engines.stop)
        checker = InputChecker(files, blobs, engines, line_bytes_max=settings.line_bytes_max)
        webhooks = Webhooks(database)
        courier = Courier(webhooks, clock, AllowedHosts(settings.webhook_allow))
        coordinator = Coordinator(
            metadata=metadata,
            files=files,
            segments=segments,
            engines=engines,
            executor=LocalExecutor(),
            planner=Planner(metadata, checker, clock),
            finalizer=Finalizer(metadata, files, blobs, segments, clock, ids),
            clock=clock,
            configure=_configure(settings, data_dir),
            workers=settings.workers,
            batch_ended=courier.wake,
        )
        relay = Relay(
            engines,
            leave_room=coordinator.leave_room,
            answer_s_max=settings.line_timeout_s,
            answer_bytes_max=settings.answer_bytes_max,
        )
        stack.push_async_callback(relay.close)
        maintenance = Maintenance(files, uploads, webhooks, blobs, orphans, clock)
        await stack.enter_async_context(_at_work(coordinator, courier, maintenance, settings.drain_s))
        yield System(
            metadata=metadata,
            files=files,
            uploads=uploads,
            blobs=blobs,
            engines=engines,
            checker=checker,
            coordinator=coordinator,
            relay=relay,
            webhooks=webhooks,
            courier=courier,
            clock=clock,
            ids=ids,
        )


def _configure(settings: Settings, data_dir: Path) -> Configure:
    return Configure(
        blobs_dir=str(data_dir / "blobs"),
        segments_dir=str(data_dir / "segments"),
        answer_bytes_max=settings.answer_bytes_max,
        line_timeout_s=settings.line_timeout_s,
        refused_pause_s=settings.refused_pause_s,
        model_grace_s=settings.model_grace_s,
        prompt_order=settings.prompt_order,
    )


@contextlib.asynccontextmanager
async def _at_work(
    coordinator: Coordinator, courier: Courier, maintenance: Maintenance, drain_s: float
) -> AsyncIterator[None]:
    """Run what works in the background; on leaving let lines in flight finish for up to `drain_s`."""
    maintaining = asyncio.create_task(maintenance.run())
    coordinating = asyncio.create_task(coordinator.run(), name="coordinator")
    coordinating.add_done_callback(_end_on_failure)
    delivering = asyncio.create_task(courier.run(), name="courier")
    delivering.add_done_callback(_end_on_failure)
    try:
        yield
    finally:
        maintaining.cancel()
        coordinator.stop(drain_s)
        await asyncio.gather(coordinating, maintaining, return_exceptions=True)
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)


def _allow_open_files() -> None:
    """Take all open files that this process may have, for itself and its workers: the usual 1,024 are for programs
    that use select(). Each client, and each line in flight, is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS promises more than it gives
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for this process alone; the lock goes when the process does, however it ends."""
    try:
        durable.make_directory(data_dir)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"cannot use {data_dir} as data directory: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UsageError(f"{data_dir} is in use by another pronghorn; give this one its own --data-dir") from error
    try:
        yield
    finally:
        os.close(descriptor)


def _end_on_failure(task: asyncio.Task[None]) -> None:
    """A server whose coordinator or courier has failed must not look alive: end, and recover at the next start."""
    if not task.cancelled() and (error := task.exception()):
        log.critical("the %s failed; ending so that a restart can recover", task.get_name(), exc_info=error)
        os._exit(1)
