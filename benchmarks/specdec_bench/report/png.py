"""The report's main charts as PNG files, for slides and papers. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from specdec_bench.report.charts import RESIDUAL_LIMIT
from specdec_bench.report.format import plain_times
from specdec_bench.report.svg import wrapped
from specdec_bench.summary.types import STAGES, SettingFigures, Summary

_COLOURS = ("#2f6db5", "#2a9d8f", "#d9772b", "#a23b8c", "#6a56c2", "#8a95a1")
_NAME_CHARACTERS = 34  # on a line beside the bars
_CPU, _DOTS_PER_INCH = "#86b0df", 160


def plots(summary: Summary) -> Mapping[str, bytes]:
    """File name -> PNG.

    Args:
        summary: What to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found: dict[str, bytes] = {}
    for figures in summary.settings:
        name = re.sub(r"[^a-z0-9]+", "-", str(figures.setting).lower()).strip("-")
        found[f"speedup-{name}.png"] = _speedups(figures, summary)
        if any(arm.acceptance and arm.acceptance.positions > 0 for arm in figures.arms):
            found[f"acceptance-{name}.png"] = _acceptance(figures)
        if any(arm.costs and not arm.wrong for arm in figures.arms):
            found[f"costs-{name}.png"] = _costs(figures)
        if any(arm.costs and arm.costs.residual is not None for arm in figures.arms):
            found[f"predicted-{name}.png"] = _predicted(figures)
    if summary.curves:
        found["cost-curve.png"] = _curves(summary)
    return found


