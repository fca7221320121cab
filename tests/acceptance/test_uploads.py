"""Large files in parts, against a real server: with the official client, out of order, wrongly, and through a kill."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from tests.faults.test_kill import batch_input, check_output
from tests.processes import ScriptedProcess, Server

from pronghorn.limits import MIB, UPLOAD_BYTES_MAX, UPLOAD_PART_BYTES_MAX

ANNOUNCED = {"filename": "input.jsonl", "purpose": "batch", "mime_type": "application/jsonl"}
UPLOAD_KEYS = {"id", "object", "bytes", "created_at", "filename", "purpose", "status", "expires_at", "file"}
FILE_KEYS = {"id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details"}


class UploadServer(Server):
    """A server, and short ways to upload to it."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        super().__init__(data_dir, *arguments)
        self.blobs_dir = data_dir / "blobs"

    def announce(self, size: int, **fields: object) -> dict[str, Any]:
        answer = self.http.post("/v1/uploads", json=ANNOUNCED | {"bytes": size} | fields)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def part(self, upload_id: str, data: bytes) -> str:
        answer = self.send(upload_id, data)
        assert answer.status_code == 200, answer.text
        assert answer.json().keys() == {"id", "object", "created_at", "upload_id"}
        assert (answer.json()["object"], answer.json()["upload_id"]) == ("upload.part", upload_id)
        return str(answer.json()["id"])

    def send(self, upload_id: str, data: bytes, field: str = "data") -> httpx2.Response:
        return self.http.post(f"/v1/uploads/{upload_id}/parts", files={field: ("part", data)})

    def complete(self, upload_id: str, part_ids: list[str], **fields: object) -> httpx2.Response:
        return self.http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids} | fields)

    def cancel(self, upload_id: str) -> httpx2.Response:
        return self.http.post(f"/v1/uploads/{upload_id}/cancel")

    def stored(self) -> set[str]:
        return {path.name for path in self.blobs_dir.rglob("*") if path.is_file()}

    def await_stored(self, count: int, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.stored()) != count:
            assert time.monotonic() < deadline, self.stored()


