"""The tables of the report, as cells: the page and the Markdown show the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from specdec_bench.report.charts import RESIDUAL_LIMIT
from specdec_bench.report.format import (
    NONE,
    count,
    energy,
    fine,
    interval,
    plain_times,
    seconds,
    share,
    signed_share,
    size,
    times,
)
from specdec_bench.summary.intervals import Ratio
from specdec_bench.summary.types import (
    STAGES,
    ArmFigures,
    CategoryFigures,
    SettingFigures,
    Summary,
    Texts,
)

NOT_PROMISED_NOTE = (
    "Text not promised: at this temperature the arm keeps the target's distribution only, and "
    "draws a text of its own; --check-sampling tests the distribution."
)
ON_DEVICE_NOTE = (
    "On a GPU the stages are laps of the host's clock without waiting for the device: work counts "
    "where the host next waits for it, so only the whole round is exact."
)
_SHOWN_LOOPING = 0.0005  # a smaller share would be shown as 0.0 %

Tone = Literal["", "good", "bad", "warn", "dim"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a cell.

    Attributes:
        text: Its words.
        more: Words after it, which matter less: an interval.
        tone: How it is meant.
        heat: -1 (much slower) to 1 (much faster), for a tint; None for no tint.
    """

    text: str
    tone: Tone = ""
    heat: float | None = None
    more: str = ""

    @property
    def words(self) -> str:
        """All of it in one line."""
        return f"{self.text} {self.more}".strip()


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


def lead(figures: SettingFigures) -> str:
    """What was measured in a setting, in a sentence or two."""
    words = (
        f"{count(figures.prompts)} prompts, {count(figures.units)} requests, "
        f"{count(figures.tokens)} tokens an arm."
    )
    if figures.looping >= _SHOWN_LOOPING:
        words += f" {share(figures.looping, 1)} of plain's text began to loop and was cut off."
    skipped = figures.skipped
    if skipped is None:
        return words
    if skipped.short:
        words += (
            f" {count(skipped.short)} of {count(skipped.asked)} texts end or loop too early, and "
            "were left out."
        )
    if skipped.ungrouped:
        words += f" {count(skipped.ungrouped)} more did not fill a batch."
    if skipped.shortened:
        words += f" {count(skipped.shortened)} prompts lost their beginning."
    return words


def results_table(figures: SettingFigures, summary: Summary) -> Table:
    """Speed-ups, acceptance and checks of every arm; the baseline over itself first."""
    baseline = summary.header.baseline
    clocks = ["wall time", "CPU time"] if summary.has_cpu_clock else ["wall time"]
    head = ["arm", *(f"speed-up, {clock}" for clock in clocks)]
    head += ["typical request", "over hf", "tokens per round", "text", "errors"]
    rows = [] if figures.again is None else [_again_row(figures, baseline, len(clocks))]
    rows += [_result_row(arm, baseline, len(clocks)) for arm in figures.arms]
    loop = times(figures.loop_gain.wall if figures.loop_gain else None)
    note = (
        f"Speed-up: total time of {baseline}, our loop without speculation, over the arm's, with a "
        "95 % interval from a bootstrap over prompts. Typical request: geometric mean over "
        "requests. Over hf: against plain Hugging Face generate; it is the speed-up times the gain "
        f"of the loop itself ({loop}). Tokens per "
        "round: mean over all rounds, the target's own token included."
    )
    stars = _stars(
        [r for a in figures.arms if a.gain for r in (a.gain.wall, a.gain.cpu, a.gain.geometric)]
    )
    if any(arm.texts.units.get("not_promised") for arm in figures.arms):
        stars += f" {NOT_PROMISED_NOTE}"
    return Table("Speed-up", head, rows, note + stars)


def _stars(ratios: Sequence[Ratio | None]) -> str:
    if not any(ratio is not None and ratio.over == "repeats" for ratio in ratios):
        return ""
    return (
        " * Too few prompts for an interval over prompts: it covers the repeats on these prompts, "
        "and says nothing of others."
    )


