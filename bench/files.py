"""How fast files come in, are planned and go out: `python -m bench.files`.

The client is this process, which does next to nothing but call the socket. Each rate stands beside one of the same run
that is hard to beat: what the disk takes of one process that copies and syncs, what bare sockets carry.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.processes import ScriptedProcess, Server

from bench.command import arguments
from bench.cores import cpu_s
from bench.rows import Row, Scale, Section, markdown

MIB = 1 << 20
LINE_BYTES = 1024
PART_BYTES = 64 * MIB
BOUNDARY = "------------------------d74496d66958873e"
HEADERS = "Host: bench\r\nConnection: close\r\n"
IDLE_PAGES = 100
LOOK_S = 0.02

HOW = """\
A real server, and this process as its client, on the same cores. The plain copy writes the same bytes in pieces of
1 MiB and syncs once; the bare sockets are two processes, one of which does nothing with what it gets. Lines have 1 KiB.
A plan is counted from when the batch has been created until it is seen in progress. Another one of the same file is
planned while pages of 100 batches are fetched."""

Address = tuple[str, int]


class Ingest(NamedTuple):
    """One round over one file: MB/s of each way in and out, and what the server used."""

    copy: float
    sink: float
    upload: float
    upload_cpu_s: float
    upload_mib: float
    parts: float
    source: float
    download: float
    download_cpu_s: float
    download_mib: float


class Planning(NamedTuple):
    """A file planned: seconds, CPU and memory of the server, and the slowest hundredth of pages while it is planned."""

    seconds: float
    cpu_s: float
    mib: float
    page_p99_ms: float
    idle_page_p99_ms: float


def write_input(path: Path, lines: int) -> None:
    """Write a batch's input."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": ""}]}
    fields = {"custom_id": "0" * 12, "method": "POST", "url": "/v1/chat/completions", "body": body}
    bare = json.dumps(fields).encode() + b"\n"
    text = (b"some words of text " * LINE_BYTES)[: LINE_BYTES - len(bare)]
    template = bare.replace(b'"content": ""', b'"content": "%b"' % text)
    with path.open("wb", buffering=MIB) as file:
        for number in range(lines):
            file.write(template.replace(b"0" * 12, b"%012d" % number, 1))


def post(address: Address, path: Path, target: str, field: str, span: tuple[int, int]) -> str:
    """Send a part of a file as a form, and return the id in the answer."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n' if field == "file" else ""
    head += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="x.jsonl"\r\n\r\n'
    tail = f"\r\n--{BOUNDARY}--\r\n"
    start, end = span
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
    length = f"Content-Length: {len(head) + end - start + len(tail)}\r\n"
    with closing(socket.create_connection(address)) as client, path.open("rb") as file:
        client.sendall(f"POST {target} HTTP/1.1\r\n{HEADERS}{kind}{length}\r\n{head}".encode())
        client.sendfile(file, start, end - start)
        client.sendall(tail.encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200"), answer
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["id"])


def upload(address: Address, path: Path) -> str:
    return post(address, path, "/v1/files", "file", (0, path.stat().st_size))


def upload_in_parts(server: Server, address: Address, path: Path) -> None:
    """Send a file in parts, one after the other, and give it up again."""
    size = path.stat().st_size
    announced = {"filename": "x.jsonl", "purpose": "batch", "mime_type": "application/jsonl", "bytes": size}
    upload_id = server.http.post("/v1/uploads", json=announced).json()["id"]
    target = f"/v1/uploads/{upload_id}/parts"
    for start in range(0, size, PART_BYTES):
        post(address, path, target, "data", (start, min(start + PART_BYTES, size)))
    server.http.post(f"/v1/uploads/{upload_id}/cancel").raise_for_status()


def download(address: Address, file_id: str, size: int) -> None:
    """Take a file's content and drop it."""
    buffer = bytearray(MIB)
    received = 0
    with closing(socket.create_connection(address)) as client:
        client.sendall(f"GET /v1/files/{file_id}/content HTTP/1.1\r\n{HEADERS}\r\n".encode())
        while count := client.recv_into(buffer):
            received += count
    assert received > size, (received, size)


