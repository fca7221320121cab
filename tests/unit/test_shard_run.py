"""A shard's lines are read as they were validated."""

from __future__ import annotations

import json
from pathlib import Path

from blockbuster import BlockBuster

from pronghorn.domain import validation
from pronghorn.domain.model import BlobRef, Endpoint, Reject, Shard, ShardKey
from pronghorn.limits import LINE_BYTES_MAX
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.segments import Fate, Segments
from pronghorn.worker.protocol import Assign
from pronghorn.worker.shard_run import ShardRun


def line(custom_id: str, text_bytes: int) -> bytes:
    return json.dumps({"custom_id": custom_id, "body": {"prompt": "x" * text_bytes}}).encode() + b"\n"


async def test_a_line_that_was_validated_under_another_limit_is_run(tmp_path: Path, blockbuster: BlockBuster) -> None:
    blockbuster.deactivate()  # files are written to set the scene
    content = line("allowed", LINE_BYTES_MAX) + line("refused", LINE_BYTES_MAX) + line("short", 1)
    blobs, segments = Blobs(tmp_path / "blobs"), Segments(tmp_path / "segments")
    with blobs.writer("input") as writer:
        writer.write(content)
        writer.commit()
    shard = Shard(
        ShardKey("batch_1", 0), 1, 3, 0, len(content), rejects=[Reject(2, validation.TOO_LONG, "It is too long.")]
    )
    blob = BlobRef("input", len(content))
    order = Assign(shard, [blob], Endpoint.COMPLETIONS, "scripted")
    run = ShardRun(order, segments, lambda: None, prompt_order=False)
    await run.open()
    await run.read(blobs)
    assert [ready.custom_id for ready in run.ready] == [b'"allowed"', b'"short"']
    assert [(number, place.fate) for number, place in run.places.items()] == [(2, Fate.FAILED)]
