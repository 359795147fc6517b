"""The charts of the report, each as a function from figures to a drawing at a given width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specdec_bench.report.format import NONE, plain_times, seconds, share, signed_share, times
from specdec_bench.report.svg import NARROW, Canvas, Scale, fitting, spread, ticks, wrapped
from specdec_bench.results.records import CurveRecord
from specdec_bench.summary.intervals import Ratio
from specdec_bench.summary.types import STAGES, ArmFigures, Gain, SettingFigures

RESIDUAL_LIMIT = 0.15
"""Measured over predicted speed-up, minus 1, beyond which something is not understood."""

_REASONS = {
    "another distribution": "WRONG DISTRIBUTION, no speed-up",
    " is wrong": "not shown: see the wrong text",
    "not checked": "not checked",
}
_LABELS = 250  # width of the column of names on wide screens
_VALUES = 58  # width of the column of figures
_LINE = 15.0  # from one line of a name to the next


def _rows(figures: SettingFigures, baseline: str) -> list[tuple[str, Gain | None, str]]:
    """Name, gain and reason of each bar; the machine's own noise first."""
    first: list[tuple[str, Gain | None, str]] = []
    if figures.again is not None:
        first.append((f"A/A: {baseline} over itself", figures.again, ""))
    return first + [(a.name, a.gain, _reason(a)) for a in figures.arms if a.name != baseline]


@dataclass(frozen=True, slots=True)
class _Row:
    """Where a row of bars begins, and the lines of its name with their places."""

    top: float
    name: list[tuple[tuple[float, float], str]]

    def label(self, canvas: Canvas, width: float) -> None:
        """Writes the name."""
        for place, words in self.name:
            canvas.text(place, words, "name", "start" if width <= NARROW else "end")


def _placed(names: Sequence[str], width: float, bars: float) -> tuple[list[_Row], float]:
    """Rows with their whole names, beside the bars or, on phones, above them; their height.

    Args:
        names: Of the rows.
        width: Of the drawing.
        bars: Height of the bars of a row, with the room between rows.
    """
    narrow, rows, y = width <= NARROW, list[_Row](), 4.0
    for name in names:
        lines = wrapped(name, fitting(width if narrow else _LABELS - 12))
        words = _LINE * len(lines)
        if narrow:
            top, first, height = y + words + 3, y + 12, words + 3 + bars
        else:
            height = max(bars + 6, words + 8)
            top = y + (height - bars - 6) / 2
            first = top + bars / 2 + 3 - (words - _LINE) / 2
        x = 0.0 if narrow else _LABELS - 10.0
        rows.append(_Row(top, [((x, first + _LINE * n), line) for n, line in enumerate(lines)]))
        y += height
    return rows, y - 4


def speedups(figures: SettingFigures, baseline: str, width: float) -> Canvas:
    """Bars from 1.0 to the speed-up, with the interval; by wall time, and by CPU time below it."""
    rows = _rows(figures, baseline)
    narrow = width <= NARROW
    left, right = (4.0, width - _VALUES) if narrow else (float(_LABELS), width - _VALUES)
    placed, height = _placed([name for name, _, _ in rows], width, 32)
    height += 40
    ratios = [r for _, gain, _ in rows if gain for r in (gain.wall, gain.cpu) if r]
    scale = Scale(*_around_one(ratios), left, right)
    said = "; ".join(f"{name}: {times(gain.wall) if gain else why}" for name, gain, why in rows)
    canvas = Canvas(width, height, f"Speed-up over {baseline}, {figures.setting}", said)
    bottom = height - 34.0
    for tick in ticks(scale.low, scale.high, 5 if narrow else 8):
        canvas.line((scale(tick), 2), (scale(tick), bottom), "grid")
        canvas.text((scale(tick), bottom + 15), f"{tick:g}", "tick", "middle")
    canvas.line((scale(1.0), 2), (scale(1.0), bottom), "one")
    canvas.text((scale(1.0), bottom + 30), f"1 = as fast as {baseline}", "axis", "middle")
    for row, (name, gain, why) in zip(placed, rows, strict=True):
        row.label(canvas, width)
        if gain is None:
            canvas.text((scale(1.0) + 8, row.top + 18), why, "bad")
            continue
        again = name.startswith("A/A")
        _speedup_bar(canvas, scale, row.top, gain, again)
        value = f"{gain.wall.value:.3f}" if again else plain_times(gain.wall.value)
        canvas.text((width, row.top + 18), value, "value", "end")
    return canvas


