"""What the server gives to every answer."""

from __future__ import annotations

from typing import Any

import pytest

from pronghorn.api import faults
from pronghorn.app import _App


async def test_the_answer_to_a_bug_has_a_request_id() -> None:
    app = _App()
    faults.install(app)

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError

    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/bug", "headers": [], "query_string": b""}
    with pytest.raises(ZeroDivisionError):
        await app(scope, receive, send)
    assert sent[0]["status"] == 500
    assert dict(sent[0]["headers"])[b"x-request-id"].startswith(b"req_")
