"""A worker process: `python -m pronghorn.worker FD`, with a socket to its coordinator open as FD.

It ends when the coordinator does: the socket closes, and what was recorded is already on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from pronghorn.clock import SystemClock
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.room import Room
from pronghorn.storage.segments import Segments
from pronghorn.worker import framing
from pronghorn.worker.dispatch import Dispatcher
from pronghorn.worker.protocol import Assign, Close, Configure, LeaveRoom, Order, Ready, Stop, UseReplicas

log = logging.getLogger("pronghorn.worker")

# Lines make no cycles, so looking for some after every 700 new objects, as Python does, finds nothing, for 5 % of the
# time. Objects between two looks: ten thousand lines' worth.
GARBAGE_LOOK_OBJECTS = 50_000


async def work(channel: socket.socket) -> None:
    """Take orders from the channel until it closes or orders to stop."""
    reader, writer = await asyncio.open_connection(sock=channel)
    orders = framing.messages(reader, Order)
    config = await anext(orders, None)
    if config is None:
        return  # the coordinator died before it gave an order
    if not isinstance(config, Configure):
        raise TypeError("the first order is Configure")
    dispatcher = Dispatcher(
        config,
        blobs=Blobs(Path(config.blobs_dir)),
        segments=Segments(Path(config.segments_dir)),
        room=Room(Path(config.blobs_dir)),
        clock=SystemClock(),
        rng=random.Random(),
        report=lambda report: framing.send(writer, report),
    )
    asyncio.get_running_loop().set_exception_handler(partial(_on_loop_error, dispatcher))
    running = asyncio.create_task(dispatcher.run())
    obeying = asyncio.create_task(_obey(orders, dispatcher))
    framing.send(writer, Ready())
    await asyncio.wait({running, obeying}, return_when=asyncio.FIRST_COMPLETED)
    for task in (running, obeying):
        task.cancel()
    results = await asyncio.gather(running, obeying, return_exceptions=True)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    writer.close()
    for result in results:
        if isinstance(result, Exception):
            raise result


def _on_loop_error(dispatcher: Dispatcher, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End with a callback that failed: the line that it was for would else never have an outcome."""
    error = context.get("exception")
    if error is None or isinstance(error, OSError):
        loop.default_exception_handler(context)
    else:
        dispatcher.fail(error)


async def _obey(orders: framing.Messages[Order], dispatcher: Dispatcher) -> None:
    async for order in orders:
        match order:
            case UseReplicas(replicas):
                dispatcher.use_replicas(replicas)
            case Assign():
                dispatcher.assign(order)
            case Close(batch_id, closing):
                dispatcher.close_batch(batch_id, closing)
            case LeaveRoom(live):
                dispatcher.leave_room(live)
            case Stop(drain_s):
                await dispatcher.stop(drain_s)
                return


def main() -> None:
    """Run a worker on the socket whose descriptor is the only argument.

    Exits 1 where it cannot go on, and 74 at once where the disk has failed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group, they are the coordinator's, which drains us
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    gc.freeze()
    gc.set_threshold(GARBAGE_LOOK_OBJECTS, 20, 100)
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        uvloop.run(work(channel))
    except* (OSError, EOFError) as errors:
        for error in errors.exceptions:
            log.error("worker ends: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
