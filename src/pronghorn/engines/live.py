"""Live requests: a single request, answered at once by the replicas that batches use, and ahead of batch lines.

Nothing is read into a request or an answer: the body goes out as it came, and what the engine says is what the client
sees. While live requests are in flight, and for a moment after, the workers are told to leave them room.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

from pronghorn.domain.answers import Fault, FaultKind
from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines.base import EnginePool, authorization
from pronghorn.engines.client import AnswerCutError, AnswerStream, EngineClient, Timeouts
from pronghorn.errors import (
    EngineFailed,
    EngineTimedOut,
    EngineUnreachable,
    NotFound,
    OutOfFiles,
    RequestError,
    TooManyRequests,
)
from pronghorn.limits import LIVE_IN_FLIGHT_MAX

# Somebody waits: a replica that does not accept a connection by then is passed over for another.
CONNECT_S_MAX = 5.0
# A replica that could not be reached is asked last for so long.
AVOID_S = 10.0
# Room is kept for a moment, so that requests made one after the other do not each wait for a slot to come free.
LINGER_S = 2.0

EVENT_STREAM = b"text/event-stream"
# What an engine says to its client, not to the connection or about the network it stands in.
_PASSED_ON = frozenset(
    {b"content-type", b"content-encoding", b"cache-control", b"x-request-id", b"x-should-retry"}
    | {b"retry-after", b"retry-after-ms", b"openai-processing-ms", b"openai-version", b"openai-model"}
)
_PASSED_ON_PREFIX = b"x-ratelimit-"
# Faults after which the request has certainly not reached the engine.
_NOT_REACHED = (FaultKind.REFUSED, FaultKind.DNS, FaultKind.CONNECT_TIMEOUT, FaultKind.TLS)


class LiveAnswer:
    """An engine's answer as it arrives: iterate over it for its chunks, or `read` it whole.

    Both raise EngineFailed or EngineTimedOut when the engine breaks off; `read` also when the body is above the limit.
    """

    def __init__(self, stream: AnswerStream, answer_bytes_max: int) -> None:
        self.status = stream.status
        self.headers = {name: value for name, value in stream.headers.items() if _is_passed_on(name)}
        self._stream = stream
        self._answer_bytes_max = answer_bytes_max

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is a stream of events, which its reader wants as they come."""
        return self.headers.get(b"content-type", b"").lower().startswith(EVENT_STREAM)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._stream:
                yield chunk
        except AnswerCutError as cut:
            raise _failure(cut.fault) from cut

    async def read(self) -> bytes:
        """Return the whole body."""
        body = bytearray()
        async for chunk in self:
            body += chunk
            if len(body) > self._answer_bytes_max:
                raise EngineFailed("The engine's answer was larger than the limit.", code="upstream_answer_too_large")
        return bytes(body)


class _Way:
    """The way to one replica: its connections and how many live requests are on it."""

    def __init__(self, replica: str, client: EngineClient) -> None:
        self.replica = replica
        self.client = client
        self.in_flight = 0
        # The most since room was last settled, and how many the workers leave room for.
        self.peak = 0
        self.announced = 0
        self.avoided_until_s = 0.0
        self.asked_last_s = 0.0


