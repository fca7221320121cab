"""The command line, as scripts rely on it: output, exit statuses, going on after an interruption."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.faults.test_kill import batch_input
from tests.processes import COMMAND, ScriptedProcess, Server

import pronghorn


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedProcess]:
    with ScriptedProcess(tmp_path / "engine.log", latency_ms=20) as engine:
        yield engine


def pronghorn_command(*arguments: str | Path, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "COLUMNS": "120"} | environment
    return subprocess.run(
        COMMAND + [str(argument) for argument in arguments], capture_output=True, text=True, timeout=60, env=variables
    )


def test_help_answers_at_once_and_names_every_command(tmp_path: Path) -> None:
    durations = []
    for _ in range(3):
        start = cpu_seconds_of_children()
        shown = pronghorn_command("--help", home=tmp_path)
        durations.append(cpu_seconds_of_children() - start)
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("serve", "run", "models", "jobs", "engine"))
    assert min(durations) < 0.6, "0.3 s is the aim; the rest is for a slow processor"


def cpu_seconds_of_children() -> float:
    """Return what ended children have used: on a busy machine the clock says nothing."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_importing_the_package_is_cheap() -> None:
    code = f"import sys; import {pronghorn.__name__}; print(len(sys.modules))"
    modules = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert modules < 80


