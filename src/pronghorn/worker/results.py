"""What a line leaves in the result files, and how a shard's outcomes become its parts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from pronghorn.domain import causes
from pronghorn.domain.answers import Answer
from pronghorn.domain.model import BlobRef, Closing, Reject, Shard, ShardResult
from pronghorn.ids import line_id
from pronghorn.storage import segments
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.segments import Fate, Place, tally

_CLOSING_MESSAGES = {
    Closing.EXPIRED: "This request could not be executed before the completion window expired.",
    Closing.CANCELLED: "This request was not executed because the batch was cancelled.",
}


class _Id(msgspec.Struct):
    custom_id: str


_decode_id = msgspec.json.Decoder(_Id).decode


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


def write_parts(shard: Shard, places: Mapping[int, Place], blobs: Blobs) -> ShardResult:
    """Store a complete shard's parts of the output and error files, in input order; blocks until they are durable."""
    completed = [places[line] for line in sorted(places) if places[line].fate is Fate.COMPLETED]
    others = [places[line] for line in sorted(places) if places[line].fate is not Fate.COMPLETED]
    stem = f"batches/{shard.key.batch_id}/{shard.key.position}-{shard.epoch}"
    output = _write_part(f"{stem}.output", segments.read(completed), blobs)
    errors = _write_part(f"{stem}.errors", segments.read(others), blobs)
    found = causes.merge(causes.cause_of(result) for result in segments.read(others))
    return ShardResult(output, errors, tally(places.values()), found)


def _write_part(key: str, results: Iterator[bytes], blobs: Blobs) -> BlobRef | None:
    first = next(results, None)
    if first is None:
        return None
    with blobs.writer(key) as writer:
        writer.write(first)
        for result in results:
            writer.write(result)
        writer.commit()
        return BlobRef(key, writer.bytes)


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
