"""`make demo`: start a server, walk through the API with curl and with the OpenAI SDK, stop the server.

Everything it writes is under .demo/: the results, the server's data and its log.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

EXAMPLES = Path(__file__).resolve().parent
DEMO = EXAMPLES.parent / ".demo"
INPUT = EXAMPLES / "input.jsonl"
LOG = DEMO / "server.log"
# A first start fetches 93 MB, a slow machine needs minutes for what takes seconds elsewhere.
START_S = 900.0
BATCH_S = 600.0
STOP_S = 20.0
ENDED = ("completed", "failed", "expired", "cancelled")
TTY = sys.stdout.isatty()


class DemoError(Exception):
    """The demo cannot go on; its text says why."""


# The server


class Server:
    """`pronghorn serve` on a free port, in a session of its own so that ^C reaches the demo alone."""

    def __init__(self) -> None:
        self.base_url = self.job_id = ""

    def __enter__(self) -> Server:
        command = ["pronghorn", "serve", "--port", "0", "--data-dir", str(DEMO / "data")]
        say(f"Start the server. Its log goes to {LOG.relative_to(DEMO.parent)}.", shlex.join(command))
        installed = Path(sys.executable).with_name("pronghorn")
        if not installed.exists():
            raise DemoError(f"Pronghorn is not installed where {sys.executable} is; `make demo` sees to that")
        command[0] = str(installed)
        # With a terminal for its log, the download of the model shows a progress bar.
        reads, writes = os.openpty() if TTY else os.pipe()
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=writes, text=True, start_new_session=True
        )
        os.close(writes)
        self._ready = False
        self._relay = threading.Thread(target=self._keep_log, args=(reads,), daemon=True)
        self._relay.start()
        try:
            self._await_banner()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        print("\nStopping the server.")
        self.stop()

    def _await_banner(self) -> None:
        alarm = threading.Timer(START_S, self._process.kill)
        alarm.start()
        values = {}
        for line in self._process.stdout or ():
            print(line, end="")
            name, _, value = line.strip().partition("=")
            values[name] = value
            if len(values) == 2:
                break
        alarm.cancel()
        if values.keys() != {"BASE_URL", "JOB_ID"}:
            raise DemoError(f"the server did not start:\n\n{tail(LOG)}")
        self._ready = True
        self.base_url, self.job_id = values["BASE_URL"], values["JOB_ID"]

    def _keep_log(self, source: int) -> None:
        """Copy the server's log to its file, and to the terminal until the server is ready."""
        with LOG.open("wb") as log:
            while chunk := read_some(source):
                log.write(chunk)
                log.flush()
                if not self._ready:
                    sys.stderr.buffer.write(chunk)
                    sys.stderr.flush()
        os.close(source)

    def stop(self) -> None:
        """End the server and everything it started, whatever state they are in."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._relay.join(STOP_S)


def read_some(source: int) -> bytes:
    try:
        return os.read(source, 65536)
    except OSError:  # how a terminal says that its other end is closed
        return b""


def tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(lines[-15:])


# The walk with curl


def walk_with_curl(server: Server) -> Path:
    """Upload, create, poll and download with curl; return the file of answers."""
    headline("The API with curl")
    folder = fresh_folder("curl")

    say("1. The input: one request a line.", "head -n 1 input.jsonl")
    print(shorten(shell("head -n 1 input.jsonl", server, folder), 300))

    upload = 'curl -sS -X POST "$BASE_URL/v1/files" -F "purpose=batch" -F "file=@input.jsonl"'
    say("2. Upload it.", upload)
    file = answer_of(shell(upload, server, folder))
    show(file, "id", "object", "bytes", "filename", "purpose")

    body = {
        "input_file_id": file["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "unlimited",
        "job_id": server.job_id,
    }
    create = (
        'curl -sS -X POST "$BASE_URL/v1/batches" \\\n  -H "Content-Type: application/json" \\\n'
        f"  -d '{json.dumps(body, indent=2)}'"
    )
    say("3. Create a batch of it.", create)
    batch = answer_of(shell(create, server, folder))
    show(batch, "id", "status", "input_file_id", "job_id", "created_at")

    poll = f'curl -sS "$BASE_URL/v1/batches/{batch["id"]}"'
    say("4. Ask how far it is, until it has ended.", poll)
    batch = poll_until_ended(poll, server, folder)
    show(batch, "id", "status", "output_file_id", "error_file_id", "request_counts", "usage")
    if batch["status"] != "completed" or batch["error_file_id"]:
        raise DemoError(f"the batch did not go well: {json.dumps(batch, indent=2)}")

    download = f'curl -sS "$BASE_URL/v1/files/{batch["output_file_id"]}/content" > output.jsonl'
    say("5. Download the answers.", download)
    shell(download, server, folder)
    return folder / "output.jsonl"


def shell(command: str, server: Server, folder: Path) -> str:
    """Run a command as it was shown and return what it prints."""
    variables = os.environ | {"BASE_URL": server.base_url, "JOB_ID": server.job_id, "NO_PROXY": "127.0.0.1"}
    ran = subprocess.run(["sh", "-c", command], cwd=folder, env=variables, capture_output=True, text=True)
    if ran.returncode != 0:
        raise DemoError(f"`{command}` exits with {ran.returncode}: {ran.stderr.strip()}")
    return ran.stdout


def answer_of(text: str) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        raise DemoError(f"the server answers something that is not JSON: {text[:500]}") from None
    if "error" in answer:
        raise DemoError(f"the server answers: {answer['error']['message']}")
    return answer


def poll_until_ended(command: str, server: Server, folder: Path) -> dict[str, Any]:
    start = time.monotonic()
    shown = ""
    while (elapsed := time.monotonic() - start) < BATCH_S:
        batch = answer_of(shell(command, server, folder))
        counts, tokens = batch["request_counts"], batch["usage"]["total_tokens"]
        progress = f"{batch['status']:<12} {counts['completed']:>3} of {counts['total']} lines"
        progress += f"   {counts['failed']} failed   {tokens:>6,} tokens"
        if batch["progress"] and batch["progress"]["reason"]:
            progress += f"   {batch['progress']['reason']}"
        if TTY:
            print(f"\r\033[K{progress}   {elapsed:4.1f} s", end="", flush=True)
        elif progress != shown:
            print(f"{progress}   {elapsed:4.1f} s", flush=True)
        shown = progress
        if batch["status"] in ENDED:
            print(end="\n" if TTY else "")
            return batch
        time.sleep(0.25)
    raise DemoError(f"the batch has not ended after {BATCH_S:.0f} s")


# The walk with the SDK


def walk_with_sdk(server: Server) -> Path:
    """Run examples/quickstart.py; return the file of answers."""
    headline("The API with the OpenAI SDK")
    folder = fresh_folder("sdk")
    program = EXAMPLES / "quickstart.py"
    _, _, source = program.read_text().partition('"""\n\n')
    say("The program, examples/quickstart.py:", None)
    print(textwrap.indent(source.strip(), "    "))
    say("Run it.", "python quickstart.py input.jsonl output.jsonl")
    variables = os.environ | {"BASE_URL": server.base_url, "JOB_ID": server.job_id, "NO_PROXY": "127.0.0.1"}
    ran = subprocess.run([sys.executable, str(program), "input.jsonl", "output.jsonl"], cwd=folder, env=variables)
    if ran.returncode != 0:
        raise DemoError(f"quickstart.py exits with {ran.returncode}")
    return folder / "output.jsonl"