def _again_row(figures: SettingFigures, baseline: str, clocks: int) -> list[Cell]:
    again = figures.again
    ratios = [] if again is None else [again.wall, again.cpu][:clocks]
    names = ("wall", "cpu")
    cells = [
        _fine_cell(ratio, "warn" if name in figures.noisy else "dim")
        for name, ratio in zip(names, ratios, strict=False)
    ]
    typical = _fine_cell(again.geometric if again else None, "dim")
    verdict = Cell("too noisy", "warn") if figures.noisy else Cell("steady", "good")
    return [Cell(f"A/A: {baseline} over itself"), *cells, typical, *_dashes(2), verdict, Cell(NONE)]


def _fine_cell(ratio: Ratio | None, tone: Tone) -> Cell:
    """A ratio near 1 with three decimals, above its interval."""
    figure, _, ends = fine(ratio).partition(" ")
    return Cell(figure, tone, more=ends)


def _dashes(many: int) -> list[Cell]:
    return [Cell(NONE, "dim")] * many


def _result_row(arm: ArmFigures, baseline: str, clocks: int) -> list[Cell]:
    if arm.name == baseline:
        gains = [Cell("1", "dim")] * clocks + [Cell("1", "dim")]
    elif arm.gain is None:
        why = Cell("wrong text" if arm.wrong else "not shown", "bad")
        gains = [why, *_dashes(clocks)]
    else:
        ratios = [arm.gain.wall, arm.gain.cpu][:clocks]
        gains = [gain_cell(r, _tone(r)) for r in ratios] + [gain_cell(arm.gain.geometric)]
    errors = Cell(f"{arm.errors} of {arm.timings}", "bad") if arm.errors else Cell("0", "dim")
    over = gain_cell(arm.over_hf.wall if arm.over_hf else None)
    return [Cell(arm.name), *gains, over, tau_cell(arm.tau), text_cell(arm.texts), errors]


def gain_cell(ratio: Ratio | None, tone: Tone = "") -> Cell:
    """A speed-up above its interval."""
    if ratio is None:
        return Cell(NONE, "dim")
    return Cell(plain_times(ratio.value), tone, more=interval(ratio))


def tau_cell(ratio: Ratio | None) -> Cell:
    """Tokens per round above their interval."""
    if ratio is None:
        return Cell(NONE, "dim")
    return Cell(f"{ratio.value:.2f}", more=interval(ratio))


def _tone(ratio: Ratio | None) -> Tone:
    """Good or bad only where the interval says so."""
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
    own = units.get("not_promised", 0)
    if own:
        return Cell("not promised", "dim", more=f"{total - own} of {total} as plain's")
    near = units.get("near_tie", 0)
    if near:
        tokens = f"{count(texts.tokens.get('near_tie', 0))} of {count(sum(texts.tokens.values()))}"
        return Cell(f"{total - near} exact, {near} near-tie", more=f"{tokens} tokens")
    return Cell("exact", "good", more=f"{total} of {total}")


def problems_table(figures: SettingFigures) -> Table | None:
    """What went wrong, arm by arm; None when nothing did."""
    rows = [
        [
            Cell(name),
            Cell(
                f"WRONG TEXT, first at {texts.first_wrong}: no speed-up of any arm is shown in "
                "this setting",
                "bad",
            ),
        ]
        for name, texts in figures.wrong_texts.items()
    ]
    for arm in figures.arms:
        if arm.no_gain and not figures.wrong:
            rows.append([Cell(arm.name), Cell(f"no speed-up: {arm.no_gain}", "bad")])
        if arm.errors:
            said = f"{arm.errors} of {arm.timings} timed answers failed: {arm.first_error}"
            rows.append([Cell(arm.name), Cell(said, "bad")])
    return Table("Problems", ["arm", "what"], rows) if rows else None


def cost_table(figures: SettingFigures, on_device: bool = False) -> Table | None:
    """Seconds of a round by stage."""
    rows = [
        [
            Cell(arm.name),
            *(Cell(seconds(arm.costs.per_round[stage])) for stage in STAGES),
            Cell(seconds(sum(arm.costs.per_round.values()))),
            Cell(seconds(arm.costs.prefill)),
        ]
        for arm in figures.arms
        if arm.costs is not None and not arm.wrong
    ]
    note = (
        "Per round, in a pass of its own, so that the timers do not touch the speed-ups; the "
        "prefill is per answer. Verify: the target's forward. Accept: choosing what stands of the "
        "draft. Host: what drafters note after a round, and what no timer saw."
    )
    note += f" {ON_DEVICE_NOTE}" if on_device else ""
    return (
        Table("Cost of a round", ["arm", *STAGES, "round", "prefill"], rows, note) if rows else None
    )


