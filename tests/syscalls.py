"""A process whose every call with a lasting effect is announced before it happens, and let through, refused or not.

The kernel asks us through a seccomp listener: one ordered stream for all threads and children of the process, so that
"before the nth call" is one exact moment. That is what strace's injection cannot give: it counts in each thread apart.
Linux on x86-64 and ARM only; neither root nor another package is needed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# Numbers on (x86-64, ARM); the calls of old that ARM never had have none.
_NUMBERS = {
    "write": (1, 64),
    "pwrite64": (18, 68),
    "writev": (20, 66),
    "pwritev": (296, 70),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "openat": (257, 56),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
}
SYNCS = frozenset({"fsync", "fdatasync"})
WRITES = frozenset({"write", "pwrite64", "writev", "pwritev"})
# What takes room on a disk, or may.
TAKES_ROOM = WRITES | {"ftruncate", "fallocate", "openat", "mkdir", "mkdirat", "rename", "renameat", "renameat2"}
_BY_PATH = {"rename": 0, "unlink": 0, "mkdir": 0, "rmdir": 0}
_BY_PATH_AT = frozenset({"openat", "renameat", "renameat2", "unlinkat", "mkdirat"})

_MACHINES = {"x86_64": (0, 0xC000003E, 317, 438), "aarch64": (1, 0xC00000B7, 277, 438)}
_COLUMN, _ARCHITECTURE, _SECCOMP, _PIDFD_GETFD = _MACHINES.get(platform.machine(), _MACHINES["x86_64"])
_NUMBER_OF = {name: numbers[_COLUMN] for name, numbers in _NUMBERS.items() if numbers[_COLUMN] is not None}
_NAME_OF = {number: name for name, number in _NUMBER_OF.items()}

# linux/seccomp.h, linux/filter.h
_NOTICE = struct.Struct("<QIIiIQ6Q")
_REPLY = struct.Struct("<QqiI")
_RECEIVE = 3 << 30 | _NOTICE.size << 16 | ord("!") << 8
_SEND = 3 << 30 | _REPLY.size << 16 | ord("!") << 8 | 1
_GO_ON = 1
_ALLOW, _ASK = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_FLAGS_OF_OPENAT = 16 + 8 * 2


class Kill(NamedTuple):
    """Ends the process that was about to make the call."""


class Call(NamedTuple):
    """What is about to happen; `path` is the file's, a socket's is None."""

    name: str
    pid: int
    path: str | None

    def concerns(self, directory: Path, suffix: str = "") -> bool:
        """Tell whether the call is about a directory or something below it, of a certain kind."""
        path = self.path or ""
        return (path == str(directory) or path.startswith(f"{directory}/")) and path.endswith(suffix)


# None lets the call happen; a number is the errno that it fails with instead.
Answer = Kill | int | None
Decide = Callable[[Call], Answer]


class Watched:
    """Asks `decide` about every call of one process and its children, in the order in which they are made.

    Of writes, those to files and sockets are asked about; `decide` runs on a thread of its own.
    """

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._processes: dict[int, int] = {}
        self.failure: BaseException | None = None

    def start(self, command: Sequence[str], **arguments: object) -> subprocess.Popen[str]:
        """Start the command, watched from its first instruction; `arguments` are Popen's."""
        ours, theirs = socket.socketpair()
        launch = [sys.executable, "-S", "-E", __file__, str(theirs.fileno()), *command]
        with ours:
            with theirs:
                child: subprocess.Popen[str] = subprocess.Popen(launch, pass_fds=[theirs.fileno()], **arguments)  # type: ignore[call-overload]
            _, (listener, *_), _, _ = socket.recv_fds(ours, 1, 1)
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return child

    def _serve(self, listener: int) -> None:
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        try:
            while not any(event & select.POLLHUP for _, event in waiting.poll()):
                self._answer(listener)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            os.close(listener)

    def _answer(self, listener: int) -> None:
        notice = bytearray(_NOTICE.size)
        with suppress(FileNotFoundError):  # whoever asked has been killed
            fcntl.ioctl(listener, _RECEIVE, notice)
            notice_id, thread, _, number, _, _, *arguments = _NOTICE.unpack(notice)
            answer = None
            with suppress(FileNotFoundError, ProcessLookupError):
                answer = self._judge(thread, _NAME_OF[number], arguments)
            failure, flags = (-answer, 0) if answer else (0, _GO_ON)
            fcntl.ioctl(listener, _SEND, _REPLY.pack(notice_id, 0, failure, flags))

    def _judge(self, thread: int, name: str, arguments: Sequence[int]) -> int | None:
        pid = self._process_of(thread)
        path = _path(thread, name, arguments)
        if path is not None and not path.startswith(("/", "socket:")):
            return None  # an event or a pipe: it wakes a thread, and nothing lasts
        answer = self._decide(Call(name, pid, path if path and path.startswith("/") else None))
        if isinstance(answer, Kill):
            os.kill(pid, signal.SIGKILL)
            return errno.EIO  # which nobody sees any more
        return answer

    def _process_of(self, thread: int) -> int:
        if thread not in self._processes:
            status = Path(f"/proc/{thread}/status").read_text()
            self._processes[thread] = int(status.split("\nTgid:\t")[1].split("\n")[0])
        return self._processes[thread]


def _path(thread: int, name: str, arguments: Sequence[int]) -> str | None:
    if name in _BY_PATH:
        return _text(thread, arguments[0])
    if name in _BY_PATH_AT:
        return _text(thread, arguments[1])
    return str(Path(f"/proc/{thread}/fd/{arguments[0] & 0xFFFFFFFF}").readlink())


def _text(thread: int, address: int) -> str:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - Path has no unbuffered pread
        return os.fsdecode(os.pread(memory.fileno(), 4096, address).split(b"\0")[0])


def _filter() -> bytes:
    """Return the program that picks the calls to ask about: by number, and openat only where it may create."""
    others = [number for name, number in _NUMBER_OF.items() if name != "openat"]
    ask_at = 4 + len(others) + 4
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURE), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 0)]
    for number in others:
        program.append((_EQUAL, ask_at - len(program) - 1, 0, number))
    program += [
        (_EQUAL, 0, 2, _NUMBER_OF["openat"]),
        (_LOAD, 0, 0, _FLAGS_OF_OPENAT),
        (_ANY_BIT, 1, 0, os.O_CREAT),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ASK),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _watch_this_process() -> int:
    """Install the filter for this process and all that it starts, and return the listener."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    no_new_privileges, set_mode_filter, new_listener = 38, 1, 1 << 3
    libc.prctl(no_new_privileges, 1, 0, 0, 0)
    listener = libc.syscall(_SECCOMP, set_mode_filter, new_listener, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp cannot watch a process here")
    return int(listener)


def _launch(channel: int, command: Sequence[str]) -> None:
    with socket.socket(fileno=channel) as parent:
        listener = _watch_this_process()
        socket.send_fds(parent, [b"."], [listener])
    os.close(listener)
    os.execv(command[0], command)


if __name__ == "__main__":
    _launch(int(sys.argv[1]), sys.argv[2:])
