"""Which lines are copies of others, whatever their number."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.domain import duplicates
from pronghorn.domain.duplicates import Bodies
from pronghorn.domain.model import Copy


def copies(bodies: list[bytes], not_run: set[int]) -> dict[int, int]:
    found = Bodies()
    for line, body in enumerate(bodies, 1):
        found.add(line, body)
    originals = found.originals(not_run)
    found.close()
    listed = {copy.line: copy.original for copy in originals.between(1, None, [1])}
    assert originals.copies == len(listed)
    return listed


@pytest.mark.parametrize("held_bytes", [100, 1 << 20])
@settings(max_examples=25)  # each that spills makes 256 files
@given(st.lists(st.sampled_from([b"a", b"b", b"c", b"d"])), st.sets(st.integers(1, 8)))
def test_a_copy_has_the_first_line_of_its_body_that_is_run(
    held_bytes: int, bodies: list[bytes], not_run: set[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "PLANNING_DIGESTS_BYTES_MAX", held_bytes)
        found = copies(bodies, not_run)
    first: dict[bytes, int] = {}
    expected = {}
    for line, body in enumerate(bodies, 1):
        if line not in not_run and first.setdefault(body, line) != line:
            expected[line] = first[body]
    assert found == expected


def test_a_shard_knows_its_own_copies_and_where_their_originals_are() -> None:
    found = Bodies()
    for line in (1, 2, 5, 6, 9, 10):
        found.add(line, b"%d" % (line % 2))
    originals, starts = found.originals(), [1, 5, 9]
    assert originals.between(1, 5, starts) == []
    assert originals.between(5, 9, starts) == [Copy(5, 1, 0), Copy(6, 2, 0)]
    assert originals.between(9, None, starts) == [Copy(9, 1, 0), Copy(10, 2, 0)]
    assert duplicates.NONE.between(1, None, starts) == []
