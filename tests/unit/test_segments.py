"""What was recorded before a crash is found after it, and nothing that was not recorded is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pronghorn.domain.model import ShardKey, Tally, Usage
from pronghorn.storage.durable import EXIT_DISK_FAILED
from pronghorn.storage.segments import Fate, Outcome, Place, Segments, encode, tally
from tests.disks import in_memory

KEY = ShardKey("batch_1", 3)


def outcome(line: int, fate: Fate = Fate.COMPLETED, result: bytes | None = None, usage: Usage = Usage()) -> Outcome:  # noqa: B008
    return Outcome(line, fate, usage, b'{"line":%d}\n' % line if result is None else result)


def record(segments: Segments, epoch: int, *outcomes: Outcome, key: ShardKey = KEY) -> list[Place]:
    """Write the segment of one attempt."""
    writer = segments.create(key, epoch)
    places = [writer.append(each) for each in outcomes]
    writer.write()
    writer.sync()
    writer.close()
    return places


def result_at(place: Place) -> bytes:
    return place.segment.read_bytes()[place.offset : place.offset + place.length]


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(dir=in_memory()) as folder:
        yield Path(folder)


@pytest.fixture
def segments(folder: Path) -> Segments:
    return Segments(folder)


def test_a_shard_never_tried_has_no_outcomes(segments: Segments) -> None:
    assert segments.recover(KEY) == {}


def test_what_was_written_is_recovered_where_the_writer_said_it_would_lie(segments: Segments) -> None:
    outcomes = [outcome(9, usage=Usage(1, 2, 3, 4)), outcome(2, Fate.FAILED), outcome(5, Fate.UNRUN, b"")]
    places = record(segments, 1, *outcomes)
    assert segments.recover(KEY) == dict(zip((9, 2, 5), places, strict=True))
    assert [result_at(place) for place in places] == [each.result for each in outcomes]


def test_an_empty_segment_holds_nothing(segments: Segments) -> None:
    record(segments, 1)
    assert segments.recover(KEY) == {}


def test_an_outcome_that_was_only_held_is_not_recorded(segments: Segments) -> None:
    writer = segments.create(KEY, 1)
    writer.append(outcome(1))
    writer.write()
    writer.append(outcome(2))
    assert list(segments.recover(KEY)) == [1]
    writer.write()
    assert list(segments.recover(KEY)) == [1, 2]
    writer.close()


def test_every_attempt_s_outcomes_count_and_of_one_line_the_earliest(segments: Segments) -> None:
    record(segments, 1, outcome(1, result=b"a"), outcome(2, result=b"b"))
    record(segments, 10, outcome(3, result=b"late"), outcome(4, result=b"e"))
    record(segments, 2, outcome(2, result=b"again"), outcome(3, result=b"c"))
    found = segments.recover(KEY)
    assert {line: result_at(place) for line, place in found.items()} == {1: b"a", 2: b"b", 3: b"c", 4: b"e"}


def test_an_epoch_has_one_segment(segments: Segments) -> None:
    record(segments, 1, outcome(1))
    with pytest.raises(FileExistsError):
        segments.create(KEY, 1)


def test_a_torn_tail_costs_the_torn_record_alone_wherever_it_was_torn(segments: Segments, folder: Path) -> None:
    outcomes = [outcome(1, result=b"first"), outcome(2, result=b""), outcome(3, Fate.FAILED, b"third\n")]
    [path] = {place.segment for place in record(segments, 1, *outcomes)}
    whole, ends = path.read_bytes(), []
    for each in outcomes:
        ends.append(len(encode(each)) + (ends[-1] if ends else 0))
    assert ends[-1] == len(whole)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert list(segments.recover(KEY)) == [
            each.line for each, end in zip(outcomes, ends, strict=True) if end <= length
        ]


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff" * 4096, b"\xff\xff\xff\xff", encode(outcome(9))[:-1] + b"?"])
def test_a_tail_that_is_no_record_ends_the_reading(segments: Segments, tail: bytes) -> None:
    [place] = record(segments, 1, outcome(1))
    with place.segment.open("ab") as file:
        file.write(tail)
    assert list(segments.recover(KEY)) == [1]


def test_a_flipped_bit_never_yields_a_wrong_outcome(segments: Segments) -> None:
    places = record(segments, 1, outcome(1), outcome(2, Fate.FAILED, usage=Usage(7)), outcome(3))
    whole, truth = places[0].segment.read_bytes(), segments.recover(KEY)
    results = {line: result_at(place) for line, place in truth.items()}
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            places[0].segment.write_bytes(damaged)
            found = segments.recover(KEY)
            assert found.items() <= truth.items()
            assert len(found) < len(truth)
            assert all(result_at(place) == results[line] for line, place in found.items())


def test_shards_whose_names_begin_alike_do_not_meet(segments: Segments) -> None:
    for position in (1, 11, 12):
        record(segments, 1, outcome(position), key=ShardKey("batch_1", position))
    record(segments, 1, outcome(99), key=ShardKey("batch_11", 1))
    assert list(segments.recover(ShardKey("batch_1", 1))) == [1]
    segments.discard(ShardKey("batch_1", 1))
    assert segments.recover(ShardKey("batch_1", 1)) == {}
    assert list(segments.recover(ShardKey("batch_1", 11))) == [11]


def test_discarding_twice_or_what_was_never_there_is_fine(segments: Segments, folder: Path) -> None:
    record(segments, 1, outcome(1))
    record(segments, 2, outcome(2))
    segments.discard(KEY)
    segments.discard(KEY)
    assert segments.recover(KEY) == {}
    segments.discard_batch("batch_1")
    segments.discard_batch("batch_1")
    assert list(folder.iterdir()) == []


def test_a_batch_s_segments_go_with_it(segments: Segments, folder: Path) -> None:
    record(segments, 1, outcome(1))
    record(segments, 1, outcome(1), key=ShardKey("batch_2", 0))
    segments.discard_batch("batch_1")
    assert [path.name for path in folder.iterdir()] == ["batch_2"]


def test_outcomes_add_up(segments: Segments) -> None:
    places = record(
        segments,
        1,
        outcome(1, usage=Usage(1, 2, 3, 4)),
        outcome(2, usage=Usage(10, 20, 30, 40)),
        outcome(3, Fate.FAILED),
        outcome(4, Fate.UNRUN),
    )
    assert tally(places) == Tally(2, 1, 1, Usage(11, 22, 33, 44))
    assert tally([]) == Tally()


WRITE_WHERE = """
import os, sys
from pathlib import Path
from pronghorn.domain.model import Usage
from pronghorn.storage.segments import Fate, Outcome, SegmentWriter
writer = SegmentWriter(Path(sys.argv[1]) / "1-1.segment")
os.dup2(os.open(sys.argv[2], int(sys.argv[3])), writer._descriptor)
writer.append(Outcome(1, Fate.COMPLETED, Usage(), b"{}"))
writer.write()
"""


@pytest.mark.parametrize(
    ("path", "flags"),
    [
        pytest.param("/dev/null", os.O_RDONLY, id="a disk that takes nothing"),
        pytest.param("/dev/full", os.O_WRONLY, id="a full disk that does not even shrink a file"),
    ],
)
def test_a_disk_that_fails_ends_the_process_and_does_not_pass_for_a_full_one(
    folder: Path, path: str, flags: int
) -> None:
    command = [sys.executable, "-c", WRITE_WHERE, str(folder), path, str(flags)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == EXIT_DISK_FAILED, ended.stderr
    assert "the disk has failed" in ended.stderr
