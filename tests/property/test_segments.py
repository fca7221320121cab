"""Whatever outcomes are recorded in whatever attempts, recovery finds what was written."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from pronghorn.domain.model import ShardKey, Usage
from pronghorn.storage.segments import Fate, Outcome, Segments, encode
from tests.disks import in_memory

KEY = ShardKey("batch_1", 0)

tokens = st.integers(0, 2**32 - 1)
outcomes = st.builds(
    Outcome,
    line=st.integers(1, 20) | st.integers(1, 2**63),
    fate=st.sampled_from(Fate),
    usage=st.builds(Usage, tokens, tokens, tokens, tokens),
    result=st.binary(max_size=50),
)


@given(st.lists(st.tuples(st.lists(outcomes, max_size=6), st.integers(0, 200)), max_size=4))
def test_recovery_finds_the_earliest_whole_record_of_each_line(attempts: list[tuple[list[Outcome], int]]) -> None:
    expected: dict[int, Outcome] = {}
    with TemporaryDirectory(dir=in_memory()) as directory:
        segments = Segments(Path(directory))
        for epoch, (recorded, torn_bytes) in enumerate(attempts, start=1):
            writer = segments.create(KEY, epoch)
            for each in recorded:
                writer.append(each)
            writer.write()
            writer.close()
            content = writer.path.read_bytes()
            kept = max(len(content) - torn_bytes, 0)
            writer.path.write_bytes(content[:kept])
            end = 0
            for each in recorded:
                end += len(encode(each))
                if end <= kept:
                    expected.setdefault(each.line, each)
        found = {
            line: Outcome(
                line,
                place.fate,
                place.usage,
                place.segment.read_bytes()[place.offset : place.offset + place.length],
            )
            for line, place in segments.recover(KEY).items()
        }
    assert found == expected
