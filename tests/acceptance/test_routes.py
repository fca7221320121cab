"""Every route against requests that it is not made for: OpenAI's envelope, whatever is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.processes import Server

ROUTES = {
    "/health": {"GET", "HEAD"},
    "/v1/files": {"GET", "POST"},
    "/v1/files/{}": {"GET", "DELETE"},
    "/v1/files/{}/content": {"GET", "HEAD"},
    "/v1/batches": {"GET", "POST"},
    "/v1/batches/validate": {"GET", "POST"},
    "/v1/batches/{}": {"GET"},
    "/v1/batches/{}/cancel": {"POST"},
    "/v1/batches/{}/retry": {"POST"},
    "/v1/batches/{}/output": {"GET"},
    "/v1/batches/{}/errors": {"GET"},
    "/v1/batches/{}/events": {"GET"},
    "/v1/models": {"GET"},
    "/v1/models/{}": {"GET"},
    "/v1/jobs": {"GET", "POST"},
    "/v1/uploads": {"POST"},
    "/v1/uploads/{}/parts": {"POST"},
    "/v1/uploads/{}/complete": {"POST"},
    "/v1/uploads/{}/cancel": {"POST"},
    "/v1/webhook_endpoints": {"GET", "POST"},
    "/v1/webhook_endpoints/{}": {"GET", "POST", "DELETE"},
    "/v1/webhook_endpoints/{}/rotate_secret": {"POST"},
    "/v1/webhook_endpoints/{}/test": {"POST"},
    "/v1/webhook_endpoints/{}/deliveries": {"GET"},
    "/v1/webhook_event_types": {"GET"},
    "/v1/chat/completions": {"POST"},
    "/v1/completions": {"POST"},
    "/v1/embeddings": {"POST"},
    "/v1/responses": {"POST"},
}
JSON_ROUTES = [
    "/v1/batches",
    "/v1/batches/validate",
    "/v1/batches/batch_none/retry",
    "/v1/jobs",
    "/v1/uploads",
    "/v1/uploads/upload_none/complete",
    "/v1/webhook_endpoints",
    "/v1/webhook_endpoints/whe_none",
    "/v1/webhook_endpoints/whe_none/test",
    "/v1/webhook_endpoints/whe_none/rotate_secret",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
]
FORM_ROUTES = ["/v1/files", "/v1/uploads/{}/parts"]
NO_JSON = {
    "cut off": b'{"a": ',
    "not UTF-8": b"\xff\xfe\x00",
    "half of a surrogate pair": b'{"name": "\\ud800", "model": "\\ud800"}',
    "a name that is half of a pair": b'{"\\udc00": 1, "model": "\\udc00"}',
    "not a number": b'{"name": NaN, "model": NaN}',
    "a number of 5,000 digits": b'{"weight": ' + b"9" * 5000 + b', "model": 9}',
    "nested too deep": b'{"overrides": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
    "nested without end": b"[" * 100_000,
}
WRONG_TYPES = [b"null", b"[]", b"3", b'"text"', b"true", b"1.5"]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """Return the error of an answer that has this status, and the envelope as its whole body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    assert isinstance(body["error"]["message"], str)
    return dict(body["error"])


def test_the_table_above_is_complete(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {"/".join("{}" if part.startswith("{") else part for part in path.split("/")) for path in paths} == set(
        ROUTES
    )


@pytest.mark.parametrize("path", ROUTES)
def test_other_methods_are_405_and_name_those_that_work(server: Server, path: str) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - ROUTES[path]:
        answer = server.http.request(method, path.format("x"))
        error = error_of(answer, 405)
        assert error["code"] == "method_not_allowed"
        assert set(answer.headers["allow"].split(", ")) == ROUTES[path]


@pytest.mark.parametrize("path", ROUTES)
def test_a_head_request_is_answered_without_a_body(server: Server, path: str) -> None:
    answer = server.http.head(path.format("x"))
    expected = 405 if "HEAD" not in ROUTES[path] else 200 if path == "/health" else 404
    assert (answer.status_code, answer.content) == (expected, b"")


def test_head_tells_the_size_of_a_file(server: Server) -> None:
    path = f"/v1/files/{server.upload(b'{}' + b' ' * 98)}/content"
    whole, part = server.http.head(path), server.http.head(path, headers={"range": "bytes=90-"})
    assert (whole.status_code, whole.headers["content-length"], whole.content) == (200, "100", b"")
    assert (part.status_code, part.headers["content-length"], part.content) == (206, "10", b"")
    assert part.headers["content-range"] == "bytes 90-99/100"


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/v1/nothing", "/v2/files", "/v1/files/x/y", "/v1/uploads/x", "/x%ff"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_path_is_404(server: Server, method: str, path: str) -> None:
    error = error_of(server.http.request(method, path), 404)
    assert error["message"].startswith(f"Invalid URL ({method} /")


@pytest.mark.parametrize("path", ROUTES)
def test_a_trailing_slash_is_another_path(server: Server, path: str) -> None:
    """No redirect: it would make a POST a GET in some clients, and lose an upload's body in others."""
    for method in ROUTES[path] - {"HEAD"}:
        error_of(server.http.request(method, path.format("x") + "/"), 404)


@pytest.mark.parametrize("path", JSON_ROUTES)
@pytest.mark.parametrize("what", NO_JSON)
def test_a_body_that_is_no_json_is_400(server: Server, path: str, what: str) -> None:
    headers = {"content-type": "application/json"}
    error = error_of(server.http.post(path, content=NO_JSON[what], headers=headers), 400)
    assert error["message"]


@pytest.mark.parametrize("path", JSON_ROUTES)
def test_a_body_that_is_no_object_is_400(server: Server, path: str) -> None:
    for content in WRONG_TYPES:
        if path.endswith("rotate_secret") and content == b"null":
            continue  # its body is optional
        error = error_of(server.http.post(path, content=content, headers={"content-type": "application/json"}), 400)
        assert error["message"].startswith("The request's body must be a JSON object, but it is ")


@pytest.mark.parametrize("path", JSON_ROUTES)
def test_a_body_that_is_not_said_to_be_json_is_400(server: Server, path: str) -> None:
    """As `curl -d` sends it when no content type is given; live requests go to the engine as they are."""
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"):
        answer = server.http.post(path, content=b'{"x": 1}', headers={"content-type": kind})
        error = error_of(answer, 400)
        if path not in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"):
            assert error["code"] == "unsupported_content_type"
            assert "application/json" in error["message"]


@pytest.mark.parametrize("path", FORM_ROUTES)
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=", b"x"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"no part"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n\r\n--x--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 1000, b"x"),
    ],
)
def test_a_body_that_is_no_form_is_400(server: Server, path: str, kind: str, content: bytes) -> None:
    upload = {"filename": "x.txt", "purpose": "vision", "bytes": 1, "mime_type": "text/plain"}
    path = path.format(server.http.post("/v1/uploads", json=upload).json()["id"])
    error_of(server.http.post(path, content=content, headers={"content-type": kind}), 400)


