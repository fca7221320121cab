"""`pronghorn run`: one file through the whole pipeline, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pronghorn.domain.lifecycle import TERMINAL, may_follow
from pronghorn.domain.model import (
    DEFAULT_ACCOUNT,
    Batch,
    BatchStamps,
    BatchStatus,
    BlobRef,
    Closing,
    Endpoint,
    File,
    Job,
)
from pronghorn.domain.planning import BOM
from pronghorn.errors import Fenced, PronghornError, StorageError, UsageError, invariant
from pronghorn.limits import FILE_CHUNK_BYTES
from pronghorn.settings import Settings, default_data_dir
from pronghorn.storage.durable import sync_directory
from pronghorn.system import System, running

SUCCEEDED, STOPPED, INVALID, SOME_FAILED = 0, 1, 2, 3
POLL_INTERVAL_S = 0.2
JOB_ID = "job-run"


class NotWritten(PronghornError):
    """A result file cannot be put where the user wants it."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Where a run reads and writes; failed lines go beside the answers when no place is given."""

    input: Path
    output: Path
    errors: Path | None

    @property
    def errors_beside_output(self) -> Path:
        return self.output.with_name(self.output.stem + ".errors.jsonl")


class _Unfinished(msgspec.Struct):
    """What a run leaves in its state directory until its answers are where the user wants them."""

    batch_id: str
    input: str


def state_dir(paths: Paths) -> Path:
    """Return where a run keeps its state: the same command finds it again."""
    names = "\0".join(str(path.absolute()) for path in (paths.input, paths.output))
    return default_data_dir() / "runs" / hashlib.sha256(names.encode()).hexdigest()[:16]


def run(paths: Paths, settings: Settings, *, deduplicate: bool = False) -> int:
    """Run a file's lines and return the exit status."""
    _check_paths(paths)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    status = uvloop.run(_run(paths, settings, deduplicate))
    if status in (SUCCEEDED, SOME_FAILED, INVALID) and Path(settings.data_dir) == state_dir(paths):
        shutil.rmtree(settings.data_dir)
    return status


def _check_paths(paths: Paths) -> None:
    """Raise UsageError for an input that cannot be read, and results that could not be written or would overwrite."""
    if not paths.input.is_file():
        raise UsageError(f"there is no file {paths.input}")
    try:
        with paths.input.open("rb") as source:
            source.read(1)
    except OSError as error:
        raise UsageError(f"cannot read {paths.input}: {error.strerror}") from error
    errors = paths.errors or paths.errors_beside_output
    if len({path.resolve() for path in (paths.input, paths.output, errors)}) < 3:
        raise UsageError("input, output and errors must be three different files")
    for target in (paths.output, errors):
        if target.is_dir():
            raise UsageError(f"{target} is a directory; name a file")
        if not target.parent.is_dir():
            raise UsageError(f"there is no directory {target.parent} to write {target.name} to")
        if not os.access(target.parent, os.W_OK):
            raise UsageError(f"cannot write {target.name} to {target.parent}: it is not writable")


async def _run(paths: Paths, settings: Settings, deduplicate: bool) -> int:
    stop = _stop_on_signal()
    async with running(settings) as system:
        state = Path(settings.data_dir) / "run.json"
        batch = await _resumed(system, paths, state)
        await _give_up_others(system, batch)
        batch = batch or await _begin(system, paths, state, deduplicate)
        batch = await _watch(system, batch, stop)
        if batch.status not in TERMINAL:
            print("pronghorn: stopped; the same command goes on from here", file=sys.stderr)
            return STOPPED
        status = await _deliver(system, batch, paths)
        state.unlink()
        await _forget(system, batch)
        return status


