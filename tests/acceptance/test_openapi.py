"""The server's own description of itself: valid, complete, and kept by every answer that generated requests get."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from blockbuster import BlockBuster
from fastapi.routing import APIRoute, APIRouter
from tests.processes import ScriptedProcess, Server

from pronghorn.app import create_app
from pronghorn.settings import Settings, UpstreamSettings
from pronghorn.system import running

ENVELOPE = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}}
SEED = 20261123
EXAMPLES = 25
# A schema cannot say which ids exist, so valid requests may be refused. `GET /v1/batches/{batch_id}` also takes the
# path of `POST /v1/batches/validate`, so that one's Allow names a method which its own entry does not.
UNUSABLE_CHECKS = "positive_data_acceptance,allow_header_conformance"


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    return dict(server.http.get("/openapi.json").json())


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(document).validate()


async def test_every_route_is_in_the_document(
    tmp_path: Path, engine: ScriptedProcess, document: dict[str, Any], blockbuster: BlockBuster
) -> None:
    blockbuster.deactivate()  # a system that starts has nobody to keep waiting
    settings = Settings(data_dir=str(tmp_path), upstream=(UpstreamSettings(engine.base_url),))
    async with running(settings) as system:
        app = create_app(system, settings)
    routers = [app.router, *(getattr(route, "original_router", None) for route in app.routes)]
    routes = [route for router in routers if isinstance(router, APIRouter) for route in router.routes]
    served = {
        (method, route.path.replace(":path", ""))
        for route in routes
        if isinstance(route, APIRoute)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == {(method, path) for method, path, _ in operations(document)}


def test_every_operation_is_named_and_says_what_its_errors_are(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    assert all(name.isidentifier() and name.islower() for name in names), "what generated clients call their methods"
    for method, path, operation in operations(document):
        assert operation["responses"]["default"]["content"] == ENVELOPE, (method, path)
        assert "422" not in operation["responses"], (method, path)
        assert operation["responses"]["200"].get("content"), (method, path)
        assert operation["description"], (method, path)
        assert len(operation["tags"]) == 1, (method, path)
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert document["components"]["schemas"]["ErrorBody"]["required"] == ["message", "type", "param", "code"]


def test_the_page_for_people_renders(server: Server) -> None:
    page = server.http.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text


def test_generated_requests_get_what_the_document_promises(server: Server, tmp_path: Path) -> None:
    """Run schemathesis over every operation: no 5xx, no status, type or body that is not documented."""
    print(f"schemathesis --seed {SEED}")
    command = [
        str(Path(sys.executable).with_name("st")),
        *("run", f"{server.base_url}/openapi.json"),
        *("--seed", str(SEED), "--max-examples", str(EXAMPLES), "--no-shrink", "--continue-on-failure"),
        *("--checks", "all", "--exclude-checks", UNUSABLE_CHECKS),
        *("--request-timeout", "30", "--warnings", "off"),
    ]
    ran = subprocess.run(command, cwd=tmp_path, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    log = server.log()
    assert "Traceback" not in log, log