def _reason(arm: ArmFigures) -> str:
    """What stands in the bar's place when there is none."""
    if arm.wrong:
        return "WRONG TEXT, no speed-up"
    for part, words in _REASONS.items():
        if part in arm.no_gain:
            return words
    return "no timing"


def _speedup_bar(canvas: Canvas, scale: Scale, top: float, gain: Gain, again: bool) -> None:
    bars = [(gain.wall, "wall", 4.0, 14.0)]
    if gain.cpu is not None:
        bars.append((gain.cpu, "cpu", 20.0, 7.0))
    for ratio, clock, offset, thick in bars:
        middle = top + offset + thick / 2
        start, end = sorted((scale(1.0), scale(ratio.value)))
        style = "again" if again else f"{clock} {'slower' if ratio.value < 1 else 'faster'}"
        canvas.bar((start, top + offset), (end - start, thick), style, f"{clock}: {times(ratio)}")
        if ratio.over != "nothing":
            canvas.line((scale(ratio.low), middle), (scale(ratio.high), middle), "whisker")
            for end in (ratio.low, ratio.high):
                canvas.line((scale(end), middle - 4), (scale(end), middle + 4), "whisker")


def _around_one(ratios: Sequence[Ratio]) -> tuple[float, float]:
    """Ends of an axis that shows 1 and every interval, but not all of a hopeless one."""
    largest = max((r.value for r in ratios), default=1.0)
    ends = [end for r in ratios if r.over != "nothing" for end in (r.low, min(r.high, 2 * largest))]
    low, high = min([0.9, *ends, *(r.value for r in ratios)]), max([1.1, *ends, largest])
    room = 0.04 * (high - low)
    return max(low - room, 0.0), high + room


def histogram(arm: ArmFigures, shares: Sequence[tuple[int, float]], width: float) -> Canvas:
    """How many tokens a row emitted in a round.

    Args:
        arm: Whose rounds.
        shares: Tokens and the share of rounds with so many, in order.
        width: Of the drawing.
    """
    height, left, bottom = 150.0, 8.0, 122.0
    tau = f"{arm.tau.value:.2f}" if arm.tau else NONE
    said = ", ".join(f"{tokens}: {share(part, 1)}" for tokens, part in shares)
    canvas = Canvas(width, height, f"{arm.name}: tokens per round", f"mean {tau}; {said}")
    top = max((part for _, part in shares), default=1.0)
    scale = Scale(0, top, bottom, 18)
    slot = (width - left) / max(len(shares), 1)
    for index, (tokens, part) in enumerate(shares):
        x = left + index * slot
        thick = min(slot * 0.8, 44)
        place = x + (slot - thick) / 2
        hint = f"{tokens} tokens: {share(part, 1)} of rounds"
        canvas.bar((place, scale(part)), (thick, bottom - scale(part)), "c0", hint)
        if slot >= 18:
            words = f"{100 * part:.0f}" if part >= 0.005 or not part else "<1"
            canvas.text((x + slot / 2, scale(part) - 4), words, "tick", "middle")
        if slot >= 14 or index % 4 == 0:
            canvas.text((x + slot / 2, bottom + 14), str(tokens), "tick", "middle")
    canvas.line((left, bottom), (width, bottom), "base")
    canvas.text((width / 2, height - 1), "tokens in a round (bars: % of rounds)", "axis", "middle")
    return canvas


