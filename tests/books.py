"""Clients of a server that is killed under them: each keeps its own books of what was acknowledged to it."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx2

ENDED = ("completed", "failed", "expired", "cancelled")
OPEN_BATCHES_MAX = 4
# A share of the lines is refused by the engine, so that there is something to retry.
BAD_SHARE = 0.05
CALL_S_MAX = 30.0


class Unanswered(Exception):
    """The connection broke: what was asked for may have been done or not."""


class Line(NamedTuple):
    """A line as it was sent: its id, the name that the engine's ledger has for it, and whether it can be answered."""

    custom_id: str
    key: str
    good: bool
    content: bytes


@dataclass
class Stored:
    """A file that the server has acknowledged."""

    lines: list[Line]

    @property
    def content(self) -> bytes:
        return b"".join(line.content for line in self.lines)


@dataclass
class Run:
    """A batch that was acknowledged, or was found at the end with the mark of one that was asked for."""

    id: str
    lines: list[Line]
    cancel_asked: bool = False
    seen: dict[str, Any] = field(default_factory=dict)
    # Once its results have been compared: which lines were executed, and which are in its error file.
    executed: list[Line] | None = None
    errors: list[Line] = field(default_factory=list)
    retried: bool = False

    def look(self, batch: dict[str, Any]) -> None:
        """Compare what is seen of it now with what was seen before."""
        before, self.seen = self.seen, batch
        assert batch["id"] == self.id
        if before:
            assert batch["request_counts"]["completed"] >= before["request_counts"]["completed"], "counts only grow"
        if before and before["status"] in ENDED:
            assert batch == before, "what has ended never changes"

    @property
    def ended(self) -> bool:
        return bool(self.seen) and self.seen["status"] in ENDED


def line_of(custom_id: str, good: bool) -> Line:
    marker = "" if good else "[[scripted fault=400 times=always]]"
    body = {"model": "scripted", "messages": [{"role": "user", "content": f"{marker} it is {custom_id} "}]}
    raw = json.dumps(body, separators=(",", ":"))
    content = f'{{"custom_id":"{custom_id}","method":"POST","url":"/v1/chat/completions","body":{raw}}}\n'
    return Line(custom_id, hashlib.sha256(raw.encode()).hexdigest(), good, content.encode())