def refused(answer: httpx2.Response, code: str | None, param: str | None = None, status: int = 400) -> str:
    """Check that an answer is a refusal in OpenAI's envelope, and return its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    return str(error["message"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, engine: ScriptedProcess) -> Iterator[UploadServer]:
    """One server for the tests that leave no trace the others would see."""
    with UploadServer(tmp_path_factory.mktemp("server") / "data", "--upstream", engine.base_url) as server:
        yield server


@pytest.fixture
def lone(tmp_path: Path, engine: ScriptedProcess) -> Iterator[UploadServer]:
    with UploadServer(tmp_path / "data", "--upstream", engine.base_url) as server:
        yield server


@pytest.mark.parametrize("with_md5", [False, True])
def test_the_official_client_uploads_a_file_in_chunks(shared: UploadServer, tmp_path: Path, with_md5: bool) -> None:
    content = batch_input(30_000)
    (tmp_path / "big.jsonl").write_bytes(content)
    client = openai.OpenAI(base_url=f"{shared.base_url}/v1", api_key="any")
    upload = client.uploads.upload_file_chunked(
        file=tmp_path / "big.jsonl",
        mime_type="application/jsonl",
        purpose="batch",
        part_size=MIB // 2 + 7,
        md5=hashlib.md5(content).hexdigest() if with_md5 else openai.omit,
    )
    assert len(content) > 4 * MIB
    assert upload.status == "completed"
    assert upload.file is not None
    assert (upload.file.bytes, upload.file.filename, upload.file.purpose) == (len(content), "big.jsonl", "batch")
    assert client.files.retrieve(upload.file.id).bytes == len(content)
    assert client.files.content(upload.file.id).read() == content
    client.close()


def test_every_answer_has_every_key(shared: UploadServer) -> None:
    line = batch_input(1)
    upload = shared.announce(len(line), expires_after={"anchor": "created_at", "seconds": 7200})
    assert upload.keys() == UPLOAD_KEYS
    assert upload["id"].startswith("upload_")
    assert (upload["object"], upload["status"], upload["file"]) == ("upload", "pending", None)
    assert upload["expires_at"] == upload["created_at"] + 3600
    completed = shared.complete(upload["id"], [shared.part(upload["id"], line)]).json()
    assert completed == upload | {"status": "completed", "file": completed["file"]}
    assert completed["file"].keys() == FILE_KEYS
    assert completed["file"]["status"] == "processed"
    assert completed["file"]["expires_at"] == completed["file"]["created_at"] + 7200
    cancelled = shared.announce(1)
    assert shared.cancel(cancelled["id"]).json() == cancelled | {"status": "cancelled"}


def test_parallel_parts_make_the_file_in_the_order_of_their_ids(shared: UploadServer) -> None:
    rng = random.Random(5)
    pieces = [bytes([number]) * rng.randrange(1, 300_000) for number in range(16)]
    order = rng.sample(range(16), 16)
    upload = shared.announce(sum(map(len, pieces)), purpose="user_data", filename="x.bin", mime_type="pdf")
    sent = list(range(16))
    rng.shuffle(sent)
    with ThreadPoolExecutor(8) as threads:
        ids = dict(zip(sent, threads.map(lambda at: shared.part(upload["id"], pieces[at]), sent), strict=True))
    whole = b"".join(pieces[at] for at in order)
    answer = shared.complete(upload["id"], [ids[at] for at in order], md5=hashlib.md5(whole).hexdigest().upper())
    assert answer.status_code == 200, answer.text
    assert answer.json()["file"]["bytes"] == len(whole)


def test_a_wrong_completion_is_refused_and_can_be_put_right(shared: UploadServer) -> None:
    first, second = batch_input(3)[:100], batch_input(3)[100:]
    upload_id = shared.announce(len(first + second))["id"]
    one, two = shared.part(upload_id, first), shared.part(upload_id, second)
    elsewhere = shared.part(shared.announce(5)["id"], b"12345")
    assert str(len(first)) in refused(shared.complete(upload_id, [one]), "bytes_mismatch", "part_ids")
    refused(shared.complete(upload_id, []), "bytes_mismatch", "part_ids")
    assert elsewhere in refused(shared.complete(upload_id, [one, elsewhere]), "part_not_found", "part_ids")
    assert "part_x" in refused(shared.complete(upload_id, ["part_x"]), "part_not_found", "part_ids")
    refused(shared.complete(upload_id, [one, one]), "duplicate_part", "part_ids")
    refused(shared.complete(upload_id, [one, two], md5="0" * 32), "md5_mismatch", "md5")
    refused(shared.complete(upload_id, [one, two], md5="short"), "invalid_value", "md5")
    refused(shared.complete(upload_id, [two, one]), None)  # the first line is not JSON
    refused(shared.complete(upload_id, [one, two], other=1), "unknown_parameter", "other")
    assert shared.complete(upload_id, [one, two]).json()["status"] == "completed"


def test_completing_twice_gives_one_file(shared: UploadServer) -> None:
    lines = batch_input(2)
    upload_id = shared.announce(len(lines))["id"]
    one, two = shared.part(upload_id, lines[:9]), shared.part(upload_id, lines[9:])
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: shared.complete(upload_id, [one, two]), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    refused(shared.complete(upload_id, [two, one]), "upload_completed", "part_ids")
    refused(shared.send(upload_id, b"late"), "upload_completed")
    refused(shared.cancel(upload_id), "upload_completed")


def test_a_cancelled_upload_takes_nothing_more(shared: UploadServer) -> None:
    upload_id = shared.announce(5)["id"]
    part_id = shared.part(upload_id, b"12345")
    assert shared.cancel(upload_id).json()["status"] == "cancelled"
    assert shared.cancel(upload_id).json()["status"] == "cancelled", "to repeat it changes nothing"
    message = refused(shared.send(upload_id, b"late"), "upload_cancelled")
    assert message == "Cannot add a part to an upload with status 'cancelled'."
    refused(shared.complete(upload_id, [part_id]), "upload_cancelled")


def test_a_part_on_its_way_when_its_upload_is_cancelled_is_refused(lone: UploadServer) -> None:
    upload_id = lone.announce(5)["id"]

    def overtaken() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="data"; filename="p"\r\n\r\n12345'
        while not lone.stored():
            yield b"12345"
        with httpx2.Client(base_url=lone.base_url) as other:
            assert other.post(f"/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"
        yield b"\r\n--x--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = lone.http.post(f"/v1/uploads/{upload_id}/parts", content=overtaken(), headers=headers)
    refused(answer, "upload_cancelled")


def test_a_client_that_leaves_in_the_middle_of_a_part_leaves_nothing(lone: UploadServer) -> None:
    upload_id = lone.announce(5)["id"]
    address = (lone.http.base_url.host, lone.http.base_url.port or 80)
    with socket.create_connection(address) as client:
        client.sendall(
            f"POST /v1/uploads/{upload_id}/parts HTTP/1.1\r\nHost: x\r\nContent-Length: {5 * MIB}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="data"; filename="p"\r\n\r\n12345'.encode()
        )
        lone.await_stored(1)
    lone.await_stored(0)
    assert "Traceback" not in lone.log(), "it is no fault of ours"


@pytest.mark.parametrize("extra", [1, 3 * MIB])
def test_a_part_that_is_too_large_answers_413_and_leaves_nothing(lone: UploadServer, extra: int) -> None:
    upload_id = lone.announce(UPLOAD_PART_BYTES_MAX + extra)["id"]
    message = refused(
        lone.send(upload_id, bytes(UPLOAD_PART_BYTES_MAX + extra)), "file_above_max_bytes", "data", status=413
    )
    assert str(UPLOAD_PART_BYTES_MAX) in message
    assert lone.stored() == set()
    assert lone.part(upload_id, bytes(UPLOAD_PART_BYTES_MAX)) in lone.stored(), "what just fits is taken"


def test_a_part_that_is_no_part_is_refused_and_leaves_nothing(lone: UploadServer) -> None:
    upload_id = lone.announce(5)["id"]
    refused(lone.send(upload_id, b"12345", field="file"), "missing_required_parameter", "data")
    refused(lone.send(upload_id, b""), "invalid_value", "data")
    refused(lone.http.post(f"/v1/uploads/{upload_id}/parts", json={"data": "12345"}), None)
    cut_off = b'--x\r\nContent-Disposition: form-data; name="data"; filename="p"\r\n\r\n12345'
    headers = {"content-type": "multipart/form-data; boundary=x"}
    refused(lone.http.post(f"/v1/uploads/{upload_id}/parts", content=cut_off, headers=headers), None)
    assert lone.stored() == set()


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"purpose": "other"}, None, None),
        ({"filename": "input.txt"}, None, None),
        ({"filename": ""}, "string_below_min_length", "filename"),
        ({"mime_type": "image/png"}, "invalid_value", "mime_type"),
        ({"bytes": 0}, "integer_below_min_value", "bytes"),
        ({"bytes": UPLOAD_BYTES_MAX + 1}, "integer_above_max_value", "bytes"),
        ({"bytes": "5"}, "invalid_type", "bytes"),
        ({"bytes": 5.0}, "invalid_type", "bytes"),
        ({"expires_at": 1}, "unknown_parameter", "expires_at"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "invalid_value", "expires_after.anchor"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "integer_below_min_value", "expires_after.seconds"),
    ],
)
def test_an_upload_that_cannot_be_is_refused(
    shared: UploadServer, fields: dict[str, object], code: str | None, param: str | None
) -> None:
    refused(shared.http.post("/v1/uploads", json=ANNOUNCED | {"bytes": 5} | fields), code, param)


@pytest.mark.parametrize("mime_type", ["text/jsonl", "application/x-ndjson", "Application/JSONL; charset=utf-8"])
def test_other_names_for_jsonl_are_taken(shared: UploadServer, mime_type: str) -> None:
    assert shared.announce(5, mime_type=mime_type)["status"] == "pending"


def test_missing_things_are_named(shared: UploadServer) -> None:
    for name in (*ANNOUNCED, "bytes"):
        body = {key: value for key, value in (ANNOUNCED | {"bytes": 5}).items() if key != name}
        refused(shared.http.post("/v1/uploads", json=body), "missing_required_parameter", name)
    upload_id = shared.announce(5)["id"]
    answer = shared.http.post(f"/v1/uploads/{upload_id}/complete", json={})
    refused(answer, "missing_required_parameter", "part_ids")
    for answer in (shared.send("upload_x", b"1"), shared.complete("upload_x", []), shared.cancel("upload_x")):
        assert refused(answer, None, "id", status=404) == "No such Upload object: upload_x"


def test_a_batch_runs_over_parts_that_cut_lines_in_two(shared: UploadServer) -> None:
    lines = 300
    content = batch_input(lines)
    cuts = [0, 7, len(content) // 3, len(content) // 3 + 1, len(content) - 3, len(content)]
    pieces = [content[start:end] for start, end in itertools.pairwise(cuts)]
    assert not any(piece.endswith(b"\n") for piece in pieces[:-1])
    upload_id = shared.announce(len(content))["id"]
    part_ids = [shared.part(upload_id, piece) for piece in reversed(pieces)][::-1]
    file_id = shared.complete(upload_id, part_ids).json()["file"]["id"]
    assert shared.content(file_id) == content
    check_output(shared, shared.await_batch(shared.create_batch(file_id)["id"]), lines)


def test_a_batch_file_must_begin_with_a_json_object(shared: UploadServer) -> None:
    for content in (b"nonsense\n", b"[1]\n", b" \n \n"):
        upload_id = shared.announce(len(content))["id"]
        message = refused(shared.complete(upload_id, [shared.part(upload_id, content)]), None)
        assert message.startswith("Invalid file format for Batch API. Must be .jsonl")


def test_a_killed_server_keeps_whole_parts_and_drops_half_ones(tmp_path: Path, engine: ScriptedProcess) -> None:
    lines = 200
    content = batch_input(lines)
    half = len(content) // 2
    with UploadServer(tmp_path / "data", "--upstream", engine.base_url) as server:
        upload = server.announce(len(content))
        first = server.part(upload["id"], content[:half])

        def cut_short() -> Iterator[bytes]:
            yield b'--x\r\nContent-Disposition: form-data; name="data"; filename="p"\r\n\r\n' + bytes(3 * MIB)
            while len(server.stored()) < 2:
                yield bytes(MIB)
            server.kill()
            yield b"never read"

        headers = {"content-type": "multipart/form-data; boundary=x"}
        with pytest.raises(httpx2.TransportError):
            server.http.post(f"/v1/uploads/{upload['id']}/parts", content=cut_short(), headers=headers)
        assert len(server.stored()) == 2
    with UploadServer(tmp_path / "data", "--upstream", engine.base_url) as server:
        second = server.part(upload["id"], content[half:])
        completed = server.complete(upload["id"], [first, second], md5=hashlib.md5(content).hexdigest()).json()
        assert completed == upload | {"status": "completed", "file": completed["file"]}
        check_output(server, server.await_batch(server.create_batch(completed["file"]["id"])["id"]), lines)
        assert {name for name in server.stored() if name.startswith("part_")} == {first, second}
        repeated = server.complete(upload["id"], [first, second])
        assert json.loads(repeated.text) == completed