def sink(listener: socket.socket) -> None:
    """Take what one client sends, and answer it."""
    client, _ = listener.accept()
    buffer = bytearray(MIB)
    with client:
        while not buffer[: client.recv_into(buffer)].endswith(f"{BOUNDARY}--\r\n".encode()):
            pass
        client.sendall(b'HTTP/1.1 200 OK\r\n\r\n{"id": ""}')


def source(listener: socket.socket, path: Path) -> None:
    """Send a file to one client, read and sent in pieces of 1 MiB."""
    client, _ = listener.accept()
    with client, path.open("rb", buffering=0) as file:
        client.recv(65536)
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for chunk in iter(lambda: file.read(MIB), b""):
            client.sendall(chunk)


@contextmanager
def serving(serve: Callable[..., None], *arguments: object) -> Iterator[Address]:
    """Serve one connection from a process of its own."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        child = os.fork()
        if not child:
            try:
                serve(listener, *arguments)
            finally:
                os._exit(0)
        yield listener.getsockname()
        os.waitpid(child, 0)


def copy(path: Path) -> None:
    """Write a file's bytes to another, and wait until they are on disk."""
    target = path.with_suffix(".copy")
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as read, target.open("wb", buffering=0) as written:
        while count := read.readinto(buffer):
            written.write(memoryview(buffer)[:count])
        os.fsync(written.fileno())
    target.unlink()


