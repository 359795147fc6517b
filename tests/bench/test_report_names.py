"""Charts with long names of arms: every name is there whole, inside the drawing, on its own place.

Arms of one method often differ in their last option only, so a name that is cut is the name of
another arm.
"""

from __future__ import annotations

import itertools
import re
from html import unescape

import pytest

from bench.fake_results import ARMS, Fake, FakeArm
from specdec_bench.report import charts
from specdec_bench.report.page import page
from specdec_bench.report.svg import NARROW, WIDE, fitting, wrapped
from specdec_bench.summary.summarize import summarize
from specdec_bench.summary.types import Summary

LONG = [
    *(f"eagle3:depth=5,top_k=8,nodes=48,confidence_threshold=0.0{n}" for n in range(1, 4)),
    *(f"lookahead:window=15,ngram=5,guesses=15,harvest=false,seed={n}" for n in range(2)),
    "x" * 60,
]
FARTHER = [f"recycling:{'top_k=8,' * 18}depth={n}" for n in range(2)]


@pytest.fixture(scope="module")
def summary() -> Summary:
    arms = {name: arm for name, arm in ARMS.items() if name in ("hf", "loop0", "loop0_again")}
    arms |= {name: FakeArm(1.2 + n / 10, 1.5 + n / 5) for n, name in enumerate(LONG + FARTHER)}
    return summarize(Fake(arms=arms).results())


@pytest.mark.parametrize("most", [10, 32, 45, 59, 60])
@pytest.mark.parametrize("name", [*LONG, "hf", ""])
def test_lines_of_a_name(name: str, most: int) -> None:
    lines = wrapped(name, most)
    assert "".join(lines) == name
    assert max(map(len, lines)) <= most
    if "=" in name and most >= 32:
        assert all(line[-1] in ",:" for line in lines[:-1])


def test_a_name_without_end() -> None:
    lines = wrapped("y" * 5000, 30)
    assert len(lines) == 8
    assert lines[-1] == "y" * 29 + "…"


@pytest.mark.parametrize("drawing", ["wide", "narrow"])
def test_names_beside_bars(drawing: str, summary: Summary) -> None:
    svgs = re.findall(rf'<svg class="{drawing}".*?</svg>', page(summary), re.DOTALL)
    found = 0
    for svg in svgs:
        texts = re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', svg)
        if not texts:
            continue
        found += 1
        height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', svg)[1])  # type: ignore[index]
        written = "".join(unescape(words) for _, _, words in texts)
        assert all(name in written for name in LONG + FARTHER)
        room = fitting(WIDE if drawing == "wide" else NARROW)
        assert all(len(unescape(words)) <= room for _, _, words in texts)
        lines = [float(y) for _, y, _ in texts]
        assert all(below - above >= 14 for above, below in itertools.pairwise(lines))
        assert 10 <= lines[0] < lines[-1] <= height - 30
        bars = re.findall(r'<rect[^>]* y="([\d.]+)"[^>]* height="([\d.]+)"', svg)
        spans = {(float(y), float(y) + float(tall)) for y, tall in bars}
        if drawing == "narrow":  # names stand above their bars, and no bar behind them
            assert not [y for y in lines if any(top < y - 4 < end for top, end in spans)]
    assert found == 2, "speed-ups, and time by stage"


def test_rows_of_short_names_are_as_high_as_ever() -> None:
    for width, bars, height in ((WIDE, 32, 38), (WIDE, 24, 30), (NARROW, 32, 50), (NARROW, 24, 42)):
        assert charts._placed(["hf", "suffix"], width, bars)[1] == 2 * height
