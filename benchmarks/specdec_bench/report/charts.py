"""The charts of the report, each as a function from a width and figures to a drawing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from specdec_bench.report.cells import RESIDUAL_LIMIT
from specdec_bench.report.format import plain_times, seconds, share, signed_share, times
from specdec_bench.report.svg import NARROW, Canvas, Scale, fitting, spread, ticks, wrapped
from specdec_bench.report.tables import judged, split_arms
from specdec_bench.results.records import CurveRecord
from specdec_bench.summary.acceptance import Acceptance
from specdec_bench.summary.intervals import Ratio
from specdec_bench.summary.types import STAGES, ArmFigures, Gain, SettingFigures

_REASONS = {
    "another distribution": "WRONG DISTRIBUTION, no speed-up",
    " is wrong": "not shown: see the wrong text",
    "not checked": "not checked",
}
_LABELS = 250.0  # width of the column of names on wide screens
_VALUES = 58  # width of the column of figures
_LINE = 15.0  # from one line of a name to the next
_AXIS = 34.0  # height of an axis with its title

Label = list[tuple[tuple[float, float], str]]
"""The lines of a name with their places."""


def _placed(
    names: Sequence[str], width: float, bars: float
) -> tuple[list[tuple[float, Label]], float]:
    """Top and whole name of each row, beside the bars or, on phones, above them; their height.

    `bars` is the height of the bars of a row, with the room between rows.
    """
    narrow, rows, y = width <= NARROW, list[tuple[float, Label]](), 4.0
    for name in names:
        lines = wrapped(name, fitting(width if narrow else _LABELS - 12))
        words = _LINE * len(lines)
        if narrow:
            top, first, height = y + words + 3, y + 12, words + 3 + bars
        else:
            height = max(bars + 6, words + 8)
            top = y + (height - bars - 6) / 2
            first = top + bars / 2 + 3 - (words - _LINE) / 2
        x = 0.0 if narrow else _LABELS - 10
        rows.append((top, [((x, first + _LINE * n), line) for n, line in enumerate(lines)]))
        y += height
    return rows, y - 4


def _labelled(canvas: Canvas, width: float, rows: Sequence[tuple[float, Label]]) -> Iterator[float]:
    """Writes the name of each row, and gives its top."""
    for top, label in rows:
        for place, words in label:
            canvas.text(place, words, "name", "start" if width <= NARROW else "end")
        yield top


def speedups(width: float, figures: SettingFigures, baseline: str) -> Canvas:
    """Bars from 1.0 to the speed-up, with the interval; by wall time, and by CPU time below it."""
    rows = [(a.name, a.gain, _reason(a)) for a in figures.arms if a.name != baseline]
    if figures.again is not None:
        rows.insert(0, (f"A/A: {baseline} over itself", figures.again, ""))
    narrow = width <= NARROW
    placed, height = _placed([name for name, _, _ in rows], width, 32)
    bottom = height + 6
    ratios = [r for _, gain, _ in rows if gain for r in (gain.wall, gain.cpu) if r]
    scale = Scale(*_around_one(ratios), 4 if narrow else _LABELS, width - _VALUES)
    canvas = Canvas(width, bottom + _AXIS, f"Speed-up over {baseline}, {figures.setting}")
    canvas.across(scale, 5 if narrow else 8, (2, bottom))
    canvas.line((scale(1.0), 2), (scale(1.0), bottom), "one")
    canvas.text((scale(1.0), bottom + 30), f"1 = as fast as {baseline}", "axis")
    tops = _labelled(canvas, width, placed)
    for top, (name, gain, why) in zip(tops, rows, strict=True):
        if gain is None:
            canvas.text((scale(1.0) + 8, top + 18), why, "bad", "start", f"{name}: {why}")
            continue
        again = gain is figures.again
        _speedup_bar(canvas, scale, top, gain, name, again)
        value = f"{gain.wall.value:.3f}" if again else plain_times(gain.wall.value)
        canvas.text((width, top + 18), value, "value", "end")
    return canvas


def _reason(arm: ArmFigures) -> str:
    """What stands in the bar's place when there is none."""
    if arm.wrong:
        return "WRONG TEXT, no speed-up"
    found = (words for part, words in _REASONS.items() if part in arm.no_gain)
    return next(found, "no timing")


