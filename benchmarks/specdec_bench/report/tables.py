"""The tables of the report: the page and the Markdown show the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from specdec_bench.report.cells import (
    Cell,
    Row,
    Table,
    again_cells,
    dashes,
    gain_cell,
    ratio_cell,
    residual_cell,
    speedup_cells,
    table,
    text_cell,
)
from specdec_bench.report.format import (
    NONE,
    count,
    counted,
    energy,
    interval,
    plain_times,
    seconds,
    share,
    size,
    times,
)
from specdec_bench.summary.intervals import Ratio
from specdec_bench.summary.types import (
    STAGES,
    ArmFigures,
    CategoryFigures,
    Costs,
    Gain,
    SettingFigures,
    Summary,
)

NOT_PROMISED_NOTE = (
    "Text not promised: at this temperature the arm keeps the target's distribution only, and "
    "draws a text of its own; --check-sampling tests the distribution."
)
_SPEEDUP_NOTE = (
    "Speed-up: total time of {}, our loop without speculation, over the arm's, with a 95 % "
    "interval from a bootstrap over prompts. Typical request: geometric mean over requests. Over "
    "hf: against plain Hugging Face generate; it is the speed-up times the gain of the loop itself "
    "({}). Tokens per round: mean over all rounds, the target's own token included."
)
_TOKENS_NOTE = (
    "Per step: emitted tokens over rounds, pooled. Per request: mean of each request's own ratio. "
    "The two differ, and papers use both under one name."
)
_POSITION_NOTE = (
    "Marginal: rounds that accepted so many drafts or more, of all rounds. Conditional: given "
    "that the drafts before it were accepted. In a tree, positions are depths."
)
_COST_NOTE = (
    "Per round, in a pass of its own, so that the timers do not touch the speed-ups; the "
    "prefill is per answer. Verify: the target's forward. Accept: choosing what stands of the "
    "draft. Host: what drafters note after a round, and what no timer saw."
)
_ON_DEVICE_NOTE = (
    " On a GPU the stages are laps of the host's clock without waiting for the device: work counts "
    "where the host next waits for it, so only the whole round is exact."
)
_PREDICTION_NOTE = (
    "Predicted from the measured cost of a forward over q tokens, the tokens per round and the "
    "other stages. Residual: measured over predicted, minus 1; "
)
_LATENCY_NOTE = (
    "Speculation emits in bursts, so a mean over tokens of one burst would mean nothing: gaps "
    "are between bursts, and the time per token is over whole answers. All from the "
    "instrumented pass, one answer each: on a noisy machine only rough."
)
_REPEATS_NOTE = (
    " * Too few prompts for an interval over prompts: it covers the repeats on these prompts, "
    "and says nothing of others."
)
_SHOWN_LOOPING = 0.0005  # a smaller share would be shown as 0.0 %


def setting_tables(figures: SettingFigures, summary: Summary) -> Mapping[str, Table]:
    """Tables of a setting that have rows, by the names that the page's template uses."""
    found = {
        "problems": table("Problems", ["arm", "what"], problems(figures)),
        "results": _results(figures, summary),
        "tokens": _tokens_per_round(figures),
        "rounds": _rounds(figures),
        "positions": _positions(figures),
        "costs": _costs(figures, summary.on_device),
        "prediction": _prediction(figures, summary.on_device),
        "categories": _categories(figures, summary.header.baseline),
        "latency": _latency(figures),
    }
    return {name: one for name, one in found.items() if one.rows}


def lead(figures: SettingFigures) -> str:
    """What was measured in a setting, in a sentence or two."""
    words = (
        f"{counted(figures.prompts, 'prompt')}, {counted(figures.units, 'request')}, "
        f"{counted(figures.tokens, 'token')} an arm."
    )
    if figures.looping >= _SHOWN_LOOPING:
        words += f" {share(figures.looping, 1)} of plain's text began to loop and was cut off."
    skipped = figures.skipped
    if skipped is None:
        return words
    if skipped.short:
        words += (
            f" {count(skipped.short)} of {count(skipped.asked)} texts end or loop before the 16th "
            "token, and were left out."
        )
    if skipped.ungrouped:
        words += f" {count(skipped.ungrouped)} more did not fill a batch."
    if skipped.shortened:
        words += f" {count(skipped.shortened)} prompts lost their beginning."
    return words


