"""An ext4 file system in a file, whose power can be cut: what was not synced is gone. Linux and root only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pronghorn.limits import MIB
from tests.beds import require_program, require_root
from tests.processes import POLL_S, START_S

DISK_BYTES = 64 * MIB
# linux/fs.h: end at once, and write nothing more, not even what is in the file system's own log in memory.
_SHUT_DOWN, _NO_LOG_FLUSH = 0x8004587D, struct.pack("I", 2)


class PowerDisk:
    """A mounted file system; between `cut` and `restore` every write to it fails."""

    def __init__(self, image: Path, path: Path) -> None:
        self._image = image
        self.path = path

    def cut(self) -> None:
        """Take the power away; call `restore` once nothing has a file open there."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUT_DOWN, _NO_LOG_FLUSH)
        finally:
            os.close(descriptor)

    def restore(self) -> None:
        """Mount what the disk holds; the file system replays its log as after any crash."""
        self.unmount()
        self.mount()

    def unmount(self) -> None:
        """Unmount it, once the last process that was killed has gone."""
        deadline = time.monotonic() + START_S
        while subprocess.run(["umount", self.path], capture_output=True).returncode:
            assert time.monotonic() < deadline, f"{self.path} is still used by {_users_of(self.path)}"
            time.sleep(POLL_S)

    def mount(self) -> None:
        # The loop device belongs to the mount and goes with it.
        subprocess.run(["mount", "-o", "loop", self._image, self.path], check=True)


def _users_of(path: Path) -> list[str]:
    """Return the processes that have a file open there or stand in it, each with its state and its command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            links = [process / "cwd", *(process / "fd").iterdir(), *(process / "map_files").iterdir()]
            if any(str(link.readlink()).startswith(str(path)) for link in links):
                state = (process / "status").read_text().split("State:\t")[1].split("\n")[0]
                found.append(f"{process.name} ({state}): {(process / 'cmdline').read_text().replace(chr(0), ' ')}")
    return found


def in_memory() -> str | None:
    """Return a folder whose files are synced in no time, for tests that sync thousands; None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextlib.contextmanager
def power_disk() -> Iterator[PowerDisk]:
    """Make a file system and mount it; whatever happens, no mount, device or file is left."""
    require_root()
    require_program("mkfs.ext4")
    with tempfile.TemporaryDirectory(prefix="pronghorn-disk-", dir=in_memory()) as folder:
        image, path = Path(folder) / "image", Path(folder) / "disk"
        path.mkdir()
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        disk = PowerDisk(image, path)
        disk.mount()
        try:
            yield disk
        finally:
            try:
                disk.unmount()
            finally:
                subprocess.run(["umount", "--lazy", path], capture_output=True)