def _speedup_bar(
    canvas: Canvas, scale: Scale, top: float, gain: Gain, name: str, again: bool
) -> None:
    bars = ((gain.wall, "wall", 4.0, 14.0), (gain.cpu, "cpu", 20.0, 7.0))
    for ratio, clock, offset, thick in bars:
        if ratio is None:
            continue
        middle = top + offset + thick / 2
        start, end = sorted((scale(1.0), scale(ratio.value)))
        style = "again" if again else f"{clock} {'slower' if ratio.value < 1 else 'faster'}"
        hint = f"{name}, {clock}: {times(ratio)}"
        canvas.bar((start, top + offset), (end - start, thick), style, hint)
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


def histogram(width: float, arm: str, found: Acceptance) -> Canvas:
    """How many tokens a row emitted in a round."""
    shares, left, bottom = found.shares, 8.0, 122.0
    canvas = Canvas(width, bottom + 28, f"{arm}: {found.tau_per_step:.2f} tokens per round")
    scale = Scale(0, max(shares), bottom, 18)
    slot = (width - left) / len(shares)
    thick = min(slot * 0.8, 44)
    for index, part in enumerate(shares):
        middle = left + (index + 0.5) * slot
        hint = f"{index + 1} tokens: {share(part, 1)} of rounds"
        corner = (middle - thick / 2, scale(part))
        canvas.bar(corner, (thick, bottom - scale(part)), "c0", hint)
        if slot >= 18:
            words = f"{100 * part:.0f}" if part >= 0.005 or not part else "<1"
            canvas.text((middle, scale(part) - 4), words, "tick")
        if slot >= 14 or index % 4 == 0:
            canvas.text((middle, bottom + 14), str(index + 1), "tick")
    canvas.line((left, bottom), (width, bottom), "base")
    canvas.text((width / 2, bottom + 27), "tokens in a round (bars: % of rounds)", "axis")
    return canvas