def problems(figures: SettingFigures) -> list[list[Cell]]:
    """What went wrong: an arm and a sentence in each row."""
    said = [
        (name, f"WRONG TEXT, first at {texts.first_wrong}: no speed-up of any arm is shown in "
         "this setting")
        for name, texts in figures.wrong_texts.items()
    ]  # fmt: skip
    for arm in figures.arms:
        if arm.no_gain and not figures.wrong:
            said.append((arm.name, f"no speed-up: {arm.no_gain}"))
        if arm.errors:
            words = f"{arm.errors} of {arm.timings} timed answers failed: {arm.first_error}"
            said.append((arm.name, words))
    return [[Cell(name), Cell(words, "bad")] for name, words in said]


def judged(figures: SettingFigures) -> Iterator[tuple[ArmFigures, Gain, Costs, float]]:
    """Arms with a predicted and a measured speed-up, and the residual of each."""
    for arm in figures.arms:
        if arm.gain and arm.costs and arm.costs.residual is not None:
            yield arm, arm.gain, arm.costs, arm.costs.residual


def split_arms(figures: SettingFigures) -> list[tuple[str, Costs]]:
    """Arms whose time is known by stage; of a wrong text nobody wants to know."""
    return [(a.name, a.costs) for a in figures.arms if a.costs is not None and not a.wrong]


def _results(figures: SettingFigures, summary: Summary) -> Table:
    baseline, clocks = summary.header.baseline, 2 if summary.has_cpu_clock else 1
    head = ["arm", *("speed-up, wall time", "speed-up, CPU time")[:clocks]]
    head += ["typical request", "over hf", "tokens per round", "text", "errors"]
    rows = [] if figures.again is None else [_again_row(figures, figures.again, baseline, clocks)]
    for arm in figures.arms:
        typical = gain_cell(arm.gain.geometric if arm.gain else None)
        errors = Cell(f"{arm.errors} of {arm.timings}", "bad") if arm.errors else Cell("0", "dim")
        rows.append(
            [
                Cell(arm.name),
                *speedup_cells(arm, baseline, clocks),
                Cell("1", "dim") if arm.name == baseline else typical,
                gain_cell(arm.over_hf.wall if arm.over_hf else None),
                ratio_cell(arm.tau),
                text_cell(arm.texts),
                errors,
            ]
        )
    gains = [arm.gain for arm in figures.arms if arm.gain]
    loop = times(figures.loop_gain.wall if figures.loop_gain else None)
    note = _SPEEDUP_NOTE.format(baseline, loop)
    note += _stars(ratio for gain in gains for ratio in (gain.wall, gain.cpu, gain.geometric))
    if any(arm.texts.units.get("not_promised") for arm in figures.arms):
        note += f" {NOT_PROMISED_NOTE}"
    return table("Speed-up", head, rows, note)


def _stars(ratios: Iterable[Ratio | None]) -> str:
    some = any(ratio is not None and ratio.over == "repeats" for ratio in ratios)
    return _REPEATS_NOTE if some else ""


def _again_row(figures: SettingFigures, again: Gain, baseline: str, clocks: int) -> list[Cell]:
    verdict = Cell("too noisy", "warn") if figures.noisy else Cell("steady", "good")
    cells = [*again_cells(figures, again, clocks), ratio_cell(again.geometric, "dim", 3)]
    return [Cell(f"A/A: {baseline} over itself"), *cells, *dashes(2), verdict, Cell(NONE)]


def _tokens_per_round(figures: SettingFigures) -> Table:
    """Tokens per round in both conventions, and what was drafted in vain."""
    rows: list[Row] = []
    for arm in figures.arms:
        if arm.tau is None:
            continue
        found = arm.acceptance
        rate = wasted = None
        if found is not None and found.drafted:
            rate, wasted = found.acceptance_rate, found.wasted_per_round
        means = ratio_cell(arm.tau), ratio_cell(arm.tau_per_request)
        rows.append([arm.name, *means, share(rate, 1), NONE if wasted is None else f"{wasted:.2f}"])
    head = ["arm", "per step", "per request", "drafts accepted", "rejected drafts per round"]
    return table("Tokens per round", head, rows, _TOKENS_NOTE)


