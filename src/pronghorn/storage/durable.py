"""Making bytes and names survive a power cut, and what happens when the disk will not.

After a failed fsync the kernel takes the pages for clean, and later ones report success falsely: nothing that this
process holds can be trusted any more. It ends, loudly, and the next start recovers from what is on the disk.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

from pronghorn.errors import is_full

# sysexits.h: an error occurred while doing I/O on some file.
EXIT_DISK_FAILED = 74


def sync_file(descriptor: int, path: Path) -> None:
    """Wait until a file's content is on disk; an error other than a full disk ends the process."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        refused(error, path)


def begin_sync(descriptor: int, start: int, length: int) -> None:
    """Have the kernel begin to write a part of a file, without waiting: `sync_file` then has less to wait for.

    What is being written stays in the page cache. Where the file system has no such call, nothing happens.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut; an error other than a full disk ends the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        sync_file(descriptor, directory)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create a directory and its missing parents so that their names survive a power cut."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def refused(error: OSError, path: Path) -> NoReturn:
    """Raise what a write or an fsync has raised if it says that the disk is full, and else end the process."""
    if is_full(error):
        raise error
    end_process(f"{path} cannot be written: {error.strerror}")


def end_process(what: str) -> NoReturn:
    """Say on stderr that the disk has failed and end at once, so that nothing more is acknowledged."""
    print(
        f"pronghorn: the disk has failed: {what}. Nothing that was acknowledged is lost by this; "
        "check the disk (dmesg, smartctl), then start again.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_DISK_FAILED)


def end_without(path: Path) -> NoReturn:
    """Say on stderr that what everything is written to has been taken away and end at once."""
    print(f"pronghorn: {path} has been removed or replaced while it was in use", file=sys.stderr, flush=True)
    os._exit(EXIT_DISK_FAILED)


def end_with_worker() -> NoReturn:
    """End as a worker of this process has, which has said on stderr why."""
    os._exit(EXIT_DISK_FAILED)
