"""A client that remembers every answer it got and holds the server to each, whatever has happened in between."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
from tests.beds import require_seccomp
from tests.processes import ScriptedProcess, Server, configured

# Enough for three shards, and a window that is much smaller than a batch: what is wasted shows.
LINES = 6
LINE_BYTES = 24_000
WINDOW = 2


class Engine(ScriptedProcess):
    """A scripted engine that keeps books, for servers whose system calls are watched."""

    def __init__(self, folder: Path, latency_ms: int) -> None:
        require_seccomp()
        self._books = folder / "ledger.jsonl"
        super().__init__(folder / "engine.log", latency_ms=latency_ms, ledger_path=self._books)

    def configured(self, folder: Path) -> list[str]:
        """Return the arguments of a server in front of it, whose window is known."""
        return configured(folder, self.base_url, models=["scripted"], window=WINDOW)

    def calls(self) -> Counter[str]:
        """Return how often it was asked each body, by its SHA-256."""
        return Counter(json.loads(entry)["key"] for entry in self._books.read_text().splitlines())


class Client:
    """Uploads, runs batches and deletes, over many lives of a server; each answer it gets is a promise to check.

    Its methods raise httpx2.TransportError when the server dies meanwhile; call `killed` then, and go on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers = itertools.count()
        self._inputs: dict[str, bytes] = {}
        self._may_repeat: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        self._files: dict[str, str] = {}
        self._unread: set[str] = set()
        self._deleted: set[str] = set()
        self._created: set[str] = set()
        self._inputs_of: dict[str, str] = {}
        self._ended: dict[str, str] = {}

    @property
    def batches_ended(self) -> int:
        return len(self._ended)

    def work(self, server: Server) -> None:
        """Run a batch of a file that is uploaded whole and one of a file in parts, then delete the first file."""
        name = self._new_input()
        self._files[whole := server.upload(self._inputs[name], name)] = name
        self._created.add(server.create_batch(whole)["id"])
        name = self._new_input()
        self._files[file_id := self._upload_in_parts(server, name)] = name
        self._created.add(server.create_batch(file_id)["id"])
        self._unread |= {whole, file_id}
        self.check(server)
        self._unread.discard(whole)
        del self._files[whole]  # until the answer is here, it may be there or not
        _ok(server.http.delete(f"/v1/files/{whole}"))
        self._deleted.add(whole)

    def check(self, server: Server, *, again: bool = False) -> None:
        """Read every file and wait for every batch that was acknowledged; `again` those that were right before."""
        if again:
            self._unread = set(self._files)
            self._ended.clear()
        for file_id in sorted(self._unread):
            assert server.content(file_id) == self._inputs[self._files[file_id]], f"{file_id} is not what was uploaded"
            self._unread.discard(file_id)
        for file_id in self._deleted:
            assert server.http.get(f"/v1/files/{file_id}").status_code == 404, f"{file_id} is back"
        there = {batch["id"]: batch for batch in _pages(server, "/v1/batches")}
        assert self._created <= there.keys(), f"gone: {self._created - there.keys()}"
        files = {file["id"]: file["filename"] for file in _pages(server, "/v1/files")}
        for batch_id in there.keys() - self._ended.keys():
            name = self._inputs_of.setdefault(batch_id, files.get(there[batch_id]["input_file_id"], ""))
            if name in self._inputs:
                self._check_batch(server, batch_id, name)

    def killed(self) -> None:
        """Note that a process was killed: of unfinished batches, lines that were in flight may be asked again."""
        for name in self._inputs.keys() - self._ended.values():
            self._may_repeat[name] += WINDOW

    def powered_off(self) -> None:
        """Note that power was lost: lines of unfinished batches that did not count as done may be asked again."""
        for name in self._inputs.keys() - self._ended.values():
            self._may_repeat[name] += LINES - self._seen[name]

    def check_calls(self, engine: Engine) -> int:
        """Check that no more lines were asked again than may be, and return how many were."""
        asked, wasted = engine.calls(), 0
        for name, content in self._inputs.items():
            bodies = [json.dumps(json.loads(line)["body"]) for line in content.splitlines()]
            asks = sum(asked[hashlib.sha256(body.encode()).hexdigest()] for body in bodies)
            excess = max(0, asks - LINES)
            assert excess <= self._may_repeat[name], f"{name}: {excess} lines asked again, not {self._may_repeat[name]}"
            wasted += excess
        return wasted

    def _new_input(self) -> str:
        name = f"{self._name}-{next(self._numbers)}.jsonl"
        self._inputs[name] = b"".join(_line(name, number) for number in range(LINES))
        return name

    def _upload_in_parts(self, server: Server, name: str) -> str:
        content = self._inputs[name]
        announced = {"filename": name, "purpose": "batch", "bytes": len(content), "mime_type": "application/jsonl"}
        upload_id = _ok(server.http.post("/v1/uploads", json=announced))["id"]
        middle = len(content) // 2
        parts = [
            _ok(server.http.post(f"/v1/uploads/{upload_id}/parts", files={"data": data}))["id"]
            for data in (content[:middle], content[middle:])
        ]
        completed = _ok(server.http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": parts}))
        return str(completed["file"]["id"])

    def _check_batch(self, server: Server, batch_id: str, name: str) -> None:
        batch = server.await_batch(batch_id, lambda batch: self._has_ended(batch, name))
        assert batch["status"] == "completed", batch
        assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
        results = [json.loads(line) for line in server.content(batch["output_file_id"]).splitlines()]
        lines = [json.loads(line) for line in self._inputs[name].splitlines()]
        assert [result["custom_id"] for result in results] == [line["custom_id"] for line in lines]
        for line, result in zip(lines, results, strict=True):
            digest = hashlib.sha256(json.dumps(line["body"]).encode()).hexdigest()[:16]
            answer = result["response"]["body"]["choices"][0]["message"]["content"]
            assert answer.startswith(f"echo {digest}: "), f"{result['custom_id']} has another line's answer"
        self._ended[batch_id] = name

    def _has_ended(self, batch: dict[str, Any], name: str) -> bool:
        self._seen[name] = max(self._seen[name], batch["request_counts"]["completed"])
        return batch["status"] in ("completed", "failed", "expired", "cancelled")


def _line(name: str, number: int) -> bytes:
    content = f"{name} {number} " * (LINE_BYTES // len(f"{name} {number} "))
    body = {"model": "scripted", "messages": [{"role": "user", "content": content}]}
    line = {"custom_id": f"{name}/{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line).encode() + b"\n"


def _ok(answer: httpx2.Response) -> Any:
    answer.raise_for_status()
    return answer.json()


def _pages(server: Server, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    while not found or more["has_more"]:
        after = {"after": found[-1]["id"]} if found else {}
        more = _ok(server.http.get(path, params={"limit": "100"} | after))
        if not more["data"]:
            break
        found += more["data"]
    return found
