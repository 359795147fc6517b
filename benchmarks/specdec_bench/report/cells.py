"""Cells and tables, and the cells that the page, the Markdown and the terminal share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from specdec_bench.report.format import NONE, TIMES, count, interval, signed_share
from specdec_bench.summary.intervals import Ratio
from specdec_bench.summary.types import ArmFigures, Gain, SettingFigures, Texts

RESIDUAL_LIMIT = 0.15
"""Measured over predicted speed-up, minus 1, beyond which something is not understood."""

Tone = Literal["", "good", "bad", "warn", "dim"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a cell.

    Attributes:
        text: Its words.
        tone: How it is meant.
        heat: -1 (much slower) to 1 (much faster), for a tint; None for no tint.
        more: Words after it, which matter less: an interval.
    """

    text: str
    tone: Tone = ""
    heat: float | None = None
    more: str = ""

    @property
    def words(self) -> str:
        """All of it in one line."""
        return f"{self.text} {self.more}".strip()


Row = Sequence[Cell | str]
"""Plain words stand for a cell without a tone."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head; the first column names the row, figures are aligned to the right.

    Attributes:
        title: Its heading.
        head: Names of the columns.
        rows: Cells by row.
        note: Sentences below it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def table(title: str, head: Sequence[str], rows: Iterable[Row], note: str = "") -> Table:
    """A table of such rows."""
    cells = [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in rows]
    return Table(title, head, cells, note)


def again_cells(figures: SettingFigures, again: Gain, clocks: int) -> list[Cell]:
    """The baseline over itself by each clock, marked where the machine is too noisy."""
    found = (("wall", again.wall), ("cpu", again.cpu))[:clocks]
    return [ratio_cell(r, "warn" if name in figures.noisy else "dim", 3) for name, r in found]


def dashes(many: int) -> list[Cell]:
    """Cells without a figure."""
    return [Cell(NONE, "dim")] * many


def speedup_cells(arm: ArmFigures, baseline: str, clocks: int) -> list[Cell]:
    """Speed-ups by each clock; good or bad only where the interval says so."""
    if arm.name == baseline:
        return [Cell("1", "dim")] * clocks
    if arm.gain is None:
        return [Cell("wrong text" if arm.wrong else "not shown", "bad"), *dashes(clocks - 1)]
    return [gain_cell(ratio, _tone(ratio)) for ratio in (arm.gain.wall, arm.gain.cpu)[:clocks]]


def gain_cell(ratio: Ratio | None, tone: Tone = "") -> Cell:
    """A speed-up above its interval."""
    return ratio_cell(ratio, tone, unit=TIMES)


def ratio_cell(ratio: Ratio | None, tone: Tone = "", decimals: int = 2, unit: str = "") -> Cell:
    """A ratio above its interval."""
    if ratio is None:
        return Cell(NONE, "dim")
    return Cell(f"{ratio.value:.{decimals}f}{unit}", tone, more=interval(ratio, decimals))


def _tone(ratio: Ratio | None) -> Tone:
    if ratio is None or not ratio.excludes(1.0):
        return ""
    return "good" if ratio.value > 1 else "bad"


def text_cell(texts: Texts) -> Cell:
    """The verdict over units, in a few words."""
    units, total = texts.units, sum(texts.units.values())
    if not total:
        return Cell("no text", "warn")
    if texts.wrong:
        return Cell("WRONG", "bad", more=f"in {units['wrong']} of {total}")
    if texts.unchecked:
        return Cell("unchecked", "bad", more=f"in {units['unchecked']} of {total}")
    own, near = units.get("not_promised", 0), units.get("near_tie", 0)
    if own:
        return Cell("not promised", "dim", more=f"{total - own} of {total} as plain's")
    if near:
        tokens = f"{count(texts.tokens.get('near_tie', 0))} of {count(sum(texts.tokens.values()))}"
        return Cell(f"{total - near} exact, {near} near-tie", more=f"{tokens} tokens")
    return Cell("exact", "good", more=f"{total} of {total}")


def residual_cell(residual: float, on_device: bool) -> Cell:
    """A residual, marked beyond the limit where stages are exact."""
    outside = abs(residual) > RESIDUAL_LIMIT and not on_device
    return Cell(signed_share(residual), "warn" if outside else "")
