"""The servers that acceptance tests talk to, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.processes import ScriptedProcess, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the default engine: llama.cpp and the built-in model."""
    with Server(tmp_path_factory.mktemp("server") / "data") as server:
        yield server
        server.terminate()


@pytest.fixture(scope="session")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that sends its lines to a scripted engine, which answers for `scripted` and `your-model`."""
    folder = tmp_path_factory.mktemp("scripted-server")
    with (
        ScriptedProcess(folder / "engine.log", models="scripted,your-model") as engine,
        Server(folder / "data", "--upstream", engine.base_url) as server,
    ):
        yield server
        server.terminate()
