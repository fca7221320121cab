"""What the README tells people to type works as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.processes import ScriptedProcess, Server

from pronghorn import settings

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def blocks(section: str, language: str) -> list[str]:
    """Return the fenced blocks of a section, its subsections included."""
    _, found, rest = README.partition(f"\n## {section}\n")
    assert found, f"the README has no section {section}"
    text, _, _ = rest.partition("\n## ")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


class Shell:
    """Runs one block after the other in one folder, as someone would who follows the README."""

    def __init__(self, folder: Path, server: Server) -> None:
        self._folder = folder
        self._variables = os.environ | {
            "BASE_URL": server.base_url,
            "JOB_ID": server.job_id,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.values = {"http://127.0.0.1:8080": server.base_url, "job-xxxxxxxx": server.job_id}

    def run(self, block: str, program: str = "bash") -> str:
        for placeholder, value in self.values.items():
            block = block.replace(placeholder, value)
        ran = subprocess.run(
            [program, "-e"] if program == "bash" else [program, "-"],
            input=block,
            cwd=self._folder,
            env=self._variables,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert ran.returncode == 0, f"{block}\n{ran.stderr}"
        return ran.stdout


@pytest.mark.parametrize("fixture", ["built_in_server", "scripted_server"])
def test_the_quickstart(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server: Server = request.getfixturevalue(fixture)
    shell = Shell(tmp_path, server)
    variables, prepare, upload, create, poll, download = blocks("Quickstart", "sh")
    shell.run(variables)
    shell.run(prepare)
    shell.values["file-abc123"] = json.loads(shell.run(upload))["id"]
    batch_id = json.loads(shell.run(create))["id"]
    shell.values["batch_xyz789"] = batch_id
    server.await_batch(batch_id)
    batch = json.loads(shell.run(poll))
    assert batch["status"] == "completed"
    shell.values["<output_file_id>"] = batch["output_file_id"]
    shell.run(download)
    check_output(tmp_path / "output.jsonl")


@pytest.mark.parametrize("fixture", ["built_in_server", "scripted_server"])
def test_the_program_with_the_sdk(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server: Server = request.getfixturevalue(fixture)
    shell = Shell(tmp_path, server)
    shell.run(blocks("Quickstart", "sh")[1])
    (program,) = blocks("Quickstart", "python")
    assert shell.run(program, sys.executable).startswith("completed ")
    check_output(tmp_path / "output.jsonl")


def test_a_run_without_a_server(scripted_server: Server, tmp_path: Path) -> None:
    shell = Shell(tmp_path, scripted_server)
    shell.run(blocks("Quickstart", "sh")[1])
    (command,) = blocks("Without a server", "sh")
    with ScriptedProcess(tmp_path / "engine.log", models="your-model") as engine:
        shell.run(f"{command.strip()} --data-dir state --upstream {engine.base_url}")
    check_output(tmp_path / "output.jsonl")


def test_the_settings_files(tmp_path: Path) -> None:
    for number, text in enumerate(blocks("Engines", "toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        assert settings.load(path, {}).upstream


def check_output(path: Path) -> None:
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert [result["custom_id"] for result in results] == ["req-1", "req-2"]
    assert all(result["response"]["status_code"] == 200 for result in results)
