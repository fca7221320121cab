"""OpenVINO's package reports its use to its makers; ours keeps it from doing so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import pronghorn.engines.openvino
import openvino, openvino_genai
print([name for name, module in sys.modules.items() if "openvino_telemetry" in name and module])
"""


def test_no_telemetry_is_loaded_and_nothing_is_left_in_the_home(tmp_path: Path) -> None:
    # In what looks like CI it is silent by itself.
    variables = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, env=variables | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
    assert not list(tmp_path.iterdir())
