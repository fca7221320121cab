"""The embedded engine for processors that it suits: OpenVINO GenAI's continuous batching behind OpenAI's HTTP.

- `engine`      which processes to run, kept running from the server's side
- `child`       the process: loads the model, then serves
- `face`        its HTTP
- `requests`    what a request's body asks for, or the 400 that says what is wrong with it
- `generation`  prompts and settings into finished answers
- `pipeline`    the one thread that runs the model, a step for all running lines at a time
- `grammars`    JSON schemas tried out where a bad one does no harm
- `text`        tokens into text: stop strings, characters in several tokens, log-probabilities
- `answers`     what goes out: the three endpoints' bodies and events
"""

import sys

# OpenVINO's Python package reports its use to its makers as soon as it is imported. Where this module is missing it
# does without, and for an import a None is a missing module.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
