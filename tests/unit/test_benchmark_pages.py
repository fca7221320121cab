"""What the benchmarks write; `make bench SCALE=smoke` runs them."""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path

import pytest
from bench.picture import svg
from bench.rows import Row, Scale, Section, markdown
from bench.suite import write

OURS = Row("Pronghorn <one>", [12_000, 10_000, 11_000], "lines/s", "bare client", [44_000], "at least 10,000")


def test_a_row_shows_median_range_and_ratio() -> None:
    line = markdown([Section("Dispatch", "How.", [OURS])]).splitlines()[-1]
    assert line == "| Pronghorn <one> | 11,000 lines/s | 10,000 to 12,000 | bare client | 0.25 | at least 10,000 |"


def test_there_is_no_ratio_to_nothing() -> None:
    assert Row("hits", [60], "%", "before", [0]).ratio is None


@pytest.mark.parametrize("beside", [Row("wrk", [40_000], "requests/s"), Row("peer", [90], "lines/s")])
def test_a_picture_shows_every_row_in_proportion(beside: Row) -> None:
    picture = xml.etree.ElementTree.fromstring(svg("Rates", [OURS, beside]))
    text = list(picture.itertext())
    assert {"Pronghorn <one>", "11,000 lines/s", beside.name} <= set(text)
    ours, theirs = (float(dot.get("cx", "")) for dot in picture.iter("{http://www.w3.org/2000/svg}circle"))
    assert (ours > theirs) == (OURS.value > beside.value)


def test_a_page_names_its_scale_and_its_picture(tmp_path: Path) -> None:
    write({"dispatch": Section("Dispatch", "How.", [OURS])}, Scale.QUICK, "Some machine.", tmp_path)
    page = (tmp_path / "BENCHMARKS.md").read_text()
    assert "scale `quick`" in page
    assert "Some machine." in page
    assert "(benchmarks.svg)" in page
    assert (tmp_path / "benchmarks.svg").exists()
