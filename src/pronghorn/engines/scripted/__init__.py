"""The scripted engine: an OpenAI-compatible server with deterministic answers, set latency and set faults.

It is a real HTTP server for demos, benchmarks and tests, so that everything in front of it runs unchanged.

- `options`     every setting of the engine
- `requests`    what a line asks for
- `answers`     what a line is answered: a pure function of its body
- `faults`      which attempt of which line gets which fault: a pure function of seed, line and attempt
- `verdict`     the two put together: what goes out for one attempt, as data
- `capacity`    how many lines it serves at once, and how fast
- `ledger`      what it was asked and what it answered
- `replies`     an HTTP reply as data and as bytes
- `connection`  one client's connection, and the line in progress on it
- `server`      the listening socket and the routes
"""

from pronghorn.engines.scripted.faults import ALL_KINDS, TRANSIENT_KINDS, FaultKind
from pronghorn.engines.scripted.options import ScriptedOptions
from pronghorn.engines.scripted.server import ScriptedEngine, serve_scripted, start

__all__ = [
    "ALL_KINDS",
    "TRANSIENT_KINDS",
    "FaultKind",
    "ScriptedEngine",
    "ScriptedOptions",
    "serve_scripted",
    "start",
]
