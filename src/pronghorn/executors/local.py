"""Workers as child processes of the server, each on a socket pair that dies with either side."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator

from pronghorn.worker import framing
from pronghorn.worker.protocol import Order, Report

KILL_AFTER_S = 5.0


class LocalExecutor:
    """Starts workers on this machine."""

    async def start(self) -> ChildLink:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "pronghorn.worker", str(theirs.fileno()), pass_fds=[theirs.fileno()]
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        return ChildLink(process, reader, writer)


class ChildLink:
    """A worker in a child process."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, order: Order) -> None:
        if not self._writer.is_closing():
            framing.send(self._writer, order)

    def reports(self) -> AsyncIterator[Report]:
        return framing.messages(self._reader, Report)

    def hang_up(self) -> None:
        self._writer.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> int | None:
        self._writer.close()
        try:
            async with asyncio.timeout(KILL_AFTER_S):
                return await self._process.wait()
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()
