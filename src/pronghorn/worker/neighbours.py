"""Which of the ready lines a replica gets next: one whose prompt begins like what the replica has in its cache.

A replica of slots keeps one prompt in each. Each line that it has answered has left a slot free, so what goes out next
goes on from that line's prompt; each slot so walks through prompts of its own. Any other replica keeps prompts for
all its lines together, and walks through them in order.
"""

from __future__ import annotations

from collections.abc import Iterable

from pronghorn.worker.lane import Lane
from pronghorn.worker.shard_run import Line, ShardRun

# About 64 tokens: what a younger shard's line has to save an engine beyond an older shard's to go first.
BYTES_SAVED_MIN = 256
# So many lines go before an older shard's that are ready, and no more: its batch's readers wait for it.
PASSED_OVER_MAX = 64


def next_line(lane: Lane, run: ShardRun, runs: Iterable[ShardRun]) -> Line:
    """Take the ready line of `run` that suits the lane best; for a while, another shard of its batch may have it."""
    if lane.replica.slots is None:
        line = run.ready.take_anywhere() if lane.last_prompt is None else run.ready.take_after(lane.last_prompt)
        if line.tries == 0:
            lane.last_prompt = line.prompt
        return run.took(line)
    if not lane.freed_prompts:
        return run.took(run.ready.take_anywhere())
    prompt = lane.freed_prompts.popleft()
    best = _best(run, prompt, runs) if run.ready.next_is_new and run.passed_over < PASSED_OVER_MAX else run
    run.passed_over += best is not run
    return best.took(best.ready.take_nearest(prompt))


def _best(run: ShardRun, prompt: bytes, runs: Iterable[ShardRun]) -> ShardRun:
    """Return the shard of the run's batch whose nearest line saves the engine most, the run itself if in doubt."""
    best, saved = run, run.ready.shares(prompt) + BYTES_SAVED_MIN
    for other in runs:
        if other.key.batch_id != run.key.batch_id or not other.ready.next_is_new:
            continue
        if (shared := other.ready.shares(prompt)) > saved:
            best, saved = other, shared
    return best
