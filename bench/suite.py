"""Every benchmark, one after the other, as a page and a picture: `make bench`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import dispatch, embedded, files, flow, latency, memory, prefix, stages, starting, workers
from bench.command import arguments
from bench.machine import description
from bench.picture import svg
from bench.rows import Scale, Section, markdown


def _flow(scale: Scale) -> Section:
    """One model stands for all those that `python -m bench.flow` takes twenty minutes for."""
    return flow.measure(scale, ("slots4",) if scale is Scale.SMOKE else ("kv",))


SUITE: Mapping[str, Callable[[Scale], Section]] = {
    "dispatch": dispatch.measure,
    "stages": stages.measure,
    "workers": workers.measure,
    "latency": latency.measure,
    "flow": _flow,
    "embedded": embedded.measure,
    "prefix": prefix.measure,
    "files": files.measure,
    "memory": memory.measure,
    "starting": starting.measure,
}
HEAD = """\
# Benchmarks

Written by `make bench` (scale `{scale}`). A figure is the median of its repetitions, beside it their range; a ratio is
the figure over what it stands beside, which was measured in the same run. [PERFORMANCE.md](PERFORMANCE.md) tells what
the figures mean.

{machine}

![Lines a second through one worker on one core]({picture})

"""
PICTURE = "benchmarks.svg"


def run(scale: Scale, names: list[str]) -> dict[str, Section]:
    """Measure the named parts and print each as soon as it is there."""
    sections = {}
    for name in names:
        begin = time.monotonic()
        sections[name] = SUITE[name](scale)
        print(markdown([sections[name]]), flush=True)
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return sections


def write(sections: dict[str, Section], scale: Scale, machine: str, folder: Path) -> None:
    """Write the page and its picture."""
    head = HEAD.format(scale=scale, machine=machine, picture=PICTURE)
    (folder / "BENCHMARKS.md").write_text(head + markdown(sections.values()))
    rates = [row for row in sections["dispatch"].rows if row.unit.endswith("/s")]
    picture = svg("Through one worker on one core; answers of 600 bytes", rates)
    (folder / PICTURE).write_text(picture)


def main() -> None:
    parser = arguments(__doc__, Scale.FULL)
    parser.add_argument("--only", nargs="+", choices=SUITE, default=list(SUITE), metavar="PART")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help=f"write BENCHMARKS.md and {PICTURE} there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended, as after ^C
    machine = description()
    print(machine, end="\n\n")
    sections = run(options.scale, options.only)
    if options.to is not None:
        write(sections, options.scale, machine, options.to)


if __name__ == "__main__":
    main()
