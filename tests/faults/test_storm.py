"""A storm of faults: whatever an engine does wrong, each line ends as the table of docs/RELIABILITY.md says."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.beds import Bed
from tests.processes import Server, configured, restarted

UNLIMITED = "always"
# Stated, because a window that is found by trying shrinks in such weather until the bed takes hours.
WINDOW = 64


class Weather(NamedTuple):
    """What an engine does to a line, how the line must end, and how often it may be asked (None: no bound).

    `ending` is "completed", the status of an answer in the error file, or the code of an error without one.
    """

    fault: str
    times: str
    ending: str | int
    asks_min: int
    asks_max: int | None


def passing(fault: str, times: int, *, free: bool = False) -> Weather:
    """A fault that passes: the line completes. A free one may come back, since waiting costs no attempt."""
    return Weather(fault, str(times), "completed", times + 1, None if free else times + 1)


# A lost line is asked again for nothing when the engine was at fault, and once at once when a connection was reused.
FAIR = Weather("", "", "completed", 1, 1)
COMMON = [
    *(passing(f"fault=rate_limited variant={way}", 1) for way in ("seconds", "date", "ms", "reset", "none")),
    *(passing(f"fault={kind}", 2) for kind in ("bad_gateway", "gateway_timeout", "overloaded", "server_error")),
    *(passing(f"fault={kind}", 2) for kind in ("truncated", "not_json", "null_choices", "abort_finish")),
    passing("fault=disconnect variant=close", 2, free=True),
    passing("fault=disconnect variant=reset", 2, free=True),
    passing("fault=truncated", 2, free=True),
    passing("fault=error_in_200 variant=500", 2),
    passing("fault=error_in_200 variant=429", 1),
    *(Weather(f"fault={kind}", UNLIMITED, "completed", 1, 1) for kind in ("length", "content_filter", "trickle")),
    *(Weather(f"fault={status}", UNLIMITED, status, 1, 1) for status in (400, 413, 422)),
    Weather("fault=context_length", UNLIMITED, 400, 1, 1),
    Weather("fault=error_in_200 variant=400", UNLIMITED, 400, 1, 1),
    Weather("fault=error_in_200 variant=500", UNLIMITED, 500, 3, 3),
    Weather("fault=500", UNLIMITED, 500, 3, 3),
    *(Weather(f"fault={status}", UNLIMITED, status, 5, 5) for status in (502, 504, 529)),
    Weather("fault=not_json", UNLIMITED, "upstream_disconnected", 5, 5),
    Weather("fault=null_choices", UNLIMITED, "upstream_empty", 5, 5),
    Weather("fault=abort_finish", UNLIMITED, "upstream_aborted", 5, 5),
    Weather("fault=disconnect variant=close", UNLIMITED, "upstream_disconnected", 5, None),
    Weather("fault=disconnect variant=reset", UNLIMITED, "upstream_disconnected", 5, None),
    Weather("fault=truncated", UNLIMITED, "upstream_disconnected", 5, None),
    Weather("fault=hang", UNLIMITED, "request_timeout", 5, None),
    passing("fault=hang", 1, free=True),
]
# Each pauses the whole engine for a while, so there are few.
RARE = [
    passing("fault=loading", 1),
    passing("fault=insufficient_quota", 1),
    passing("fault=rate_limited retry_after_s=100000", 1),
    passing("fault=unauthorized", 1),
    passing("fault=forbidden", 1),
    passing("fault=model_not_found", 1),
]
CRASH = Weather("fault=crash", UNLIMITED, "upstream_crash_suspected", 3, None)
# Lost with an engine that dies, any line is asked again for nothing.
FAULTY_SHARE = 0.3


def forecast(bed: Bed, lines: int, rare: int, crashes: int) -> list[Weather]:
    """Draw what happens to each line."""
    weather = [bed.rng.choice(COMMON) if bed.rng.random() < FAULTY_SHARE else FAIR for _ in range(lines)]
    special = [RARE[number % len(RARE)] for number in range(rare)] + [CRASH] * crashes
    for number, kind in zip(bed.rng.sample(range(lines), len(special)), special, strict=True):
        weather[number] = kind
    return weather


def body_of(number: int, weather: Weather) -> dict[str, Any]:
    marker = f"[[scripted {weather.fault} times={weather.times}]]" if weather.fault else ""
    return {"model": "scripted", "messages": [{"role": "user", "content": f"{marker} number {number} "}]}


def line_of(number: int, weather: Weather) -> bytes:
    url = "/v1/chat/completions"
    return json.dumps(
        {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body_of(number, weather)},
        separators=(",", ":"),
    ).encode()


def ending_of(result: dict[str, Any]) -> str | int:
    if result["error"] is not None:
        assert result["response"] is None
        return str(result["error"]["code"])
    status = int(result["response"]["status_code"])
    return "completed" if status == 200 else status


def test_every_line_of_a_storm_ends_as_the_table_says(tmp_path: Path, bed: Bed) -> None:
    lines = bed.times(small=1000, ci=20_000, long=100_000)
    rare, crashes = bed.times(small=6, ci=30, long=60), bed.times(small=0, ci=2, long=5)
    weather = forecast(bed, lines, rare, crashes)
    books = tmp_path / "ledger.jsonl"
    engine_settings = {"latency_ms": 5, "ledger_path": books, "allow_crash": "true", "trickle_ms": 200}
    with restarted(tmp_path / "engine.log", **engine_settings) as (engine, deaths):
        bounds = {"line_timeout_s": 2, "refused_pause_s": 0.5, "model_grace_s": 2}
        arguments = configured(tmp_path, engine.base_url, models=["scripted"], window=WINDOW, **bounds)
        with Server(tmp_path / "data", *arguments) as server:
            content = b"\n".join(line_of(number, kind) for number, kind in enumerate(weather))
            batch_id = server.create_batch(server.upload(content))["id"]
            batch = server.await_batch(batch_id, timeout_s=bed.times(small=120, ci=600, long=3600))
            completed = server.content(batch["output_file_id"]).splitlines()
            failed = server.content(batch["error_file_id"]).splitlines()

    assert batch["status"] == "completed"
    results = {result["custom_id"]: result for result in map(json.loads, completed + failed)}
    assert len(results) == len(completed) + len(failed) == lines
    wrong = Counter(
        (kind.fault, kind.times, kind.ending, ending)
        for number, kind in enumerate(weather)
        if (ending := ending_of(results[f"line-{number}"])) != kind.ending
    )
    assert not wrong
    assert [json.loads(line)["custom_id"] for line in completed] == [
        f"line-{number}" for number, kind in enumerate(weather) if kind.ending == "completed"
    ]
    for number, kind in enumerate(weather):
        if kind.ending == "completed" and "content_filter" not in kind.fault:
            answer = results[f"line-{number}"]["response"]["body"]["choices"][0]["message"]["content"]
            assert f" number {number} " in answer + " "

    asked = Counter(json.loads(entry)["key"] for entry in books.read_text().splitlines())
    odd = Counter()
    for number, kind in enumerate(weather):
        body = json.dumps(body_of(number, kind), separators=(",", ":")).encode()
        asks = asked[hashlib.sha256(body).hexdigest()]
        asks_max = kind.asks_max if kind.asks_max is not None and not deaths else asks
        if not kind.asks_min <= asks <= asks_max:
            odd[kind.fault, kind.times, asks] += 1
    assert not odd
    print(f"{lines} lines, {sum(asked.values())} requests, {len(deaths)} deaths of the engine")
