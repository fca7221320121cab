"""The Files API against a real server."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.faults.test_kill import batch_input
from tests.processes import Server


def blobs_of(server: Server) -> set[Path]:
    return {path for path in (server.data_dir / "blobs").rglob("*") if path.is_file()}


def upload(server: Server, content: bytes = b"{}\n", **fields: str) -> Any:
    files = {"file": ("x.jsonl", content)}
    return server.http.post("/v1/files", data={"purpose": "batch"} | fields, files=files)


def error_of(answer: Any) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["param"], error["code"]


def test_every_file_is_listed_exactly_once_page_by_page(server: Server) -> None:
    made = [upload(server).json()["id"] for _ in range(25)]
    for order, expected in (("asc", made), ("desc", made[::-1])):
        seen: list[str] = []
        page: dict[str, Any] = {"has_more": True, "last_id": None}
        while page["has_more"]:
            query = {"limit": 7, "order": order} | ({"after": page["last_id"]} if page["last_id"] else {})
            page = server.http.get("/v1/files", params=query).json()
            assert set(page) == {"object", "data", "first_id", "last_id", "has_more"}
            seen += [file["id"] for file in page["data"]]
        assert [file_id for file_id in seen if file_id in made] == expected
        assert len(seen) == len(set(seen))


def test_a_listing_is_filtered_by_purpose(server: Server) -> None:
    other = server.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a.txt", b"x")}).json()["id"]
    assert [file["id"] for file in server.http.get("/v1/files?purpose=user_data").json()["data"]] == [other]
    empty = server.http.get("/v1/files?purpose=vision").json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("limit=0", (400, "limit", "integer_below_min_value")),
        ("limit=10001", (400, "limit", "integer_above_max_value")),
        ("order=up", (400, "order", "invalid_value")),
        ("after=file-unknown", (404, "after", None)),
    ],
)
def test_a_listing_refuses_what_it_cannot_do(server: Server, query: str, error: tuple[int, str, str | None]) -> None:
    assert error_of(server.http.get(f"/v1/files?{query}")) == error


def test_a_deleted_file_is_really_gone(server: Server) -> None:
    before = blobs_of(server)
    file_id = upload(server).json()["id"]
    assert len(blobs_of(server)) == len(before) + 1
    assert server.http.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert blobs_of(server) == before
    for request in (server.http.get, server.http.delete):
        assert error_of(request(f"/v1/files/{file_id}")) == (404, "id", None)
    assert error_of(server.http.get(f"/v1/files/{file_id}/content")) == (404, "id", None)


def test_the_input_of_a_running_batch_cannot_be_deleted(server: Server) -> None:
    file_id = server.upload(batch_input(2000))
    batch = server.create_batch(file_id)
    answer = server.http.delete(f"/v1/files/{file_id}")
    assert error_of(answer) == (409, "id", "file_in_use")
    assert answer.headers["x-should-retry"] == "false"
    ended = server.await_batch(batch["id"])
    assert server.http.delete(f"/v1/files/{file_id}").status_code == 200
    assert server.http.delete(f"/v1/files/{ended['output_file_id']}").status_code == 200
    assert server.batch(batch["id"])["output_file_id"] == ended["output_file_id"], "the batch still names it"


def test_files_expire_when_asked_to(server: Server) -> None:
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = upload(server, **fields).json()
    assert file["expires_at"] == file["created_at"] + 3600
    assert upload(server).json()["expires_at"] is None
    short = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}
    assert error_of(upload(server, **short)) == (400, "expires_after.seconds", "integer_below_min_value")
    anchorless = {"expires_after[seconds]": "3600"}
    assert error_of(upload(server, **anchorless)) == (400, "expires_after.anchor", "missing_required_parameter")


@pytest.fixture(scope="module")
def content() -> bytes:
    return b"{}\n" + random.Random(5).randbytes(3_000_000)


@pytest.fixture(scope="module")
def stored(server: Server, content: bytes) -> str:
    return str(upload(server, content).json()["id"])


def test_content_comes_whole_with_its_length_and_name(server: Server, stored: str, content: bytes) -> None:
    answer = server.http.get(f"/v1/files/{stored}/content")
    assert answer.content == content
    assert answer.headers["content-length"] == str(len(content))
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''x.jsonl"
    assert answer.headers["x-content-type-options"] == "nosniff"
    cached = server.http.get(f"/v1/files/{stored}/content", headers={"If-None-Match": answer.headers["etag"]})
    assert (cached.status_code, cached.content) == (304, b"")


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("0-0", 0, 1),
        ("10-19", 10, 20),
        ("2999000-", 2_999_000, None),
        ("-5", -5, None),
        ("1048575-1048577", 1048575, 1048578),
    ],
)
def test_a_range_of_the_content(
    server: Server, stored: str, content: bytes, wanted: str, start: int, end: int | None
) -> None:
    answer = server.http.get(f"/v1/files/{stored}/content", headers={"Range": f"bytes={wanted}"})
    assert (answer.status_code, answer.content) == (206, content[start:end])
    first = start % len(content)
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(content)}"


def test_a_range_beyond_the_end_is_refused_with_the_size(server: Server, stored: str, content: bytes) -> None:
    answer = server.http.get(f"/v1/files/{stored}/content", headers={"Range": f"bytes={len(content)}-"})
    assert error_of(answer)[0] == 416
    assert answer.headers["content-range"] == f"bytes */{len(content)}"


@pytest.mark.parametrize("wanted", ["lines=1-2", "bytes=5-2", "bytes=-", "bytes=0-1,5-6", "bytes=x"])
def test_a_range_that_is_not_understood_is_ignored(server: Server, stored: str, content: bytes, wanted: str) -> None:
    answer = server.http.get(f"/v1/files/{stored}/content", headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (200, content)


def test_if_range_guards_against_another_content(server: Server, stored: str, content: bytes) -> None:
    headers = {"Range": "bytes=0-9", "If-Range": '"other"'}
    assert server.http.get(f"/v1/files/{stored}/content", headers=headers).status_code == 200
    headers["If-Range"] = f'"{stored}"'
    assert server.http.get(f"/v1/files/{stored}/content", headers=headers).status_code == 206


def test_curl_resumes_an_interrupted_download(server: Server, stored: str, content: bytes, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.write_bytes(content[:1_234_567])
    url = f"{server.base_url}/v1/files/{stored}/content"
    subprocess.run(["curl", "-sf", "-C", "-", "-o", str(partial), url], check=True)
    assert hashlib.sha256(partial.read_bytes()).digest() == hashlib.sha256(content).digest()


def test_only_batch_files_can_be_downloaded(server: Server) -> None:
    file = server.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a.txt", b"x")}).json()
    answer = server.http.get(f"/v1/files/{file['id']}/content")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "Not allowed to download files of purpose: user_data"