def _stop_on_signal() -> asyncio.Event:
    """Return an event that ^C or SIGTERM sets; a second one ends the process at once, which loses nothing."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(STOPPED)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


async def _resumed(system: System, paths: Paths, state: Path) -> Batch | None:
    """Return the batch that an interrupted run of the same input left, if there is one."""
    unfinished = await asyncio.to_thread(_read_state, state)
    if unfinished is None or unfinished.input != _fingerprint(paths.input):
        return None
    return await system.metadata.batch(unfinished.batch_id, DEFAULT_ACCOUNT)


def _read_state(state: Path) -> _Unfinished | None:
    try:
        return msgspec.json.decode(state.read_bytes(), type=_Unfinished)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


async def _give_up_others(system: System, resumed: Batch | None) -> None:
    """Cancel what a run of another input left unfinished here: nobody waits for it. Other jobs' batches stay."""
    batch: Batch | None
    for batch in await system.metadata.open_batches():
        if batch.job_id != JOB_ID or (resumed is not None and batch.id == resumed.id):
            continue
        while batch is not None and may_follow(batch.status, BatchStatus.CANCELLING):
            try:
                now = system.clock.now()
                batch = await system.metadata.advance(batch, BatchStatus.CANCELLING, now, closing=Closing.CANCELLED)
            except Fenced:  # the coordinator has moved it on meanwhile
                batch = await system.metadata.batch(batch.id, DEFAULT_ACCOUNT)
    system.coordinator.wake()


async def _begin(system: System, paths: Paths, state: Path, deduplicate: bool) -> Batch:
    now = system.clock.now()
    if await system.metadata.job(JOB_ID, DEFAULT_ACCOUNT) is None:
        await system.metadata.add_job(Job(JOB_ID, DEFAULT_ACCOUNT, "run", 1, now))
    # Noted before there is a batch: one that a crash leaves is then always found again.
    unfinished = _Unfinished(system.ids.new("batch_"), _fingerprint(paths.input))
    await asyncio.to_thread(_write_state, state, unfinished)
    file = await _store(system, paths.input)
    batch = await system.metadata.add_batch(
        Batch(
            id=unfinished.batch_id,
            order=0,
            account_id=DEFAULT_ACCOUNT,
            job_id=JOB_ID,
            endpoint=await asyncio.to_thread(_endpoint, paths.input),
            input_file_id=file.id,
            completion_window="unlimited",
            status=BatchStatus.VALIDATING,
            stamps=BatchStamps(created_at=now),
            expires_at=None,
            metadata=None,
            deduplicate=deduplicate,
        )
    )
    system.coordinator.wake()
    return batch


def _write_state(state: Path, unfinished: _Unfinished) -> None:
    scratch = state.with_suffix(".part")
    with scratch.open("wb") as file:
        file.write(msgspec.json.encode(unfinished))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(state)
    sync_directory(state.parent)


async def _store(system: System, path: Path) -> File:
    """Copy the input, so that editing it while the run goes on changes nothing."""

    def copy(key: str) -> int:
        with path.open("rb") as source, system.blobs.writer(key) as writer:
            while chunk := source.read(FILE_CHUNK_BYTES):
                writer.write(chunk)
            writer.commit()
            return writer.bytes

    file_id = system.ids.new("file-")
    key = f"files/{file_id}"
    size = await asyncio.to_thread(copy, key)
    file = File(file_id, DEFAULT_ACCOUNT, "batch", path.name, size, system.clock.now())
    await system.files.add(file, [BlobRef(key, size)])
    return file


