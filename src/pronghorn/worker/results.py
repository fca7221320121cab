"""What a line leaves in the result files, and how a shard's outcomes become its parts of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from pronghorn.domain import causes
from pronghorn.domain.answers import Answer
from pronghorn.domain.causes import Cause
from pronghorn.domain.model import BlobRef, Closing, Copy, Reject, Shard, ShardResult
from pronghorn.ids import line_id
from pronghorn.limits import MIB
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.segments import Fate, Place, Records, tally

# What is put together between two turns of the event loop, about two milliseconds of it.
PIECE_BYTES = MIB

_CLOSING_MESSAGES = {
    Closing.EXPIRED: "This request could not be executed before the completion window expired.",
    Closing.CANCELLED: "This request was not executed because the batch was cancelled.",
}


class _Id(msgspec.Struct):
    custom_id: str


class _Error(msgspec.Struct):
    code: str


class _Errored(msgspec.Struct):
    error: _Error


_decode_id = msgspec.json.Decoder(_Id).decode
_decode_error = msgspec.json.Decoder(_Errored).decode
_OUTCOME = b',"response":'
_RESPONSE = _OUTCOME + b"{"


def answered(batch_id: str, number: int, custom_id: bytes, answer: Answer) -> bytes:
    """Return the result of a line that got an HTTP answer; `custom_id` is the JSON string of the input.

    The engine's body is kept as it came, on one line; a body that is not JSON is wrapped in an error envelope.
    """
    identity = line_id(batch_id, number).encode()
    request_id = answer.headers.get(b"x-request-id")
    return b'{"id":"%b","custom_id":%b,"response":{"status_code":%d,"request_id":%b,"body":%b},"error":null}\n' % (
        identity,
        custom_id,
        answer.status,
        msgspec.json.encode(request_id.decode("latin-1")) if request_id else b'"%b"' % identity,
        _one_line_body(answer),
    )


def unanswered(batch_id: str, number: int, custom_id: bytes, code: str, message: str) -> bytes:
    """Return the result of a line that has no HTTP answer to show."""
    return b'{"id":"%b","custom_id":%b,"response":null,"error":%b}\n' % (
        line_id(batch_id, number).encode(),
        custom_id,
        msgspec.json.encode({"code": code, "message": message}),
    )


def not_run(batch_id: str, number: int, custom_id: bytes, closing: Closing) -> bytes:
    """Return the result of a line that was never sent because its batch ended first."""
    return unanswered(batch_id, number, custom_id, closing.value, _CLOSING_MESSAGES[closing])


def rejected(batch_id: str, reject: Reject, content: bytes | None) -> bytes:
    """Return the result of an invalid line that its batch skips; its custom_id is null when it cannot be read."""
    try:
        custom_id = msgspec.json.encode(_decode_id(content or b"").custom_id)
    except (ValueError, RecursionError):
        custom_id = b"null"
    return unanswered(batch_id, reject.line, custom_id, reject.code, reject.message)


def copied(batch_id: str, copy: Copy, custom_id: bytes, result: bytes) -> bytes:
    """Return the result of a line that is another's copy, from that one's result: all but the names is the same."""
    own, other = (line_id(batch_id, number).encode() for number in (copy.line, copy.original))
    outcome = result[result.index(_OUTCOME) :]  # a quote within a custom_id is escaped
    if outcome.startswith(_RESPONSE):
        # The name that stands in for a request_id, where the engine gave none.
        outcome = outcome.replace(b'"request_id":"%b"' % other, b'"request_id":"%b"' % own, 1)
    return b'{"id":"%b","custom_id":%b%b' % (own, custom_id, outcome)


def error_code(result: bytes) -> str | None:
    """Return the code of a result that has no HTTP answer to show."""
    if result.startswith(_RESPONSE, result.index(_OUTCOME)):
        return None  # undecoded: an answer may be nested deeper than a decoder goes
    return _decode_error(result).error.code


async def write_parts(shard: Shard, places: Mapping[int, Place], blobs: Blobs) -> ShardResult:
    """Store a complete shard's parts of the output and error files, in input order; returns when they are durable.

    Results that are in memory are put together here, in small pieces, and not on a thread: one that computes takes the
    interpreter's lock from the event loop at every turn.
    """
    ordered = [places[line] for line in sorted(places)]
    completed = [place for place in ordered if place.fate is Fate.COMPLETED]
    others = [place for place in ordered if place.fate is not Fate.COMPLETED]
    stem = f"batches/{shard.key.batch_id}/{shard.key.position}-{shard.epoch}"
    records = await asyncio.to_thread(Records, ordered)
    try:
        output = await _write_part(f"{stem}.output", completed, records, blobs)
        errors = await _write_part(f"{stem}.errors", others, records, blobs)
        found = await asyncio.to_thread(_causes, others, records) if others else []
    finally:
        records.close()
    return ShardResult(output, errors, tally(ordered), found)


async def _write_part(key: str, places: Sequence[Place], records: Records, blobs: Blobs) -> BlobRef | None:
    if not places:
        return None
    pieces = _pieces(records.results(places))
    with await asyncio.to_thread(blobs.writer, key) as writer:
        while piece := next(pieces, b"") if records.in_memory else await asyncio.to_thread(next, pieces, b""):
            await asyncio.to_thread(writer.write, piece)
        await asyncio.to_thread(writer.commit)
        return BlobRef(key, writer.bytes)


def _pieces(results: Iterable[memoryview]) -> Iterator[bytes]:
    held: list[memoryview] = []
    held_bytes = 0
    for result in results:
        held.append(result)
        held_bytes += len(result)
        if held_bytes >= PIECE_BYTES:
            yield b"".join(held)
            held.clear()
            held_bytes = 0
    yield b"".join(held)


def _causes(places: Sequence[Place], records: Records) -> list[Cause]:
    return causes.merge(causes.cause_of(bytes(result)) for result in records.results(places))


def _one_line_body(answer: Answer) -> bytes:
    body = _text(answer.body).strip()
    if 200 <= answer.status < 300 and b"\n" not in body and b"\r" not in body:
        return body  # a success has been decoded already
    try:
        return msgspec.json.format(body, indent=-1)
    except (ValueError, RecursionError):
        text = answer.body.decode(errors="replace")
        error = {"message": text, "type": "upstream_error", "param": None, "code": None}
        return msgspec.json.encode({"error": error})


def _text(body: bytes) -> bytes:
    """Return a body with U+FFFD for bytes that are no UTF-8: JSON decoders pass them by, readers of a file do not."""
    try:
        body.decode()
    except UnicodeDecodeError:
        return body.decode(errors="replace").encode()
    return body