class Relay:
    """Passes single requests to the replica that has the fewest of them; build it in a running loop.

    `leave_room` is told how many live requests to leave room for, by the name of the replica that they go to.
    """

    def __init__(
        self,
        engines: EnginePool,
        *,
        leave_room: Callable[[Mapping[str, int]], None],
        answer_s_max: float,
        answer_bytes_max: int,
        in_flight_max: int = LIVE_IN_FLIGHT_MAX,
        linger_s: float = LINGER_S,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engines = engines
        self._leave_room = leave_room
        self._timeouts = Timeouts(connect_s=CONNECT_S_MAX, first_byte_s=answer_s_max, total_s=answer_s_max)
        self._answer_bytes_max = answer_bytes_max
        self._in_flight_max = in_flight_max
        self._linger_s = linger_s
        self._in_flight = 0
        self._ways: dict[str, _Way] = {}
        self._settling: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        engines.on_change(self._drop_gone)

    async def close(self) -> None:
        """Break off what is under way and close every connection."""
        if self._settling is not None:
            self._settling.cancel()
        await asyncio.gather(*(way.client.close() for way in self._ways.values()), *self._closing)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Take one of the places that the server has for live requests, for as long as one is under way.

        Raises TooManyRequests when there is none.
        """
        if self._in_flight >= self._in_flight_max:
            raise TooManyRequests(
                f"The server is answering {self._in_flight_max} live requests already.",
                code="rate_limit_exceeded",
            )
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    @contextlib.asynccontextmanager
    async def ask(self, endpoint: Endpoint, model: str, body: bytes) -> AsyncIterator[LiveAnswer]:
        """Send a request and give its answer as soon as the head is there; leaving early closes the connection.

        A request that did not reach a replica goes to another; one that did is never sent twice.
        Raises NotFound when no replica has the model, EngineUnreachable, EngineFailed and EngineTimedOut.
        """
        ways = self._ways_to(endpoint, model)
        if not ways:
            raise NotFound(f"The model '{model}' does not exist.", param="model", code="model_not_found")
        for way in self._in_order(ways):
            with self._counted(way):
                got = await way.client.stream(
                    "POST", endpoint.path, body, headers={"Accept": "application/json, text/event-stream"}
                )
                if isinstance(got, AnswerStream):
                    async with got:
                        yield LiveAnswer(got, self._answer_bytes_max)
                    return
            if got.kind not in _NOT_REACHED:
                raise _failure(got)
            way.avoided_until_s = self._loop.time() + AVOID_S
        raise EngineUnreachable(
            f"No engine that answers the model '{model}' can be reached at present.",
            code="engine_unreachable",
        )

    def _ways_to(self, endpoint: Endpoint, model: str) -> list[_Way]:
        return [self._way(replica) for replica in self._engines.replicas() if replica.answers(endpoint, model)]

    def _in_order(self, ways: list[_Way]) -> Iterator[_Way]:
        """Yield each way once, always the one that is best when it is asked for."""
        left = list(ways)
        while left:
            now = self._loop.time()
            best = min(left, key=lambda way: (way.avoided_until_s > now, way.in_flight, way.asked_last_s))
            best.asked_last_s = now
            left.remove(best)
            yield best

    def _way(self, replica: Replica) -> _Way:
        key = replica.name
        if key not in self._ways:
            headers = authorization(replica.api_key_env)
            client = EngineClient(replica.base_url, headers=headers, timeouts=self._timeouts)
            self._ways[key] = _Way(key, client)
        return self._ways[key]

    def _drop_gone(self) -> None:
        """Close the ways to replicas that are no more."""
        gone = self._ways.keys() - {replica.name for replica in self._engines.replicas()}
        for key in gone:
            closing = self._loop.create_task(self._ways.pop(key).client.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        if gone:
            self._announce()

    # Room beside batch lines

    @contextlib.contextmanager
    def _counted(self, way: _Way) -> Iterator[None]:
        way.in_flight += 1
        way.peak = max(way.peak, way.in_flight)
        if way.peak > way.announced:
            way.announced = way.peak
            self._announce()
        try:
            yield
        finally:
            way.in_flight -= 1

    def _settle(self) -> None:
        """Take back the room that was not used since the last time."""
        self._settling = None
        before = [way.announced for way in self._ways.values()]
        for way in self._ways.values():
            way.announced, way.peak = way.peak, way.in_flight
        if before != [way.announced for way in self._ways.values()]:
            self._announce()
        elif any(before):
            self._settle_later()

    def _announce(self) -> None:
        self._leave_room({way.replica: way.announced for way in self._ways.values() if way.announced})
        self._settle_later()

    def _settle_later(self) -> None:
        if self._settling is None:
            self._settling = self._loop.call_later(self._linger_s, self._settle)


def _is_passed_on(name: bytes) -> bool:
    return name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIX)


def _failure(fault: Fault) -> RequestError:
    """Return what a client is told about a request that went out and got no whole answer."""
    match fault.kind:
        case FaultKind.FIRST_BYTE_TIMEOUT | FaultKind.IDLE_TIMEOUT | FaultKind.TOTAL_TIMEOUT:
            return EngineTimedOut("The engine did not answer in time.", code="request_timeout")
        case FaultKind.OUT_OF_FILES:
            return OutOfFiles("The server has too many files open. Try again soon.", code="too_many_open_files")
        case FaultKind.TOO_LARGE:
            return EngineFailed("The engine's answer was larger than the limit.", code="upstream_answer_too_large")
        case _:
            return EngineFailed("The engine broke off before it had answered.", code="upstream_disconnected")