def prediction_table(figures: SettingFigures, on_device: bool = False) -> Table | None:
    """Predicted beside measured speed-up; the numbers are those of the chart."""
    shown = [arm for arm in figures.arms if arm.costs and arm.costs.residual is not None]
    rows = []
    for number, arm in enumerate(shown, 1):
        costs, gain = arm.costs, arm.gain
        if costs is None or gain is None or costs.residual is None:
            continue
        outside = abs(costs.residual) > RESIDUAL_LIMIT and not on_device
        rows.append(
            [
                Cell(f"{number}. {arm.name}"),
                Cell(plain_times(costs.predicted)),
                gain_cell(gain.steadier()),
                Cell(signed_share(costs.residual), "warn" if outside else ""),
            ]
        )
    note = (
        "Predicted from the measured cost of a forward over q tokens, the tokens per round and the "
        "other stages. Residual: measured over predicted, minus 1; "
    )
    note += (
        "on a GPU it is not judged, for the stages are not exact there."
        if on_device
        else "beyond 15 % it is marked."
    )
    head = ["arm", "predicted", "measured", "residual"]
    return Table("Predicted and measured", head, rows, note) if rows else None


def latency_table(figures: SettingFigures) -> Table | None:
    """When tokens arrive, and what else an answer takes."""
    head = ["arm", "first token", "time per token", "burst", "gap p50", "p95", "p99"]
    head += ["peak memory", "energy per token"]
    rows = []
    for arm in figures.arms:
        latency = arm.latency
        if latency is None or arm.wrong:
            continue
        burst = NONE
        if latency.gaps:
            burst = f"{latency.burst:.2f} (most {latency.largest_burst})"
        rows.append(
            [
                Cell(arm.name),
                Cell(seconds(latency.first_token)),
                Cell(seconds(latency.per_token)),
                Cell(burst),
                *(Cell(seconds(latency.gaps.get(at))) for at in (50, 95, 99)),
                Cell(size(arm.peak_bytes)),
                Cell(energy(arm.joules_per_token)),
            ]
        )
    if not rows:
        return None
    note = (
        "Speculation emits in bursts, so a mean over tokens of one burst would mean nothing: gaps "
        "are between bursts, and the time per token is over whole answers. All from the "
        "instrumented pass, one answer each: on a noisy machine only rough."
    )
    return Table("Latency", head, rows, note)


def category_table(figures: SettingFigures, baseline: str) -> Table | None:
    """Speed-up and tokens per round of each arm on each category."""
    arms = [arm for arm in figures.arms if arm.name != baseline and arm.categories]
    if not arms or len(arms[0].categories) < 2:
        return None
    head = ["arm", *(f"{c.category} ({c.prompts})" for c in arms[0].categories)]
    rows = [[Cell(arm.name), *(_category_cell(arm, c) for c in arm.categories)] for arm in arms]
    every = [c.gain.steadier() for arm in arms for c in arm.categories if c.gain]
    clock = "CPU time" if any(c.gain and c.gain.cpu for a in arms for c in a.categories) else "wall"
    note = f"Speed-up by {clock}, and tokens per round; in brackets the number of prompts."
    return Table("By category", head, rows, note + _stars(every))


def _category_cell(arm: ArmFigures, found: CategoryFigures) -> Cell:
    tau = f"{found.tau.value:.2f} tokens" if found.tau else ""
    if found.gain is None:
        return Cell("wrong text" if arm.wrong else tau or NONE, "bad" if arm.wrong else "dim")
    ratio = found.gain.steadier()
    heat = max(-1.0, min(1.0, ratio.value - 1))
    more = ", ".join(filter(None, [interval(ratio), tau]))
    return Cell(plain_times(ratio.value), "", heat, more)