# What is shown


def show_answers(output: Path, one_of_each: bool) -> None:
    """Print prompts beside their answers, after checking that there is one answer a line, in input order."""
    lines = [json.loads(line) for line in INPUT.read_text().splitlines()]
    results = [json.loads(line) for line in output.read_text().splitlines()]
    if [line["custom_id"] for line in lines] != [result["custom_id"] for result in results]:
        raise DemoError(f"{output} does not hold one answer for every line of {INPUT}, in its order")
    print(f"\n{output.relative_to(DEMO.parent)} holds {len(results)} answers in the order of the input.")
    if not one_of_each:
        return
    print("One of each kind; the built-in model is tiny (135 million parameters), and answers like it:\n")
    width = min(shutil.get_terminal_size().columns, 110)
    kinds = set()
    for line, result in zip(lines, results, strict=True):
        kind = line["custom_id"].rpartition("-")[0]
        if kind not in kinds:
            kinds.add(kind)
            answer = result["response"]["body"]["choices"][0]["message"]["content"]
            prompt = line["body"]["messages"][-1]["content"]
            print(f"{line['custom_id']}")
            for mark, text in (("  < ", prompt), ("  > ", answer)):
                print(textwrap.fill(" ".join(text.split()), width, initial_indent=mark, subsequent_indent="    "))


def headline(text: str) -> None:
    print(f"\n{'=' * len(text)}\n{text}\n{'=' * len(text)}")


def say(text: str, command: str | None) -> None:
    print(f"\n{text}")
    if command:
        bold, plain = ("\033[1m", "\033[0m") if TTY else ("", "")
        print(textwrap.indent(f"$ {command}", "  ", lambda line: True).replace("  $", f"  {bold}$", 1) + plain)
    sys.stdout.flush()


def show(answer: dict[str, Any], *names: str) -> None:
    """Print some fields of an answer, with a sign that there are more."""
    print(json.dumps({name: answer[name] for name in names}, indent=2).removesuffix("\n}") + ",\n  ...\n}", flush=True)


def shorten(text: str, chars: int) -> str:
    return text.strip() if len(text) <= chars else text[:chars] + " ..."


def fresh_folder(name: str) -> Path:
    folder = DEMO / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(INPUT, folder / "input.jsonl")
    return folder


def demonstrate() -> None:
    if shutil.which("curl") is None:
        raise DemoError("curl is not installed")
    DEMO.mkdir(exist_ok=True)
    start = time.monotonic()
    with Server() as server:
        show_answers(walk_with_curl(server), one_of_each=True)
        show_answers(walk_with_sdk(server), one_of_each=False)
    print(f"Done in {time.monotonic() - start:.0f} s. `make serve` starts a server that stays.")


def on_signal(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    try:
        demonstrate()
    except DemoError as error:
        print(f"\ndemo: {error}\ndemo: the log of the server is {LOG}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
