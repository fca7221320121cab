"""The benchmarks run: what they measure at this scale says nothing."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from tests.beds import require_program

ROOT = Path(__file__).parents[2]
# All but the embedded engine, which is slow to load and has tests of its own.
PARTS = ("dispatch", "stages", "workers", "latency", "memory", "starting")


@pytest.mark.timeout(400)
def test_the_suite_writes_its_page_and_its_picture(tmp_path: Path) -> None:
    require_program("nginx")
    require_program("wrk")
    command = [sys.executable, "-m", "bench.suite", "--scale", "smoke", "--to", str(tmp_path), "--only", *PARTS]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    page = (tmp_path / "BENCHMARKS.md").read_text()
    assert page.count("\n## ") == len(PARTS)
    assert "| Pronghorn, one worker | " in page
    picture = xml.etree.ElementTree.fromstring((tmp_path / "benchmarks.svg").read_text())
    assert "Pronghorn, one worker" in "".join(picture.itertext())
