"""Servers that tests share: those of the whole session, and one a file with its scripted engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.processes import ScriptedProcess, Server


@pytest.fixture(scope="session")
def built_in_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
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


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedProcess]:
    """A scripted engine that runs eight lines at a time, of `scripted` and of a model whose name needs quoting."""
    log, models = tmp_path_factory.mktemp("engine") / "engine.log", "scripted,org/m:x"
    with ScriptedProcess(log, models=models, capacity="slots", slots=8, latency_ms=10) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: ScriptedProcess) -> Iterator[Server]:
    """A server in front of that engine, whatever it is asked without an error of its own."""
    with Server(tmp_path_factory.mktemp("server") / "data", "--upstream", engine.base_url) as server:
        yield server
        assert "Traceback" not in server.log()
