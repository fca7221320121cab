"""A copy's result is its original's under other names, wherever that lies."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pronghorn.domain.answers import Answer
from pronghorn.domain.model import BlobRef, Closing, Copy
from pronghorn.ids import line_id
from pronghorn.storage.blobs import Blobs
from pronghorn.worker import results
from pronghorn.worker.copies import BLOCK_BYTES, Search

BATCH = "batch_0123456789abcdef0123"
COPY = Copy(7, 3, 0)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, {}, b'{"choices":[],"id":1}'),
        Answer(200, {b"x-request-id": b"req-1"}, b'{"request_id":"x","a":",\\"response\\":"}'),
        Answer(400, {}, b'{"error":{"message":"no"}}'),
    ],
)
@pytest.mark.parametrize("custom_id", [b'"a"', b'"\\"a\\",\\"response\\":{"', '"ä"'.encode()])
def test_a_copy_differs_in_nothing_but_names(answer: Answer, custom_id: bytes) -> None:
    original = results.answered(BATCH, 3, custom_id, answer)
    assert results.copied(BATCH, COPY, b'"b"', original) == results.answered(BATCH, 7, b'"b"', answer)


def test_a_copy_of_what_has_no_answer_has_none() -> None:
    original = results.not_run(BATCH, 3, b'"a"', Closing.EXPIRED)
    assert results.copied(BATCH, COPY, b'"b"', original) == results.not_run(BATCH, 7, b'"b"', Closing.EXPIRED)
    assert results.error_code(original) == Closing.EXPIRED
    assert results.error_code(results.answered(BATCH, 3, b'"a"', Answer(400, {}, b"{}"))) is None


def test_an_answer_of_any_depth_is_told_from_the_lack_of_one() -> None:
    shallow = results.answered(BATCH, 3, b'"a"', Answer(400, {}, b"[]"))
    deep = shallow.replace(b"[]", b"[" * 100_000 + b"]" * 100_000)
    assert results.error_code(deep) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_result_is_found_among_results_of_any_length(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    numbers = sorted(rng.sample(range(1, 1000), 60))
    lengths = [rng.choice([0, 10, 1000, BLOCK_BYTES, BLOCK_BYTES * 3]) for _ in numbers]
    lines = {
        number: json.dumps({"id": line_id(BATCH, number), "text": "x" * length}, separators=(",", ":")).encode() + b"\n"
        for number, length in zip(numbers, lengths, strict=True)
    }
    blobs = Blobs(tmp_path)
    with blobs.writer("part") as writer:
        writer.write(b"".join(lines.values()))
        writer.commit()
    part = BlobRef("part", sum(map(len, lines.values())))
    search = Search(blobs)
    for number in range(1001):
        assert search.find(part, b'{"id":"%b"' % line_id(BATCH, number).encode()) == lines.get(number)
    assert search.find(None, b"anything") is None