def _endpoint(path: Path) -> Endpoint:
    """Return the endpoint that the first line names; validation speaks up if it is none or another line differs."""
    with path.open("rb") as source:
        first = next((line for line in iter(lambda: source.readline(FILE_CHUNK_BYTES), b"") if line.strip()), b"")
    try:
        return Endpoint(msgspec.json.decode(first.removeprefix(BOM))["url"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return Endpoint.CHAT_COMPLETIONS


async def _watch(system: System, batch: Batch, stop: asyncio.Event) -> Batch:
    """Show progress until the batch has ended or a signal came."""
    with _Bar() as bar:
        while not stop.is_set() and batch.status not in TERMINAL:
            current = await system.metadata.batch(batch.id, DEFAULT_ACCOUNT)
            invariant(current is not None, "a batch does not vanish while it runs")
            batch = current or batch
            bar.show(batch, system.clock.monotonic())
            try:
                async with asyncio.timeout(POLL_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                continue
    return batch


class _Bar:
    """The progress bar on stderr: lines, lines/s, tokens/s, time left, and why nothing moves if nothing does."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[reason]}"),
            console=Console(stderr=True),
        )
        self._task: TaskID = self._progress.add_task("validating", total=None, rates="", reason="")
        self._since: tuple[float, int, int] | None = None

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, batch: Batch, now: float) -> None:
        self._progress.update(
            self._task,
            description=batch.status.replace("_", " "),
            total=batch.total or None,
            completed=batch.tally.lines,
            rates=self._rates(batch.tally.lines, batch.tally.tokens, now),
            reason=(batch.progress and batch.progress.reason) or "",
        )

    def _rates(self, lines: int, tokens: int, now: float) -> str:
        if self._since is None:
            self._since = now, lines, tokens
        start, lines_before, tokens_before = self._since
        elapsed = now - start
        if elapsed < 1.0:
            return ""
        return f"{(lines - lines_before) / elapsed:,.1f} lines/s  {(tokens - tokens_before) / elapsed:,.0f} tokens/s"


async def _deliver(system: System, batch: Batch, paths: Paths) -> int:
    """Put the results where the user wants them and return the exit status."""
    if batch.status is BatchStatus.FAILED:
        for message in _problems(batch, paths.input):
            print(message, file=sys.stderr)
        return INVALID
    await _export(system, batch.output_file_id, paths.output)
    errors = paths.errors or (paths.errors_beside_output if batch.error_file_id else None)
    if errors is not None:
        await _export(system, batch.error_file_id, errors)
    else:
        paths.errors_beside_output.unlink(missing_ok=True)  # an earlier run's
    tally = batch.tally
    unsuccessful = tally.failed + tally.unrun
    where = f"; the {unsuccessful} others are in {errors}" if unsuccessful else ""
    if batch.copies:
        print(f"pronghorn: {batch.copies} lines were not run because earlier ones have their bodies", file=sys.stderr)
    print(f"pronghorn: {tally.completed} of {batch.total} lines succeeded: {paths.output}{where}", file=sys.stderr)
    return SOME_FAILED if unsuccessful else SUCCEEDED


async def _forget(system: System, batch: Batch) -> None:
    """Give back the room that a run has taken in a data directory that stays."""
    for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        if file_id is not None:
            await system.files.delete(file_id, DEFAULT_ACCOUNT)
    with contextlib.suppress(StorageError, OSError):  # what stays here now, the next start removes
        while keys := await system.files.removals():
            for key in keys:
                await system.blobs.delete(key)
            await system.files.removed(keys)


async def _export(system: System, file_id: str | None, target: Path) -> None:
    """Write a result file whole or not at all; no file id means no lines.

    Raises NotWritten, after which the same command tries again.
    """
    blobs = [] if file_id is None else await system.files.blobs(file_id)
    content = system.blobs.read(blobs, 0, sum(blob.bytes for blob in blobs))
    scratch = target.with_name(target.name + ".part")
    try:
        with scratch.open("wb") as copy:
            async for chunk in content:
                await asyncio.to_thread(copy.write, chunk)
            copy.flush()
            os.fsync(copy.fileno())
        scratch.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        reason = f"cannot write {target}: {error.strerror}; every line has been run, and the same command tries again"
        raise NotWritten(reason) from error


def _problems(batch: Batch, path: Path) -> Iterator[str]:
    for problem in msgspec.json.decode(batch.problems or b"[]"):
        where = f"{path}:{problem['line']}" if problem["line"] is not None else str(path)
        yield f"pronghorn: {where}: {problem['message']} ({problem['code']})"


def _fingerprint(path: Path) -> str:
    stat = path.stat()
    return f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
