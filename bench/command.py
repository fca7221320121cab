"""What the command lines of the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from bench.rows import Scale, Section, markdown


def arguments(about: str | None, scale: Scale = Scale.QUICK) -> argparse.ArgumentParser:
    """Return a parser of `--scale`, for which `scale` stands in."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--scale", type=Scale, choices=list(Scale), default=scale)
    return parser


def main(measure: Callable[[Scale], Section], about: str | None) -> None:
    """Be the command of a part that takes nothing but `--scale`."""
    print(markdown([measure(arguments(about).parse_args().scale)]))
