"""A worker process whose coordinator dies: it ends without a word, for there is nothing that anybody could do."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

import uvloop

from pronghorn.worker import framing
from pronghorn.worker.protocol import Ready


def test_a_worker_whose_coordinator_dies_before_the_first_order_ends_quietly() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        descriptor = theirs.fileno()
        command = [sys.executable, "-m", "pronghorn.worker", str(descriptor)]
        worker = subprocess.Popen(command, pass_fds=[descriptor], stderr=subprocess.PIPE, text=True)
    ours.close()
    _, errors = worker.communicate(timeout=60)
    assert (worker.returncode, errors) == (0, "")


def test_what_is_told_to_a_coordinator_that_has_died_is_dropped() -> None:
    async def tell() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        theirs.close()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        framing.send(writer, Ready())

    uvloop.run(tell())
