"""What a benchmark measured, and how it is printed.

A part of the suite is a module with a function `measure(scale) -> Section`. A row holds every repetition: its value is
their median, its noise their range. What it stands beside was measured in the same run.
"""

from __future__ import annotations

import enum
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Scale(enum.StrEnum):
    """How much a benchmark does: `smoke` shows that it works, `quick` is for while something is being changed."""

    SMOKE = "smoke"
    QUICK = "quick"
    FULL = "full"

    def times(self, *, smoke: int, quick: int, full: int) -> int:
        """Return how many of something this scale takes."""
        return {Scale.SMOKE: smoke, Scale.QUICK: quick, Scale.FULL: full}[self]


class Row(NamedTuple):
    """One thing measured, once a repetition, and what it stands beside.

    `wanted` is what the value or the ratio should be, in words, with what it is if it is missed: "at least 10,000".
    """

    name: str
    values: Sequence[float]
    unit: str
    beside: str = ""
    beside_values: Sequence[float] = ()
    wanted: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """The value as a multiple of what it stands beside, if there is something and it is not nothing."""
        beside = statistics.median(self.beside_values) if self.beside_values else 0.0
        return self.value / beside if beside else None


class Section(NamedTuple):
    """Rows of one subject; `how` says in a sentence or two what was done, and what the figures do not show."""

    title: str
    how: str
    rows: list[Row]


def markdown(sections: Iterable[Section]) -> str:
    """Return the sections as markdown, a table each."""
    return "\n".join(_section(section) for section in sections)


def _section(section: Section) -> str:
    head = "| | measured | range | beside | ratio | wanted |\n|---|---:|---:|---|---:|---|\n"
    return f"## {section.title}\n\n{section.how}\n\n{head}" + "".join(_line(row) for row in section.rows)


def _line(row: Row) -> str:
    spread = f"{number(min(row.values))} to {number(max(row.values))}" if len(row.values) > 1 else ""
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    return f"| {row.name} | {number(row.value)} {row.unit} | {spread} | {row.beside} | {ratio} | {row.wanted} |\n"


def number(value: float) -> str:
    """Return a number with three digits that count, or whole where it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
