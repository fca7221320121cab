"""The workers a coordinator has: each kept running, with what it holds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pronghorn.domain.model import Replica, ShardKey
from pronghorn.executors.base import Executor, WorkerLink
from pronghorn.storage import durable
from pronghorn.worker.protocol import Configure, Done, LeaveRoom, Order, Ready, Report, Stop, UseReplicas

log = logging.getLogger("pronghorn.crew")

RESTART_WAIT_S_MAX = 30.0
# Further ones change no wait, and a number of a thousand bits cannot be multiplied by a tenth.
FAILURES_COUNTED_MAX = 10
# A worker that lives so long, or finishes a shard, works: the next one is started at once again.
WORKS_AFTER_S = 30.0
# Beyond its drain, a worker gets this long to write and go.
STOP_GRACE_S = 5.0
# A worker speaks four times a second. One that says nothing for so long stands still, be it frozen or stuck in a call
# of the operating system; its shards are worth more than its lines in flight.
SILENT_S_MAX = 30.0
HEARD_INTERVAL_S = 1.0

Route = tuple[str, ...]


@dataclass(slots=True)
class Held:
    """A shard that a worker runs: under which epoch, against which replicas, and whether all its lines are sent."""

    epoch: int
    route: Route
    sent: bool = False


@dataclass(frozen=True, slots=True)
class Reported:
    """Something a worker said."""

    member: CrewMember
    report: Report


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker ended; the shards that it held need another."""

    member: CrewMember
    held: dict[ShardKey, Held]


Event = Reported | Gone


class CrewMember:
    """One worker's place: started, restarted with growing waits, until stopped."""

    def __init__(
        self,
        executor: Executor,
        configure: Configure,
        replicas: Callable[[], list[Replica]],
        post: Callable[[Event], None],
    ) -> None:
        self._executor = executor
        self._configure = configure
        self._replicas = replicas
        self._post = post
        self._link: WorkerLink | None = None
        self._live: dict[str, int] = {}
        self._stopping = asyncio.Event()
        self._heard = False
        self.ready = False
        self.held: dict[ShardKey, Held] = {}

    async def run(self) -> None:
        """Keep a worker running; return once it has been stopped and is gone."""
        failures = 0
        while not self._stopping.is_set():
            worked = await self._run_once()
            failures = 0 if worked else failures + 1
            if not self._stopping.is_set():
                wait = min(RESTART_WAIT_S_MAX, 0.1 * 2 ** min(failures, FAILURES_COUNTED_MAX))
                log.warning("a worker ended unexpectedly; another starts in %.1f s", wait)
                await self._wait_unless_stopping(wait)

    def send(self, order: Order) -> None:
        if self._link is not None:
            self._link.send(order)

    def use_replicas(self) -> None:
        """Tell the worker what the engines are now."""
        self.send(UseReplicas(self._replicas()))

    def leave_room(self, live: Mapping[str, int]) -> None:
        """Tell the worker, and any that follows it, how many live requests to leave room for."""
        self._live = dict(live)
        self.send(LeaveRoom(self._live))

    def stop(self, drain_s: float) -> None:
        """Ask the worker to finish what is in flight and go; `run` then returns."""
        self._stopping.set()
        self.send(Stop(drain_s))
        if self._link is not None:
            asyncio.get_running_loop().call_later(drain_s + STOP_GRACE_S, self._link.hang_up)

    async def _run_once(self) -> bool:
        finished = False
        started = asyncio.get_running_loop().time()
        try:
            self._link = link = await self._executor.start()
        except OSError as error:
            log.error("a worker cannot be started: %s", error)
            return False
        watching = asyncio.create_task(self._watch(link))
        try:
            link.send(self._configure)
            link.send(UseReplicas(self._replicas()))
            link.send(LeaveRoom(self._live))
            if self._stopping.is_set():
                link.send(Stop(0))
            async for report in link.reports():
                self._heard = True
                self.ready = self.ready or isinstance(report, Ready)
                finished = finished or isinstance(report, Done)
                self._post(Reported(self, report))
        finally:
            watching.cancel()
            self._link = None
            # Whatever follows may be given shards before anyone hears of this one's end.
            self.ready, held, self.held = False, self.held, {}
            if await link.end() == durable.EXIT_DISK_FAILED:
                durable.end_with_worker()
            self._post(Gone(self, held))
        return finished or asyncio.get_running_loop().time() - started >= WORKS_AFTER_S

    async def _watch(self, link: WorkerLink) -> None:
        """Kill a worker that has gone silent.

        Silence is counted in waits of ours: where it was this process that stood still, one wait was long, and what the
        worker said meanwhile is there to be read.
        """
        silent_s = 0.0
        while silent_s < SILENT_S_MAX:
            self._heard = False
            await asyncio.sleep(HEARD_INTERVAL_S)
            silent_s = 0.0 if self._heard else silent_s + HEARD_INTERVAL_S
        log.error("a worker has said nothing for %.0f s and is killed", silent_s)
        link.kill()

    async def _wait_unless_stopping(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._stopping.wait()
        except TimeoutError:
            return