def by_position(width: float, arm: str, found: Acceptance) -> Canvas:
    """Chance that the i-th draft is accepted: at all, and given that those before it were."""
    left, right, bottom, many = 34.0, width - 8, 122.0, found.positions
    canvas = Canvas(width, bottom + 28, f"{arm}: acceptance by position")
    up, across = Scale(0, 100, bottom, 10), Scale(0.5, many + 0.5, left, right)
    canvas.up(up, (0, 25, 50, 75, 100), (left, right))
    for index in range(1, many + 1, max(1, many // 10)):
        canvas.text((across(index), bottom + 14), str(index), "tick")
    for values, style, name in (
        (found.conditional, "c2 dashed", "conditional"),
        (found.marginal, "c0", "marginal"),
    ):
        points = [(across(i), up(100 * v)) for i, v in enumerate(values, 1)]
        if len(points) > 1:
            canvas.path(points, f"curve {style}")
        for i, (point, value) in enumerate(zip(points, values, strict=True), 1):
            canvas.dot(point, 3, style.split()[0], f"position {i}, {name}: {share(value, 1)}")
    canvas.text(((left + right) / 2, bottom + 27), "position of the draft", "axis")
    return canvas


def cost_split(width: float, figures: SettingFigures) -> Canvas:
    """Where the time of an emitted token goes, stage by stage; of some arm this is known."""
    shown = [(name, costs.per_token) for name, costs in split_arms(figures)]
    narrow = width <= NARROW
    left, right = 4.0 if narrow else _LABELS, width - _VALUES - 8
    placed, height = _placed([name for name, _ in shown], width, 24)
    bottom = height + 4
    scale = Scale(0, max(sum(split.values()) for _, split in shown), left, right)
    canvas = Canvas(width, bottom + _AXIS, "Time per token by stage")
    canvas.across(scale, 4 if narrow else 7, (2, bottom), times=1e3)
    canvas.text(((left + right) / 2, bottom + 30), "ms per emitted token", "axis")
    tops = _labelled(canvas, width, placed)
    for top, (name, split) in zip(tops, shown, strict=True):
        x = left
        for number, stage in enumerate(STAGES):
            part = scale(split[stage]) - left
            hint = f"{name}, {stage}: {seconds(split[stage])} per token"
            if part > 0:
                canvas.bar((x, top), (part, 20), f"c{number}", hint)
            x += part
        total = seconds(sum(split.values()))
        canvas.text((width, top + 15), total, "value", "end", f"{name}: {total} per token")
    return canvas


def predicted_measured(width: float, figures: SettingFigures, on_device: bool) -> Canvas:
    """Speed-up that theory gives against the measured one; the band is the allowed residual.

    Dots carry the numbers of the table. On a GPU, where stages are not exact, none is marked.
    """
    size = min(width, 390.0)
    left, bottom, right, top = 44.0, size - 42, size - 10, 10.0
    points = [
        (arm.name, costs.predicted or 0.0, gain.steadier().value, residual)
        for arm, gain, costs, residual in judged(figures)
    ]
    every = [value for _, x, y, _ in points for value in (x, y)]
    low, high = min([0.9, *every]) * 0.95, max([1.1, *every]) * 1.05
    across, up = Scale(low, high, left, right), Scale(low, high, bottom, top)
    canvas = Canvas(size, size, "Predicted and measured speed-up")
    along = [low + (high - low) * step / 24 for step in range(25)]
    above = [(across(v), up(v * (1 + RESIDUAL_LIMIT))) for v in along]
    below = [(across(v), up(v * (1 - RESIDUAL_LIMIT))) for v in reversed(along)]
    canvas.path(above + below, "band", closed=True)
    canvas.across(across, 5, (top, bottom))
    canvas.up(up, ticks(low, high, 5), (left, right))
    canvas.path([(across(low), up(low)), (across(high), up(high))], "one")
    canvas.text(((left + right) / 2, size - 8), "predicted speed-up", "axis")
    canvas.text((left + 6, top + 12), "measured", "axis", "start")
    for number, (name, x, y, residual) in enumerate(points, 1):
        outside = not on_device and abs(residual) > RESIDUAL_LIMIT
        hint = f"{name}: predicted {x:.2f}, measured {y:.2f}, residual {signed_share(residual)}"
        canvas.dot((across(x), up(y)), 9, "t2" if outside else "t0", hint)
        canvas.text((across(x), up(y) + 4), str(number), "inside")
    return canvas


def drawable(records: Sequence[CurveRecord]) -> list[CurveRecord]:
    """Curves with more than one point that begin at one token."""
    return [c for c in records if len(c.seconds) > 1 and float(c.seconds.get("1", 0)) > 0]


def curves(width: float, records: Sequence[CurveRecord]) -> Canvas:
    """t(q) over t(1): what verifying q tokens costs, relative to one. The records are drawable."""
    lines = [(str(c), sorted((int(q), s) for q, s in c.seconds.items())) for c in records]
    narrow = width <= NARROW
    height, left, top = 260.0, 38.0, 10.0
    right, bottom = width - (8 if narrow else 150), height - 40
    most = max(points[-1][0] for _, points in lines)
    highest = max(s / points[0][1] for _, points in lines for _, s in points)
    across = Scale(0, math.log2(max(most, 2)), left, right)
    up = Scale(0, max(highest * 1.05, 1.2), bottom, top)
    canvas = Canvas(width, height, "Cost of a forward over q tokens, t(q) / t(1)")
    canvas.up(up, ticks(0, up.high, 5), (left, right))
    for power in range(int(math.log2(most)) + 1):
        canvas.text((across(power), bottom + 15), str(2**power), "tick")
    canvas.path([(left, up(1)), (right, up(1))], "one")
    canvas.text(((left + right) / 2, height - 8), "tokens a row in the forward, q", "axis")
    ends = spread([up(p[-1][1] / p[0][1]) for _, p in lines], 15)
    for number, ((name, points), end) in enumerate(zip(lines, ends, strict=True)):
        path = [(across(math.log2(q)), up(s / points[0][1])) for q, s in points]
        canvas.path(path, f"curve c{number % 6}")
        for place, (q, s) in zip(path, points, strict=True):
            canvas.dot(place, 3, f"c{number % 6}", f"{name}, q = {q}: {seconds(s)}")
        if not narrow:
            canvas.text((right + 8, end + 4), name, f"label t{number % 6}", "start")
    return canvas
