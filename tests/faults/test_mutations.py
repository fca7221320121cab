"""What the beds are worth: with a mechanism switched off in a copy of the package, the bed that covers it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.beds import Bed, Scale

import pronghorn

PACKAGE = Path(pronghorn.__file__).parent
TESTS_FAILED = 1


class Mutation(NamedTuple):
    """What is switched off, where, and the bed that has to notice; `in_passing`: quickly enough for `make test`."""

    file: str
    code: str
    instead: str
    bed: str
    in_passing: bool = False


MUTATIONS = {
    "the fence": Mutation(
        "storage/metadata.py",
        "        shards.c.epoch == epoch,\n",
        "",
        "tests/contract/test_metadata.py -k stale_epoch",
        in_passing=True,
    ),
    "the checksum of outcomes": Mutation(
        "storage/segments.py",
        "            if zlib.crc32(payload) != checksum:\n",
        "            if zlib.crc32(payload) < 0:\n",
        "tests/unit/test_segments.py -k flipped_bit",
        in_passing=True,
    ),
    "the checksum of stored files": Mutation(
        "storage/checksums.py",
        "* BLOCK_BYTES]) != checksum:",
        "* BLOCK_BYTES]) < 0:",
        "tests/faults/test_disk.py -k not_served",
    ),
    "the sync of files": Mutation(
        "storage/durable.py",
        "        os.fsync(descriptor)\n",
        "        os.fstat(descriptor)\n",
        "tests/faults/test_power.py -k server_shows",
    ),
    "the sync of the log at the start": Mutation(
        "storage/database.py",
        "        self._sync_log()\n",
        "",
        "tests/faults/test_power.py -k server_shows",
    ),
    "the sync of outcomes that are found": Mutation(
        "storage/segments.py",
        "        _sync(file.fileno(), path)\n",
        "",
        "tests/faults/test_power.py -k worker_finds",
    ),
    "the clock that nobody sets": Mutation(
        "clock.py",
        "return int(self._begin + self._steady())",
        "return int(self._wall())",
        "tests/faults/test_clock.py",
    ),
    "a row of the table of faults": Mutation(
        "domain/retry.py",
        "case 408 | 409 | 425 | 502 | 504 | 529:",
        "case 408 | 409 | 425 | 504 | 529:",
        "tests/faults/test_storm.py",
    ),
}


def run_bed(bed: str, package_in: Path) -> subprocess.CompletedProcess[str]:
    """Run a bed in small, with the package that lies in a folder."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *bed.split(" ")]
    environment = os.environ | {"PYTHONPATH": str(package_in), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bed_fails_without_what_it_covers(tmp_path: Path, bed: Bed, name: str) -> None:
    mutation = MUTATIONS[name]
    if bed.scale is Scale.SMALL and not mutation.in_passing:
        pytest.skip("this bed takes a while: make faults")
    shutil.copytree(PACKAGE, tmp_path / "pronghorn", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "pronghorn" / mutation.file
    code = file.read_text()
    assert code.count(mutation.code) == 1, f"the mutation no longer fits {mutation.file}"
    file.write_text(code.replace(mutation.code, mutation.instead))
    ended = run_bed(mutation.bed, tmp_path)
    assert ended.returncode == TESTS_FAILED, (
        f"the bed does not miss {name}: {ended.stdout[-3000:]}{ended.stderr[-500:]}"
    )
    assert "\nFAILED tests/" in ended.stdout, ended.stdout[-3000:]