class Client:
    """Does one thing after the other, drawn from its seed, until told that it is over."""

    def __init__(self, number: int, seed: int, base_url: str, job_id: str, over: threading.Event) -> None:
        self.number = number
        self.failure: BaseException | None = None
        self.asked: dict[str, list[Line]] = {}
        self.once: set[str] = set()
        self.files: dict[str, Stored] = {}
        self.gone: set[str] = set()
        self.runs: dict[str, Run] = {}
        self.calls: Counter[str] = Counter()
        self._rng = random.Random(f"{seed}-{number}")
        self._names = 0
        self._job_id = job_id
        self._over = over
        self._http = httpx2.Client(base_url=base_url, timeout=CALL_S_MAX)
        self._thread = threading.Thread(target=self._run, name=f"client {number}")

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait for its last action to end, and raise what it has found wrong."""
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        self._http.close()

    def check(self, run: Run) -> None:
        """Compare the results of a batch that has ended with what was asked for.

        One that ended before its lines were known has none.
        """
        batch = run.seen
        assert batch["status"] != "failed", batch
        assert batch["status"] != "cancelled" or run.cancel_asked
        output = self._results(batch["output_file_id"])
        errors = self._results(batch["error_file_id"])
        by_id = {line.custom_id: line for line in run.lines if batch["in_progress_at"] is not None}
        for results in (output, errors):
            ids = [result["custom_id"] for result in results]
            there = set(ids)
            assert ids == [line.custom_id for line in run.lines if line.custom_id in there], "once and in order"
        found = Counter(result["custom_id"] for result in output + errors)
        wanted = Counter(by_id.keys())
        assert found == wanted, f"every line once, and no other: {found - wanted}, {wanted - found} of {batch}"
        for result in output:
            said = result["response"]["body"]["choices"][0]["message"]["content"]
            assert f" it is {result['custom_id']} " in said + " ", "each answer is its own line's"
        ends = {result["custom_id"]: result["error"]["code"] for result in errors if result["response"] is None}
        unrun = {custom_id for custom_id, code in ends.items() if code == f"batch_{batch['status']}"}
        # What a line has met last is what it shows when its time is up, and the engine has been killed, too.
        lost = ends.keys() - unrun
        assert not lost or batch["status"] == "expired", ends
        assert all(ends[custom_id] == "upstream_disconnected" for custom_id in lost), ends
        refused = [result for result in errors if result["response"] is not None]
        assert all(result["response"]["status_code"] == 400 for result in refused)
        assert not any(by_id[result["custom_id"]].good for result in refused)
        counts = {"total": len(by_id), "completed": len(output), "failed": len(refused) + len(lost)}
        assert batch["request_counts"] == counts, (batch, counts)
        run.executed = [line for line in by_id.values() if line.custom_id not in unrun]
        run.errors = [by_id[result["custom_id"]] for result in errors]

    def known(self, batch: dict[str, Any]) -> Run | None:
        """Return the run that a batch on the server is, if this client has asked for it."""
        name = (batch["metadata"] or {}).get("name")
        if name not in self.asked:
            return None
        return self.runs.setdefault(batch["id"], Run(batch["id"], self.asked[name]))

    # One action after the other

    def _run(self) -> None:
        actions: list[tuple[Callable[[], None], int]] = [
            (self._upload, 3),
            (self._upload_parts, 2),
            (self._create, 6),
            (self._poll, 8),
            (self._cancel, 1),
            (self._verify, 4),
            (self._download, 1),
            (self._retry, 2),
            (self._delete, 2),
        ]
        weights = [weight for _, weight in actions]
        try:
            while not self._over.is_set():
                ((action, _),) = self._rng.choices(actions, weights)
                try:
                    action()
                    self.calls[action.__name__] += 1
                except Unanswered:
                    self.calls["unanswered"] += 1
                self._over.wait(self._rng.uniform(0, 0.1))
        except BaseException as failure:
            self.failure = failure
            self._over.set()

    def _upload(self) -> None:
        lines = self._new_lines()
        parts = {"file": ("input.jsonl", b"".join(line.content for line in lines))}
        answer = self._call("POST", "/v1/files", data={"purpose": "batch"}, files=parts)
        self.files[answer["id"]] = Stored(lines)

    def _upload_parts(self) -> None:
        lines = self._new_lines()
        content = b"".join(line.content for line in lines)
        named = {"filename": "input.jsonl", "purpose": "batch", "mime_type": "application/jsonl"}
        upload = self._call("POST", "/v1/uploads", json=named | {"bytes": len(content)})
        cuts = sorted({0, len(content), *(self._rng.randrange(1, len(content)) for _ in range(3))})
        pieces = {start: content[start:end] for start, end in itertools.pairwise(cuts)}
        ids = {
            start: self._insist("POST", f"/v1/uploads/{upload['id']}/parts", files={"data": ("part", pieces[start])})
            for start in self._rng.sample(sorted(pieces), len(pieces))
        }
        order = [ids[start]["id"] for start in sorted(ids)]
        done = self._insist("POST", f"/v1/uploads/{upload['id']}/complete", json={"part_ids": order})
        assert done["file"]["bytes"] == len(content)
        self.files[done["file"]["id"]] = Stored(lines)

    def _create(self) -> None:
        kept = sorted(self.files.keys() - self.gone)
        if not kept or sum(not run.ended for run in self.runs.values()) >= OPEN_BATCHES_MAX:
            return
        file_id = self._rng.choice(kept)
        window = self._rng.choice(["unlimited"] * 9 + ["3s"])
        body = {"endpoint": "/v1/chat/completions", "job_id": self._job_id, "completion_window": window}
        self._launch("/v1/batches", body | {"input_file_id": file_id}, self.files[file_id].lines)

    def _retry(self) -> None:
        if run := self._pick(lambda run: bool(run.errors) and not run.retried and not self._has_lost_files(run)):
            run.retried = True
            self._launch(f"/v1/batches/{run.id}/retry", {"completion_window": "unlimited"}, run.errors)

    def _launch(self, path: str, body: dict[str, Any], lines: list[Line]) -> None:
        """Start a batch: with a key, again and again until it is answered; without, once."""
        name = self._new_name()
        self.asked[name] = lines
        body |= {"metadata": {"name": name}}
        if self._rng.random() < 0.5:
            self.once.add(name)
            batch = self._insist("POST", path, json=body, headers={"Idempotency-Key": name})
        else:
            batch = self._call("POST", path, json=body)
        self.runs[batch["id"]] = Run(batch["id"], lines)
        self.runs[batch["id"]].look(batch)

    def _poll(self) -> None:
        if run := self._pick(lambda run: not run.ended) or self._pick(lambda _: True):
            run.look(self._call("GET", f"/v1/batches/{run.id}"))

    def _cancel(self) -> None:
        if run := self._pick(lambda run: not run.ended):
            run.cancel_asked = True
            self._call("POST", f"/v1/batches/{run.id}/cancel", but=(409,))

    def _verify(self) -> None:
        if run := self._pick(lambda run: run.ended and run.executed is None):
            self.check(run)

    def _download(self) -> None:
        if kept := sorted(self.files.keys() - self.gone):
            file_id = self._rng.choice(kept)
            assert self._read(file_id) == self.files[file_id].content

    def _delete(self) -> None:
        run = self._pick(lambda run: run.executed is not None)
        if run is None:
            return
        names = ("input_file_id", "output_file_id", "error_file_id")
        file_id = run.seen[self._rng.choice(names)]
        if file_id is not None and file_id not in self.gone:
            answer = self._insist("DELETE", f"/v1/files/{file_id}", but=(404, 409))
            if answer.get("error", {}).get("code") != "file_in_use":
                self.gone.add(file_id)

    # What they need

    def _has_lost_files(self, run: Run) -> bool:
        return not {run.seen["input_file_id"], run.seen["error_file_id"]}.isdisjoint(self.gone)

    def _pick(self, wanted: Callable[[Run], bool]) -> Run | None:
        found = [run for run in self.runs.values() if wanted(run)]
        return self._rng.choice(found) if found else None

    def _new_name(self) -> str:
        self._names += 1
        return f"{self.number}-{self._names}"

    def _new_lines(self) -> list[Line]:
        name = self._new_name()
        count = self._rng.choice([self._rng.randrange(1, 60), self._rng.randrange(60, 1500)])
        return [line_of(f"{name}-{n}", self._rng.random() >= BAD_SHARE) for n in range(count)]

    def _results(self, file_id: str | None) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._read(file_id).splitlines()] if file_id else []

    def _read(self, file_id: str) -> bytes:
        try:
            answer = self._http.get(f"/v1/files/{file_id}/content")
        except httpx2.TransportError as error:
            raise Unanswered from error
        assert answer.status_code == 200, answer.text
        return answer.content

    def _call(self, method: str, path: str, *, but: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        """Ask once; any answer that is no success fails the test, but for the statuses that are named."""
        try:
            answer = self._http.request(method, path, **fields)
        except httpx2.TransportError as error:
            raise Unanswered from error
        assert answer.is_success or answer.status_code in but, f"{method} {path}: {answer.status_code} {answer.text}"
        return dict(answer.json())

    def _insist(self, method: str, path: str, **fields: Any) -> dict[str, Any]:
        """Ask until there is an answer."""
        while True:
            try:
                return self._call(method, path, **fields)
            except Unanswered:
                self.calls["unanswered"] += 1
                self._over.wait(0.1)