def _rounds(figures: SettingFigures) -> Table:
    """The histogram: shares of the rounds by how many tokens a row emitted in them."""
    counted = [(arm.name, a) for arm in figures.arms if (a := arm.acceptance) is not None]
    most = max((len(found.shares) for _, found in counted), default=0)
    rows: list[Row] = []
    for name, found in counted:
        cells = [share(part, 1) for part in found.shares]
        rows.append([name, count(found.rounds), *cells, *dashes(most - len(cells))])
    head = ["arm", "rounds", *(str(n) for n in range(1, most + 1))]
    note = "Share of the rounds that emitted so many tokens."
    return table("Rounds by tokens", head, rows, note)


def _positions(figures: SettingFigures) -> Table:
    """Chance that the i-th draft is accepted: at all, and given that those before it were."""
    counted = [(arm.name, a) for arm in figures.arms if (a := arm.acceptance) and a.positions]
    most = max((found.positions for _, found in counted), default=0)
    rows: list[Row] = [
        [name, kind, *(share(rate, 1) for rate in rates), *dashes(most - len(rates))]
        for name, found in counted
        for kind, rates in (("marginal", found.marginal), ("conditional", found.conditional))
    ]
    head = ["arm", "rate", *(str(n) for n in range(1, most + 1))]
    return table("Acceptance by position", head, rows, _POSITION_NOTE)


def _costs(figures: SettingFigures, on_device: bool) -> Table:
    """Seconds of a round by stage."""
    rows: list[Row] = []
    for name, costs in split_arms(figures):
        stages = [costs.per_round[stage] for stage in STAGES]
        every = (*stages, sum(costs.per_round.values()), costs.prefill)
        rows.append([name, *map(seconds, every)])
    note = _COST_NOTE + (_ON_DEVICE_NOTE if on_device else "")
    return table("Cost of a round", ["arm", *STAGES, "round", "prefill"], rows, note)


def _prediction(figures: SettingFigures, on_device: bool) -> Table:
    """Predicted beside measured speed-up; the numbers are those of the chart."""
    rows: list[Row] = [
        [
            f"{number}. {arm.name}",
            plain_times(costs.predicted),
            gain_cell(gain.steadier()),
            residual_cell(residual, on_device),
        ]
        for number, (arm, gain, costs, residual) in enumerate(judged(figures), 1)
    ]
    judgement = "on a GPU it is not judged, for the stages are not exact there."
    note = _PREDICTION_NOTE + (judgement if on_device else "beyond 15 % it is marked.")
    head = ["arm", "predicted", "measured", "residual"]
    return table("Predicted and measured", head, rows, note)


def _latency(figures: SettingFigures) -> Table:
    """When tokens arrive, and what else an answer takes."""
    rows: list[Row] = []
    for arm in figures.arms:
        found = arm.latency
        if found is None or arm.wrong:
            continue
        burst = f"{found.burst:.2f} (most {found.largest_burst})" if found.gaps else NONE
        means = seconds(found.first_token), seconds(found.per_token)
        gaps = (seconds(found.gaps.get(at)) for at in (50, 95, 99))
        used = size(arm.peak_bytes), energy(arm.joules_per_token)
        rows.append([arm.name, *means, burst, *gaps, *used])
    head = ["arm", "first token", "time per token", "burst", "gap p50", "p95", "p99"]
    return table("Latency", [*head, "peak memory", "energy per token"], rows, _LATENCY_NOTE)


def _categories(figures: SettingFigures, baseline: str) -> Table:
    """Speed-up and tokens per round of each arm on each category; no rows for a single one."""
    arms = [a for a in figures.arms if a.name != baseline and len(a.categories) > 1]
    head = ["arm", *(f"{c.category} ({c.prompts})" for a in arms[:1] for c in a.categories)]
    rows = [[Cell(arm.name), *(_category_cell(arm, c) for c in arm.categories)] for arm in arms]
    gains = [c.gain for arm in arms for c in arm.categories if c.gain]
    clock = "CPU time" if any(gain.cpu for gain in gains) else "wall"
    note = f"Speed-up by {clock}, and tokens per round; in brackets the number of prompts."
    note += _stars(gain.steadier() for gain in gains)
    return table("By category", head, rows, note)


def _category_cell(arm: ArmFigures, found: CategoryFigures) -> Cell:
    tau = f"{found.tau.value:.2f} tokens" if found.tau else ""
    if found.gain is None:
        return Cell("wrong text", "bad") if arm.wrong else Cell(tau or NONE, "dim")
    ratio = found.gain.steadier()
    heat = max(-1.0, min(1.0, ratio.value - 1))
    more = ", ".join(filter(None, [interval(ratio), tau]))
    return Cell(plain_times(ratio.value), "", heat, more)
