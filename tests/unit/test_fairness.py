"""Jobs share the engine by weight, whatever the size and number of their batches."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pronghorn.domain.fairness import Candidate, FairShare


def batch(
    job: str, *, of: str | None = None, weight: int = 1, deadline: int | None = None, order: int = 0
) -> Candidate:
    return Candidate(of or f"batch of {job}", job, weight, deadline, order)


def handed_out(share: FairShare, waiting: list[Candidate], rounds: int, lines: int = 1) -> Counter[str]:
    """Hand out that many shards while the same batches wait, and count lines by job."""
    given_to: Counter[str] = Counter()
    for _ in range(rounds):
        picked = share.pick(waiting)
        assert picked is not None
        share.charge(picked, lines)
        given_to[picked.job_id] += lines
    return given_to


def test_nothing_waits() -> None:
    assert FairShare().pick([]) is None


def test_equal_jobs_take_turns() -> None:
    assert handed_out(FairShare(), [batch("a"), batch("b", order=1)], 10) == {"a": 5, "b": 5}


def test_a_job_s_share_is_its_weight() -> None:
    assert handed_out(FairShare(), [batch("a", weight=3), batch("b")], 40) == {"a": 30, "b": 10}


def test_many_batches_are_no_larger_share_than_one() -> None:
    many = [batch("a", of=str(number), order=number) for number in range(9)]
    assert handed_out(FairShare(), [*many, batch("b", order=9)], 20) == {"a": 10, "b": 10}


def test_inside_a_job_the_nearest_deadline_goes_first_and_none_is_the_farthest() -> None:
    never = batch("a", of="never", order=0)
    late, soon = batch("a", of="late", deadline=20, order=1), batch("a", of="soon", deadline=10, order=2)
    assert FairShare().pick([never, late, soon]) is soon
    assert FairShare().pick([never, late]) is late


def test_equal_deadlines_go_in_the_order_of_creation() -> None:
    first, second = batch("a", of="first", order=1), batch("a", of="second", order=2)
    assert FairShare().pick([second, first]) is first


def test_a_new_job_has_no_credit_for_the_time_before_it() -> None:
    share = FairShare()
    handed_out(share, [batch("a")], 1000)
    assert handed_out(share, [batch("a"), batch("b")], 100)["b"] in (50, 51)


def test_a_job_that_had_nothing_waiting_has_no_credit_for_that_time() -> None:
    share = FairShare()
    handed_out(share, [batch("a"), batch("b")], 10)
    handed_out(share, [batch("a")], 1000)
    assert share.pick([]) is None
    assert handed_out(share, [batch("a"), batch("b")], 100)["b"] in (50, 51)


def test_a_job_whose_batches_are_one_shard_each_gets_no_more_than_its_share() -> None:
    share, taken = FairShare(), Counter[str]()
    steady, small = batch("steady"), batch("small", order=1)
    waiting = [steady, small]
    for _ in range(200):
        picked = share.pick(waiting)
        assert picked is not None
        lines = 100 if picked is small else 10
        share.charge(picked, lines)
        taken[picked.job_id] += lines
        waiting = [steady] if picked is small else [steady, small]  # the next small batch comes a moment later
    assert abs(taken["small"] - taken["steady"]) <= 110


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.lists(st.tuples(st.integers(1, 15), st.integers(1, 50)), max_size=60),
)
def test_jobs_that_both_wait_are_never_more_than_a_shard_apart(
    weights: list[int], rounds: list[tuple[int, int]]
) -> None:
    share = FairShare()
    jobs = [batch(str(index), weight=weight, order=index) for index, weight in enumerate(weights)]
    served = [0.0] * len(jobs)
    for _, lines in rounds:
        picked = share.pick(jobs)
        assert picked is not None
        share.charge(picked, lines)
        served[picked.order] += lines / picked.weight
        assert max(served) - min(served) <= 50