def test_run_writes_answers_in_input_order_and_exits_0(tmp_path: Path, engine: ScriptedProcess) -> None:
    (tmp_path / "in.jsonl").write_bytes(batch_input(500))
    ran = pronghorn_command(
        "run", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--upstream", engine.base_url, home=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
    assert "500 of 500 lines succeeded" in ran.stderr
    ids = [json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ids == [f"line-{number}" for number in range(500)]
    assert not list((tmp_path / "data").rglob("*.db")), "a run that has ended leaves no state behind"


def test_run_exits_3_and_keeps_failed_lines_apart(tmp_path: Path, engine: ScriptedProcess) -> None:
    lines = batch_input(3) + batch_input(1, "[[scripted fault=400 times=always]]").replace(b"line-0", b"bad")
    (tmp_path / "in.jsonl").write_bytes(lines)
    command = ("run", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--upstream", engine.base_url)
    ran = pronghorn_command(*command, "-e", tmp_path / "failed.jsonl", home=tmp_path)
    assert ran.returncode == 3, ran.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    failed = json.loads((tmp_path / "failed.jsonl").read_text())
    assert (failed["custom_id"], failed["response"]["status_code"], failed["error"]) == ("bad", 400, None)
    without_place = pronghorn_command(*command, home=tmp_path)
    assert without_place.returncode == 3
    assert (tmp_path / "out.errors.jsonl").exists(), "failed lines are never dropped"


def test_run_exits_2_and_lists_every_bad_line(tmp_path: Path, engine: ScriptedProcess) -> None:
    (tmp_path / "in.jsonl").write_bytes(batch_input(1) + b"nonsense\n{}\n")
    ran = pronghorn_command(
        "run", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--upstream", engine.base_url, home=tmp_path
    )
    assert ran.returncode == 2
    places = re.findall(r"in\.jsonl:(\d+): ", ran.stderr)
    assert places == ["2", "3", "3", "3", "3"]
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run", "-i", "missing.jsonl", "-o", "out.jsonl"), "there is no file missing.jsonl"),
        (("run", "-i", "/proc/self/mem", "-o", "out.jsonl"), "cannot read /proc/self/mem: Input/output error"),
        (("serve", "--config", "missing.toml"), "cannot read missing.toml"),
        (("serve", "--upstream", "ftp://x"), "is not an http:// or https:// URL"),
        (("serve", "--upstream", "http://user:secret@x"), "holds no user name or password"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_2(tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    ran = pronghorn_command(*arguments, home=tmp_path)
    assert ran.returncode == 2
    assert complaint in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert "secret" not in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, number: signal.Signals) -> None:
    lines = 2000
    (tmp_path / "in.jsonl").write_bytes(batch_input(lines))
    with ScriptedProcess(tmp_path / "engine.log", capacity="slots", slots=16, latency_ms=20) as engine:
        command = ["run", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--upstream", engine.base_url]
        variables = os.environ | {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")}
        first = subprocess.Popen(COMMAND + [str(part) for part in command], stderr=subprocess.PIPE, env=variables)
        while engine.ledger()["answered_ok"] < 300:
            assert first.poll() is None
        first.send_signal(number)
        _, told = first.communicate(timeout=30)
        assert first.returncode == (-9 if number is signal.SIGKILL else 1)
        assert number is signal.SIGKILL or b"the same command goes on from here" in told
        assert not (tmp_path / "out.jsonl").exists()
        second = pronghorn_command(*command, home=tmp_path)
        assert second.returncode == 0, second.stderr
        ledger = engine.ledger()
        wasted = ledger["requests"] - lines
        assert wasted <= (ledger["max_in_flight"] if number is signal.SIGKILL else 0)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == lines


def test_results_that_cannot_be_written_are_written_by_the_same_command_later(
    tmp_path: Path, engine: ScriptedProcess
) -> None:
    (tmp_path / "in.jsonl").write_bytes(batch_input(20))
    command = ("run", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--upstream", engine.base_url)
    in_the_way = tmp_path / "out.jsonl.part"
    in_the_way.mkdir()
    ran = pronghorn_command(*command, home=tmp_path)
    assert ran.returncode == 1
    complaint = f"pronghorn: cannot write {tmp_path / 'out.jsonl'}: Is a directory; every line has been run"
    assert complaint in ran.stderr
    assert "Traceback" not in ran.stderr
    in_the_way.rmdir()
    assert pronghorn_command(*command, home=tmp_path).returncode == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 20
    assert engine.ledger()["requests"] == 20


def test_jobs_and_models_ask_the_server(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        made = pronghorn_command("jobs", "create", "nightly", "--base-url", server.base_url, home=tmp_path)
        job_id = made.stdout.strip()
        assert re.fullmatch(r"job-\w+", job_id)
        listed = pronghorn_command("jobs", "list", home=tmp_path, PRONGHORN_BASE_URL=server.base_url)
        assert all(part in listed.stdout for part in (server.job_id, job_id, "nightly"))
        models = pronghorn_command("models", "--base-url", server.base_url, home=tmp_path)
        assert re.search(rf"scripted +{re.escape(engine.base_url)} +ready", models.stdout)
        assert server.create_batch(server.upload(batch_input(1)), job_id=job_id)["job_id"] == job_id


def test_without_a_server_jobs_says_how_to_start_one_and_models_what_one_would_offer(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    jobs = pronghorn_command("jobs", "list", "--base-url", nowhere, home=tmp_path)
    assert jobs.returncode == 1
    assert jobs.stderr == f"pronghorn: no server answers at {nowhere}; start one with `pronghorn serve`\n"
    models = pronghorn_command("models", "--base-url", nowhere, home=tmp_path)
    assert models.returncode == 0
    assert "smollm2-135m" in models.stdout


def test_a_data_directory_belongs_to_one_server(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", "--upstream", engine.base_url):
        second = pronghorn_command(
            "serve", "--port", "0", "--data-dir", tmp_path / "data", "--upstream", engine.base_url, home=tmp_path
        )
    assert second.returncode == 2
    assert "is in use by another pronghorn" in second.stderr


def test_the_job_is_made_at_the_first_start_and_kept(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", "--upstream", engine.base_url) as first:
        assert first.terminate() == 0
    with Server(tmp_path / "data", "--upstream", engine.base_url) as second:
        assert second.job_id == first.job_id


def test_run_refuses_to_write_over_what_it_needs(tmp_path: Path, engine: ScriptedProcess) -> None:
    lines, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_bytes(batch_input(2))
    for targets in (("-o", lines), ("-o", out, "-e", out), ("-o", out, "-e", lines), ("-o", out, "-e", tmp_path)):
        ran = pronghorn_command("run", "-i", lines, *targets, "--upstream", engine.base_url, home=tmp_path)
        assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1), ran.stderr
    assert lines.read_bytes() == batch_input(2)


def test_a_run_of_an_edited_input_forgets_the_old_one(tmp_path: Path) -> None:
    lines, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_bytes(batch_input(1000, "old"))
    with ScriptedProcess(tmp_path / "engine.log", capacity="slots", slots=8, latency_ms=20) as engine:
        command = [str(part) for part in ("run", "-i", lines, "-o", out, "--upstream", engine.base_url)]
        variables = os.environ | {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")}
        first = subprocess.Popen(COMMAND + command, stderr=subprocess.DEVNULL, env=variables)
        while engine.ledger()["answered_ok"] < 50:
            assert first.poll() is None
        first.terminate()
        first.wait(30)
        asked = engine.ledger()["requests"]
        lines.write_bytes(batch_input(40, "new"))
        second = pronghorn_command(*command, home=tmp_path)
        assert second.returncode == 0, second.stderr
        assert engine.ledger()["requests"] == asked + 40
    assert out.read_bytes().count(b"new number") == 40


def test_run_leaves_a_servers_data_directory_as_it_was(tmp_path: Path, engine: ScriptedProcess) -> None:
    data, lines = tmp_path / "data", tmp_path / "in.jsonl"
    lines.write_bytes(batch_input(5))
    with Server(data, "--upstream", "http://127.0.0.1:9") as server:
        waiting = server.create_batch(server.upload(batch_input(2)))
    ran = pronghorn_command(
        *("run", "-i", lines, "-o", tmp_path / "out.jsonl", "--data-dir", data, "--upstream", engine.base_url),
        home=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    with Server(data, "--upstream", engine.base_url) as server:
        assert server.await_batch(waiting["id"])["status"] == "completed"
        stored = server.http.get("/v1/files", params={"purpose": "batch"}).json()["data"]
        assert [file["id"] for file in stored] == [waiting["input_file_id"]]
    assert len(list((data / "blobs/files").iterdir())) == 1


def test_commands_say_what_answers_instead_of_a_server(tmp_path: Path) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(502)
            self.end_headers()
            self.wfile.write(b"<html>bad gateway</html>")

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_port}"
        jobs = pronghorn_command("jobs", "list", "--base-url", url, home=tmp_path)
        proxy.shutdown()
    assert jobs.returncode == 1
    assert jobs.stderr == f"pronghorn: no Pronghorn answers at {url}: 502 Bad Gateway\n"


def test_models_of_a_configuration_are_shown_without_a_word_of_servers(tmp_path: Path, engine: ScriptedProcess) -> None:
    models = pronghorn_command("models", "--upstream", engine.base_url, home=tmp_path)
    assert (models.returncode, models.stderr) == (0, "")
    assert "scripted" in models.stdout


def test_a_default_job_that_does_not_exist_stops_the_start(tmp_path: Path, engine: ScriptedProcess) -> None:
    config = tmp_path / "pronghorn.toml"
    config.write_text('default_job = "job-unheard"\n')
    started = pronghorn_command(
        *("serve", "--port", "0", "--data-dir", tmp_path / "data", "--config", config, "--upstream", engine.base_url),
        home=tmp_path,
    )
    assert started.returncode == 2
    assert "pronghorn: default_job names job-unheard, and there is no such job" in started.stderr