def _axes(width: float, height: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(_plain(title), fontsize=11, x=0.01, ha="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _names(names: Sequence[str]) -> tuple[list[str], float]:
    """The names of rows, whole, on as many lines as they need; and the inches of a row."""
    lines = [wrapped(name, _NAME_CHARACTERS) for name in names]
    return [_plain("\n".join(name)) for name in lines], 0.16 * max(map(len, lines), default=1) + 0.1


def _legend(names: Sequence[str], width: float) -> tuple[list[str], float]:
    """What stands below a figure `width` inches wide, a name a line or more; its inches."""
    lines = [wrapped(name, int(12 * width)) for name in names]
    return [_plain("\n".join(name)) for name in lines], 0.16 * sum(map(len, lines))


def _plain(words: str) -> str:
    """Words in which matplotlib sees no formula."""
    return words.replace("$", r"\$")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": "specdec"})
    return buffer.getvalue()


def _speedups(figures: SettingFigures, summary: Summary) -> bytes:
    baseline = summary.header.baseline
    rows = [(a.name, a.gain, a.wrong) for a in figures.arms if a.name != baseline]
    if figures.again is not None:
        rows.insert(0, (f"A/A: {baseline} over itself", figures.again, False))
    title = f"Speed-up over {baseline}, {figures.setting}"
    title += ", MACHINE TOO NOISY" if figures.noisy else ""
    names, inches = _names([name for name, _, _ in rows])
    figure, axes = _axes(8, 1.3 + max(0.5, inches) * len(rows), title)
    for index, (_, gain, wrong) in enumerate(rows):
        if gain is None:
            words = "WRONG TEXT, no speed-up" if wrong else "not shown"
            axes.text(1.01, index, words, color="#b3261e", va="center", fontsize=9)
            continue
        ratios = [(gain.wall, _COLOURS[0], "wall time")]
        if gain.cpu is not None:
            ratios.append((gain.cpu, _CPU, "CPU time"))
        for offset, (ratio, colour, label) in zip((-0.2, 0.2), ratios, strict=False):
            place = index + offset if len(ratios) == 2 else index
            axes.barh(place, ratio.value - 1, 0.36, left=1, color=colour, label=label)
            if ratio.over != "nothing":
                axes.plot([ratio.low, ratio.high], [place, place], color="#16202b", lw=1.2)
            edge = max(ratio.value, ratio.high if ratio.over != "nothing" else 1.0, 1.0)
            axes.text(edge, place, f" {plain_times(ratio.value)}", va="center", fontsize=8)
    axes.axvline(1, color="#16202b", lw=1, ls="--")
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("speed-up, with its 95 % interval", fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        axes.legend(once.values(), once.keys(), fontsize=8, frameon=False)
    return _png(figure)


def _acceptance(figures: SettingFigures) -> bytes:
    from matplotlib.ticker import MaxNLocator

    shown = [
        (number, arm.acceptance, f"{arm.name}: {arm.acceptance.tau_per_step:.2f} tokens per round")
        for number, arm in enumerate(figures.arms)
        if arm.acceptance is not None and arm.acceptance.positions >= 1
    ]
    labels, inches = _legend([words for _, _, words in shown], 8)
    figure, axes = _axes(8, 4 + inches, f"Acceptance by position, {figures.setting}")
    for (number, acceptance, _), label in zip(shown, labels, strict=True):
        places = range(1, acceptance.positions + 1)
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(places, acceptance.marginal, "o-", color=colour, ms=4, label=label)
        axes.plot(places, acceptance.conditional, "--", color=colour, lw=1)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("position of the draft (solid: marginal, dashed: conditional)", fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside lower left")
    return _png(figure)


def _costs(figures: SettingFigures) -> bytes:
    shown = [(a.name, a.costs.per_token) for a in figures.arms if a.costs and not a.wrong]
    names, inches = _names([name for name, _ in shown])
    height = 1.4 + max(0.4, inches) * len(shown)
    figure, axes = _axes(8, height, f"Time per token by stage, {figures.setting}")
    for index, (_, split) in enumerate(shown):
        left = 0.0
        for number, stage in enumerate(STAGES):
            width = split[stage] * 1e3
            label = stage if index == 0 else None
            axes.barh(index, width, 0.6, left=left, color=_COLOURS[number], label=label)
            left += width
    axes.set_yticks(range(len(shown)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("ms per emitted token", fontsize=9)
    figure.legend(fontsize=8, frameon=False, ncols=len(STAGES), loc="outside lower center")
    return _png(figure)


def _predicted(figures: SettingFigures) -> bytes:
    shown = [
        (arm.name, (arm.costs.predicted, arm.gain.steadier().value))
        for arm in figures.arms
        if arm.costs is not None and arm.gain is not None and arm.costs.predicted
    ]
    labels, inches = _legend([f"{n}  {name}" for n, (name, _) in enumerate(shown, 1)], 5.5)
    figure, axes = _axes(5.5, 5 + inches, f"Predicted and measured, {figures.setting}")
    for number, (_, point) in enumerate(shown, 1):
        axes.plot(*point, "o", color=_COLOURS[0], ms=11)
        axes.text(*point, str(number), color="white", fontsize=8, ha="center", va="center_baseline")
    every = [1.0, *(value for _, point in shown for value in point)]
    ends = [min(every) * 0.93, max(every) * 1.07]
    axes.plot(ends, ends, "--", color="#16202b", lw=1)
    low, high = ([end * (1 + sign * RESIDUAL_LIMIT) for end in ends] for sign in (-1, 1))
    axes.fill_between(ends, low, high, color=_COLOURS[0], alpha=0.1, lw=0)
    axes.set_xlabel("predicted speed-up", fontsize=9)
    axes.set_ylabel("measured speed-up", fontsize=9)
    unseen = [axes.plot([], [], " ", label=label)[0] for label in labels]
    figure.legend(
        unseen, labels, fontsize=8, frameon=False, loc="outside lower left", handlelength=0
    )
    return _png(figure)


def _curves(summary: Summary) -> bytes:
    figure, axes = _axes(7, 4, "Cost of a forward over q tokens, t(q) / t(1)")
    for number, curve in enumerate(summary.curves):
        points = sorted((int(q), s) for q, s in curve.seconds.items())
        if not points or points[0][1] <= 0:
            continue
        relative = [s / points[0][1] for _, s in points]
        label, colour = str(curve), _COLOURS[number % len(_COLOURS)]
        axes.plot([q for q, _ in points], relative, "o-", color=colour, ms=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens a row in the forward, q", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)