@pytest.mark.parametrize(
    ("path", "body", "param", "code", "message"),
    [
        (
            "/v1/jobs",
            {"name": "x" * 257},
            "name",
            "string_above_max_length",
            "Invalid 'name': string too long. Expected a string with maximum length 256, but got a string with length "
            "257 instead.",
        ),
        (
            "/v1/jobs",
            {"name": ""},
            "name",
            "string_below_min_length",
            "Invalid 'name': string too short. Expected a string with minimum length 1, but got a string with length 0 "
            "instead.",
        ),
        ("/v1/jobs", {"name": "x", "weight": 0}, "weight", "integer_below_min_value", None),
        ("/v1/jobs", {"name": "x", "weight": 10**30}, "weight", "integer_above_max_value", None),
        ("/v1/jobs", {"name": 5}, "name", "invalid_type", None),
        ("/v1/jobs", {"name": "x", "more": 1}, "more", "unknown_parameter", None),
        ("/v1/uploads", {"mime_type": "x" * 256}, "mime_type", "string_above_max_length", None),
        ("/v1/uploads", {"filename": ""}, "filename", "string_below_min_length", None),
        ("/v1/uploads", {"purpose": None}, "purpose", "invalid_type", None),
        (
            "/v1/uploads",
            {"expires_after": {"anchor": "now", "seconds": 3600}},
            "expires_after.anchor",
            "invalid_value",
            "Invalid value: 'now'. Supported values are: 'created_at'.",
        ),
        (
            "/v1/uploads/{}/complete",
            {"part_ids": ["x"] * 100_001},
            "part_ids",
            "array_above_max_length",
            "Invalid 'part_ids': array too long. Expected an array with maximum length 100000, but got an array with "
            "length 100001 instead.",
        ),
        ("/v1/uploads/{}/complete", {"part_ids": ["x", 5]}, "part_ids[1]", "invalid_type", None),
        ("/v1/webhook_endpoints", {"name": "x" * 257}, "name", "string_above_max_length", None),
        ("/v1/webhook_endpoints", {"url": f"https://h.example/{'x' * 2048}"}, "url", "string_above_max_length", None),
        ("/v1/webhook_endpoints", {"event_types": []}, "event_types", "array_below_min_length", None),
        (
            "/v1/batches",
            {"on_invalid": "ignore"},
            "on_invalid",
            "invalid_value",
            "Invalid value: 'ignore'. Supported values are: 'fail' and 'skip'.",
        ),
    ],
)
def test_a_value_out_of_bounds_has_openais_code(
    server: Server, path: str, body: dict[str, Any], param: str, code: str, message: str | None
) -> None:
    complete: dict[str, dict[str, Any]] = {
        "/v1/batches": {
            "input_file_id": "file-x",
            "endpoint": "/v1/embeddings",
            "completion_window": "24h",
            "job_id": server.job_id,
        },
        "/v1/uploads": {"filename": "x.txt", "purpose": "vision", "bytes": 1, "mime_type": "text/plain"},
        "/v1/webhook_endpoints": {"name": "n", "url": "https://h.example/", "event_types": ["batch.failed"]},
    }
    error = error_of(server.http.post(path.format("x"), json=complete.get(path, {}) | body), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert message is None or error["message"] == message


def test_a_header_out_of_bounds_has_openais_code(server: Server) -> None:
    headers = {"idempotency-key": "x" * 257}
    error = error_of(server.http.post("/v1/batches", content=json.dumps({}), headers=headers), 400)
    assert (error["param"], error["code"]) == ("idempotency-key", "string_above_max_length")