def timed(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def forget_peak(server: Server) -> float:
    """Begin a new peak of the server's memory, and return what is resident, in MiB."""
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    return server.peak_bytes() / MIB


def ingest(server: Server, path: Path) -> Ingest:
    """Send a file in every way and fetch it again."""
    size = path.stat().st_size
    megabytes = size / 1e6
    address = (server.http.base_url.host, server.http.base_url.port or 80)
    copied = timed(copy, path)
    with serving(sink) as bare:
        sunk = timed(upload, bare, path)
    before_mib, before_s = forget_peak(server), cpu_s(server.pid)
    start = time.perf_counter()
    file_id = upload(address, path)
    uploaded = time.perf_counter() - start
    upload_mib, upload_s = server.peak_bytes() / MIB - before_mib, cpu_s(server.pid) - before_s
    in_parts = timed(upload_in_parts, server, address, path)
    with serving(source, path) as bare:
        sourced = timed(download, bare, "", size)
    before_mib, before_s = forget_peak(server), cpu_s(server.pid)
    downloaded = timed(download, address, file_id, size)
    download_mib, download_s = server.peak_bytes() / MIB - before_mib, cpu_s(server.pid) - before_s
    server.http.delete(f"/v1/files/{file_id}").raise_for_status()
    rates = [megabytes / seconds for seconds in (copied, sunk, uploaded, in_parts, sourced, downloaded)]
    per_gb = 1000 / megabytes
    return Ingest(
        copy=rates[0],
        sink=rates[1],
        upload=rates[2],
        upload_cpu_s=upload_s * per_gb,
        upload_mib=upload_mib,
        parts=rates[3],
        source=rates[4],
        download=rates[5],
        download_cpu_s=download_s * per_gb,
        download_mib=download_mib,
    )


def plan(server: Server, path: Path) -> Planning:
    """Plan a file by itself, and once more while pages of batches are fetched."""
    file_id = upload((server.http.base_url.host, server.http.base_url.port or 80), path)
    idle = [page(server) for _ in range(IDLE_PAGES)]
    before_mib, before_s = forget_peak(server), cpu_s(server.pid)
    with planning(server, file_id) as plans:
        start = time.perf_counter()
        while plans():
            time.sleep(LOOK_S)
        planned_s, used_s = time.perf_counter() - start, cpu_s(server.pid) - before_s
    mib = server.peak_bytes() / MIB - before_mib
    with planning(server, file_id) as plans:
        took = [page(server)]
        while plans():
            took.append(page(server))
    server.http.delete(f"/v1/files/{file_id}").raise_for_status()
    return Planning(planned_s, used_s, mib, p99(took) * 1e3, p99(idle) * 1e3)


@contextmanager
def planning(server: Server, file_id: str) -> Iterator[Callable[[], bool]]:
    """Create a batch, yield what tells whether it is still planned, and cancel it."""
    batch_id = server.create_batch(file_id)["id"]
    yield lambda: server.batch(batch_id)["status"] == "validating"
    server.http.post(f"/v1/batches/{batch_id}/cancel").raise_for_status()
    server.await_batch(batch_id, timeout_s=600)


def page(server: Server) -> float:
    """Fetch the newest batches, and return how many seconds that took."""
    start = time.perf_counter()
    server.http.get("/v1/batches", params={"limit": 100}).raise_for_status()
    return time.perf_counter() - start


def p99(took: list[float]) -> float:
    return sorted(took)[int(len(took) * 0.99)]


def measure(scale: Scale, folder: Path | None = None, lines: int | None = None) -> Section:
    """Send, fetch and plan a file of lines of 1 KiB; `folder` says on which disk."""
    count = lines or scale.times(smoke=2_000, quick=256 * 1024, full=1_000_000)
    rounds = scale.times(smoke=1, quick=3, full=3)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        write_input(scratch / "input.jsonl", count)
        with (
            ScriptedProcess(scratch / "engine.log", capacity="slots", slots=1, latency_ms=500) as engine,
            Server(scratch / "data", "--upstream", engine.base_url) as server,
        ):
            ingests = [ingest(server, scratch / "input.jsonl") for _ in range(rounds)]
            plans = [plan(server, scratch / "input.jsonl") for _ in range(rounds)]
    return Section("Files", HOW, [*file_rows(ingests), *plan_rows(plans, count)])


def file_rows(runs: list[Ingest]) -> list[Row]:
    copies, sinks, sources = [run.copy for run in runs], [run.sink for run in runs], [run.source for run in runs]
    uploads, downloads = [run.upload for run in runs], [run.download for run in runs]
    wanted = "at least 400, or 0.8 of the copy"
    return [
        Row("upload", uploads, "MB/s", "plain copy, synced", copies, wanted),
        Row("upload", uploads, "MB/s", "bare sockets", sinks),
        Row("upload in parts of 64 MiB", [run.parts for run in runs], "MB/s", "plain copy, synced", copies, wanted),
        Row("upload: CPU of the server", [run.upload_cpu_s for run in runs], "s/GB"),
        Row("upload: memory of the server", [run.upload_mib for run in runs], "MiB more", wanted="at most 32"),
        Row("download", downloads, "MB/s", "bare sockets", sources, "at least 500"),
        Row("download: CPU of the server", [run.download_cpu_s for run in runs], "s/GB"),
        Row("download: memory of the server", [run.download_mib for run in runs], "MiB more"),
    ]


def plan_rows(runs: list[Planning], lines: int) -> list[Row]:
    seconds = [run.seconds * 1e6 / lines for run in runs]
    return [
        Row(f"plan of {lines:,} lines", seconds, "us/line", wanted="at most 5"),
        Row("plan: CPU of the server", [run.cpu_s * 1e6 / lines for run in runs], "us/line"),
        Row("plan: memory of the server", [run.mib for run in runs], "MiB more"),
        Row(
            "page of batches meanwhile, p99",
            [run.page_p99_ms for run in runs],
            "ms",
            "idle",
            [run.idle_page_p99_ms for run in runs],
        ),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lines", type=int, help="rather than as many as the scale has")
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure")
    chosen = parser.parse_args()
    print(markdown([measure(chosen.scale, chosen.dir, chosen.lines)]))


if __name__ == "__main__":
    main()
