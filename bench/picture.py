"""A picture of rows as SVG that reads on light and on dark pages: a line from the axis to a dot for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from bench.rows import Row, number

WIDTH, LEFT, RIGHT = 860, 300, 160
ROW_HEIGHT, TOP = 34, 64
# Rows further apart than this are shown on a logarithmic axis.
LINEAR_SPREAD_MAX = 30
# These have enough contrast on white and on near-black.
OURS, THEIRS, TEXT = "#1f8a5b", "#8b929c", "#7d838c"
FONT = "font-family='system-ui, sans-serif' font-size='14'"


class Axis(NamedTuple):
    """Where a value lies, from 0 to 1, and which values are marked."""

    place: Callable[[float], float]
    ticks: list[float]


def svg(title: str, rows: Sequence[Row]) -> str:
    """Return a picture of the rows, ours in colour."""
    values = [row.value for row in rows]
    logarithmic = max(values) > LINEAR_SPREAD_MAX * min(values)
    axis = _logarithmic(min(values), max(values)) if logarithmic else _linear(max(values))
    title += " (logarithmic axis)" if logarithmic else ""
    height = TOP + ROW_HEIGHT * len(rows) + 36
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' role='img' {FONT}>",
        f"<title>{escape(title)}</title>",
        f"<text x='16' y='30' fill='{TEXT}' font-size='17' font-weight='600'>{escape(title)}</text>",
    ]
    parts += [_tick(_x(axis.place(value)), height, f"{value:,.0f}") for value in axis.ticks]
    parts += [_dot(row, _x(axis.place(row.value)), TOP + ROW_HEIGHT * (n + 0.5)) for n, row in enumerate(rows)]
    return "\n".join([*parts, "</svg>\n"])


def _logarithmic(least: float, most: float) -> Axis:
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    return Axis(lambda value: (math.log10(value) - low) / (high - low), [10.0**power for power in range(low, high + 1)])


def _linear(most: float) -> Axis:
    unit = 10.0 ** math.floor(math.log10(most))
    step = next(unit * part for part in (0.2, 0.5, 1, 2) if most <= 5 * unit * part)
    ticks = [step * n for n in range(math.ceil(most / step) + 1)]
    return Axis(lambda value: value / ticks[-1], ticks)


def _x(place: float) -> float:
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _tick(x: float, height: int, label: str) -> str:
    return (
        f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{TOP - 12}' y2='{height - 30}' stroke='{THEIRS}' stroke-opacity='0.35'/>"
        f"<text x='{x:.1f}' y='{height - 12}' fill='{TEXT}' text-anchor='middle' font-size='12'>{label}</text>"
    )


def _dot(row: Row, x: float, y: float) -> str:
    ours = row.name.startswith("Pronghorn")
    colour = OURS if ours else THEIRS
    label = f"fill='{OURS if ours else TEXT}' font-weight='{700 if ours else 400}'"
    return (
        f"<text x='{LEFT - 14}' y='{y + 5:.1f}' {label} text-anchor='end'>{escape(row.name)}</text>"
        f"<line x1='{LEFT}' x2='{x:.1f}' y1='{y:.1f}' y2='{y:.1f}' stroke='{colour}' stroke-width='3'/>"
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='7' fill='{colour}'/>"
        f"<text x='{x + 14:.1f}' y='{y + 5:.1f}' {label}>{number(row.value)} {escape(row.unit)}</text>"
    )
