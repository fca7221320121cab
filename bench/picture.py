"""A picture of rows: a dot each on a logarithmic axis, as SVG that reads on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from bench.rows import Row, number

WIDTH, LEFT, RIGHT = 860, 300, 150
ROW_HEIGHT, TOP = 34, 64
# These have enough contrast on white and on near-black.
TEXT, GRID, OURS, THEIRS = "#7d838c", "#8b929c", "#1f8a5b", "#8b929c"
FONT = "font-family='system-ui, sans-serif' font-size='14'"


def svg(title: str, rows: Sequence[Row]) -> str:
    """Return the rows as dots, our own in colour, with the axis from one power of ten to another."""
    low = math.floor(math.log10(min(row.value for row in rows)))
    high = max(math.ceil(math.log10(max(row.value for row in rows))), low + 1)
    height = TOP + ROW_HEIGHT * len(rows) + 36

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' role='img' {FONT}>",
        f"<title>{escape(title)}</title>",
        f"<text x='16' y='30' fill='{TEXT}' font-size='17' font-weight='600'>{escape(title)}</text>",
    ]
    parts += [_tick(x(10**power), height, f"{10**power:,}") for power in range(low, high + 1)]
    parts += [_dot(row, x(row.value), TOP + ROW_HEIGHT * (n + 0.5), x(10**low)) for n, row in enumerate(rows)]
    return "\n".join([*parts, "</svg>\n"])


def _tick(x: float, height: int, label: str) -> str:
    return (
        f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{TOP - 12}' y2='{height - 30}' stroke='{GRID}' stroke-opacity='0.35'/>"
        f"<text x='{x:.1f}' y='{height - 12}' fill='{TEXT}' text-anchor='middle' font-size='12'>{label}</text>"
    )


def _dot(row: Row, x: float, y: float, start: float) -> str:
    ours = row.name.startswith("Pronghorn")
    colour, weight = (OURS, 700) if ours else (THEIRS, 400)
    label = f"fill='{OURS if ours else TEXT}' font-weight='{weight}'"
    return (
        f"<text x='{LEFT - 14}' y='{y + 5:.1f}' {label} text-anchor='end'>{escape(row.name)}</text>"
        f"<line x1='{start:.1f}' x2='{x:.1f}' y1='{y:.1f}' y2='{y:.1f}' stroke='{colour}' stroke-width='3'/>"
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='7' fill='{colour}'/>"
        f"<text x='{x + 14:.1f}' y='{y + 5:.1f}' {label}>{number(row.value)} {escape(row.unit)}</text>"
    )