def by_position(
    arm: ArmFigures, marginal: Sequence[float], conditional: Sequence[float], width: float
) -> Canvas:
    """Chance that the i-th draft is accepted: at all, and given that those before it were."""
    height, left, right, bottom = 150.0, 34.0, width - 8, 122.0
    said = "; ".join(
        f"position {i}: {share(m, 1)} at all, {share(c, 1)} after the one before it"
        for i, (m, c) in enumerate(zip(marginal, conditional, strict=True), 1)
    )
    canvas = Canvas(width, height, f"{arm.name}: acceptance by position", said)
    up = Scale(0, 1, bottom, 10)
    across = Scale(0.5, len(marginal) + 0.5, left, right)
    for level in (0, 0.25, 0.5, 0.75, 1):
        canvas.line((left, up(level)), (right, up(level)), "grid")
        canvas.text((left - 5, up(level) + 4), f"{100 * level:.0f}", "tick", "end")
    every = max(1, len(marginal) // 10)
    for index in range(1, len(marginal) + 1, every):
        canvas.text((across(index), bottom + 14), str(index), "tick", "middle")
    for values, style, name in ((conditional, "c2", "conditional"), (marginal, "c0", "marginal")):
        points = [(across(i), up(v)) for i, v in enumerate(values, 1)]
        if len(points) > 1:
            canvas.path(points, f"curve {style}{' dashed' if name == 'conditional' else ''}")
        for (x, y), value in zip(points, values, strict=True):
            canvas.dot((x, y), 3, style, f"{name}: {share(value, 1)}")
    canvas.text(((left + right) / 2, height - 1), "position of the draft", "axis", "middle")
    return canvas


def cost_split(arms: Sequence[ArmFigures], width: float) -> Canvas:
    """Where the time of an emitted token goes, stage by stage."""
    shown = [(arm.name, arm.costs.per_token) for arm in arms if arm.costs is not None]
    narrow = width <= NARROW
    left, right = (4.0, width - _VALUES - 8) if narrow else (float(_LABELS), width - _VALUES - 8)
    placed, height = _placed([name for name, _ in shown], width, 24)
    height += 38
    bottom = height - 34.0
    most = max(sum(split.values()) for _, split in shown)
    scale = Scale(0, most, left, right)
    said = "; ".join(f"{name}: {seconds(sum(split.values()))}" for name, split in shown)
    canvas = Canvas(width, height, "Time per token by stage", said)
    for tick in ticks(0, most * 1e3, 4 if narrow else 7):
        canvas.line((scale(tick / 1e3), 2), (scale(tick / 1e3), bottom), "grid")
        canvas.text((scale(tick / 1e3), bottom + 15), f"{tick:g}", "tick", "middle")
    canvas.text(((left + right) / 2, bottom + 30), "ms per emitted token", "axis", "middle")
    for row, (name, split) in zip(placed, shown, strict=True):
        row.label(canvas, width)
        x = left
        for number, stage in enumerate(STAGES):
            part = scale(split[stage]) - left
            hint = f"{name}, {stage}: {seconds(split[stage])} per token"
            if part > 0:
                canvas.bar((x, row.top), (part, 20), f"c{number}", hint)
            x += part
        total = seconds(sum(split.values()))
        canvas.text((width, row.top + 15), total, "value", "end")
    return canvas


def predicted_measured(arms: Sequence[ArmFigures], width: float, judged: bool = True) -> Canvas:
    """Speed-up that theory gives against the measured one; the band is the allowed residual.

    Args:
        arms: Those with both figures; dots carry their numbers, from 1.
        width: Of the drawing.
        judged: Mark those outside of the band.
    """
    size = min(width, 390.0)
    left, bottom, right, top = 44.0, size - 42, size - 10, 10.0
    points = [
        (arm.name, arm.costs.predicted, arm.gain.steadier().value, arm.costs.residual)
        for arm in arms
        if arm.costs and arm.gain and arm.costs.predicted and arm.costs.residual is not None
    ]
    every = [value for _, x, y, _ in points for value in (x, y)]
    low, high = min([0.9, *every]) * 0.95, max([1.1, *every]) * 1.05
    across, up = Scale(low, high, left, right), Scale(low, high, bottom, top)
    said = "; ".join(
        f"{name}: predicted {x:.2f}, measured {y:.2f}, residual {signed_share(r)}"
        for name, x, y, r in points
    )
    canvas = Canvas(size, size, "Predicted and measured speed-up", said)
    along = [low + (high - low) * step / 24 for step in range(25)]
    above = [(across(v), up(v * (1 + RESIDUAL_LIMIT))) for v in along]
    below = [(across(v), up(v * (1 - RESIDUAL_LIMIT))) for v in reversed(along)]
    canvas.path(above + below, "band", closed=True)
    for tick in ticks(low, high, 5):
        canvas.line((across(tick), top), (across(tick), bottom), "grid")
        canvas.line((left, up(tick)), (right, up(tick)), "grid")
        canvas.text((across(tick), bottom + 15), f"{tick:g}", "tick", "middle")
        canvas.text((left - 6, up(tick) + 4), f"{tick:g}", "tick", "end")
    canvas.path([(across(low), up(low)), (across(high), up(high))], "one")
    canvas.text(((left + right) / 2, size - 8), "predicted speed-up", "axis", "middle")
    canvas.text((left + 6, top + 12), "measured", "axis")
    for number, (name, x, y, residual) in enumerate(points, 1):
        outside = judged and residual is not None and abs(residual) > RESIDUAL_LIMIT
        hint = f"{name}: predicted {x:.2f}, measured {y:.2f}, {signed_share(residual)}"
        canvas.dot((across(x), up(y)), 9, "t2" if outside else "t0", hint)
        canvas.text((across(x), up(y) + 4), str(number), "inside", "middle")
    return canvas


def curves(records: Sequence[CurveRecord], width: float) -> Canvas:
    """t(q) over t(1): what verifying q tokens costs, relative to one."""
    lines = [
        (str(c), sorted((int(q), s) for q, s in c.seconds.items()))
        for c in records
        if len(c.seconds) > 1 and float(c.seconds.get("1", 0)) > 0
    ]
    narrow = width <= NARROW
    height, left, top = 260.0, 38.0, 10.0
    right, bottom = width - (8 if narrow else 150), height - 40
    sizes = sorted({q for _, points in lines for q, _ in points})
    highest = max(s / points[0][1] for _, points in lines for _, s in points)
    across = Scale(0, math.log2(max(sizes[-1], 2)), left, right)
    up = Scale(0, max(highest * 1.05, 1.2), bottom, top)
    said = "; ".join(
        f"{name}: {seconds(p[0][1])} for one token, {p[-1][1] / p[0][1]:.2f} times that for "
        f"{p[-1][0]}"
        for name, p in lines
    )
    canvas = Canvas(width, height, "Cost of a forward over q tokens, t(q) / t(1)", said)
    for tick in ticks(0, up.high, 5):
        canvas.line((left, up(tick)), (right, up(tick)), "grid")
        canvas.text((left - 6, up(tick) + 4), f"{tick:g}", "tick", "end")
    for q in [2**n for n in range(int(math.log2(sizes[-1])) + 1)]:
        canvas.text((across(math.log2(q)), bottom + 15), str(q), "tick", "middle")
    canvas.path([(left, up(1)), (right, up(1))], "one")
    middle = (left + right) / 2
    canvas.text((middle, height - 8), "tokens a row in the forward, q", "axis", "middle")
    for number, (_, points) in enumerate(lines):
        path = [(across(math.log2(q)), up(s / points[0][1])) for q, s in points]
        canvas.path(path, f"curve c{number % 6}")
        for (x, y), (q, s) in zip(path, points, strict=True):
            canvas.dot((x, y), 3, f"c{number % 6}", f"q = {q}: {seconds(s)}")
    if not narrow:
        ends = [up(points[-1][1] / points[0][1]) for _, points in lines]
        for number, ((name, _), y) in enumerate(zip(lines, spread(ends, 15), strict=True)):
            canvas.text((right + 8, y + 4), name, f"label t{number % 6}")
    return canvas
