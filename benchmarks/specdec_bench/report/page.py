"""The report as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from specdec_bench.report import charts as charts
from specdec_bench.report.format import count, fine, plain_times, seconds, times
from specdec_bench.report.format import facts as flat
from specdec_bench.report.format import share as percent
from specdec_bench.report.parts import answer, card, facts, legend, stamp, table, tile
from specdec_bench.report.rounds import acceptance_table
from specdec_bench.report.style import STYLE
from specdec_bench.report.svg import both
from specdec_bench.report.tables import (
    category_table,
    cost_table,
    latency_table,
    lead,
    prediction_table,
    problems_table,
    results_table,
)
from specdec_bench.results.records import repeated_arm
from specdec_bench.summary.types import STAGES, ArmFigures, Gain, SettingFigures, Summary

_SHOWN_FACTS = {"revision": "revision", "target_sha256": "target", "prompts_sha256": "prompts"}
_HASH_SHOWN = 12  # characters
_SMALL = 280.0  # width of one of several small charts
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the page may load nothing at all


def page(summary: Summary) -> str:
    """The whole document.

    Args:
        summary: What to show.
    """
    sections = [_section(figures, summary) for figures in summary.settings]
    title = f"specdec bench: {_target(summary)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><div>{_head(summary)}</div></header><main>{''.join(sections)}"
        f"{_curves(summary)}{_answers(summary)}{_provenance(summary)}"
        f"<footer>Run {escape(summary.header.run_id)}. Every figure is computed from the records "
        "of this run.</footer></main></body></html>\n"
    )


def stamps(summary: Summary) -> list[tuple[str, str, list[str]]]:
    """What a reader must know first: tone, headline, and lines.

    Args:
        summary: Of the run.
    """
    found = []
    wrong = [
        f"{name} in {figures.setting}: {texts.units['wrong']} of "
        f"{sum(texts.units.values())} units, first at {texts.first_wrong}"
        for figures in summary.settings
        for name, texts in figures.wrong_texts.items()
    ]
    if wrong:
        words = "It is not what the target emits; no speed-up of any arm is shown in its setting."
        found.append(("bad", "WRONG TEXT", [*wrong, words]))
    if summary.wrong_sampling:
        lines = [
            f"{test.arm} in {summary.header.settings[test.setting]}: p = {test.p_value:.3g} over "
            f"{test.samples} texts, {test.same_text} equal to plain's"
            for test in summary.wrong_sampling
        ]
        words = "They sample from another distribution; no speed-up of theirs is shown."
        found.append(("bad", "WRONG DISTRIBUTION", [*lines, words]))
    if summary.noisy:
        steady = "The same program timed against itself differs by more than 2 %, or the interval "
        lines = [f"{clock}: {_again(summary, clock)}" for clock in summary.noisy]
        found.append(
            ("warn", "MACHINE TOO NOISY", [*lines, steady + "is wider than 5 % to each side."])
        )
    if any(figures.again is None for figures in summary.settings):
        words = "The baseline was not timed against itself, so nobody knows this machine's noise."
        found.append(("warn", "NO A/A ROW", [words]))
    return found


def provenance_line(summary: Summary) -> str:
    """What was measured with what, where and when, in a line; the whole list stands below."""
    facts_of = summary.header.provenance
    packages = facts_of.get("packages")
    versions = [("specdec", facts_of.get("specdec"))]
    versions += list(packages.items()) if isinstance(packages, Mapping) else []
    named = [f"{name} {version}" for name, version in versions if version]
    named += [
        f"{words} {_short(str(facts_of[name]))}"
        for name, words in _SHOWN_FACTS.items()
        if facts_of.get(name) is not None
    ]
    device = facts_of.get("device_name") or facts_of.get("device")
    threads = facts_of.get("threads")
    if device:
        named.append(str(device))
    if threads:
        named.append(f"{threads} thread{'' if threads == 1 else 's'}")
    named += [str(facts_of["time"])] if facts_of.get("time") else []
    return "; ".join([f"Run {summary.header.run_id[:_HASH_SHOWN]}", *named])


def _short(value: str) -> str:
    """The beginning of a hash, and what is said after it."""
    found, plus, more = value.partition("+")
    return found[:_HASH_SHOWN] + plus + more


def _again(summary: Summary, clock: str) -> str:
    for figures in summary.settings:
        for name, ratio in (
            ("wall", figures.again and figures.again.wall),
            ("cpu", figures.again and figures.again.cpu),
        ):
            if ratio and clock == f"{name} time in {figures.setting}":
                return f"A/A {fine(ratio)}"
    return ""


def _target(summary: Summary) -> str:
    provenance, config = summary.header.provenance, summary.header.config
    return str(config.get("target") or provenance.get("target") or "a run")


def _head(summary: Summary) -> str:
    tasks = summary.header.config.get("tasks") or ["smoke"]
    names = ", ".join(map(str, tasks)) if isinstance(tasks, list | tuple) else str(tasks)
    device = summary.header.provenance.get("device", "")
    words = f"Target {_target(summary)} on {names}" + (f", on {device}" if device else "")
    links = "".join(
        f'<a href="#setting{figures.index}">{escape(str(figures.setting))}</a>'
        for figures in summary.settings
    )
    return (
        f'<h1>Speculative decoding, measured</h1><p class="lead">{escape(words)}</p>'
        f'<p class="note">{escape(provenance_line(summary))}</p>'
        + "".join(stamp(*found) for found in stamps(summary))
        + f'<div class="tiles">{"".join(_tiles(summary))}</div>'
        + f'<nav>{links}<a href="#answers">Answers</a><a href="#provenance">Provenance</a></nav>'
    )


def _tiles(summary: Summary) -> list[str]:
    found = []
    gains = [(a.gain, a, s) for s in summary.settings for a in s.arms if a.gain]
    own = [one for one in gains if one[1].name != "hf"]
    if own:
        gain, arm, figures = max(own, key=lambda one: one[0].steadier().value)
        ratio = gain.steadier()
        words = f"{arm.name}, the fastest; {figures.setting}; {times(ratio)}"
        tone = "warn" if clock(gain) in figures.noisy else ""
        found.append(tile(plain_times(ratio.value), words, tone))
    texts = [arm.texts.units for figures in summary.settings for arm in figures.arms]
    free = sum(units.get("not_promised", 0) for units in texts)
    total = sum(sum(units.values()) for units in texts) - free
    fine_ones = sum(units.get("exact", 0) + units.get("near_tie", 0) for units in texts)
    near = sum(units.get("near_tie", 0) for units in texts)
    good = bool(total) and fine_ones == total
    said = "texts hold" if good else "texts hold, and the others do not"
    said += f": {count(near)} part from plain's at near-ties" if near else ""
    said += ": they are plain's, token by token" if good and not near else ""
    said += f"; {count(free)} more are not promised to be" if free else ""
    found.append(tile(f"{count(fine_ones)} of {count(total)}", said, "good" if good else "bad"))
    again = [(s.again, s) for s in summary.settings if s.again]
    if again:
        worst, figures = max(again, key=lambda one: abs(one[0].steadier().value - 1))
        ratio = worst.steadier()
        width = f"± {percent(ratio.half_width, 1)}"
        said = f"{'no interval' if ratio.over == 'nothing' else width}: the baseline over itself "
        said += f"(A/A, {clock(worst)} time), the worst setting"
        tone = "warn" if clock(worst) in figures.noisy else ""
        found.append(tile(f"{ratio.value:.3f}", said, tone))
    prompts = max((figures.prompts for figures in summary.settings), default=0)
    words = f"prompts, {len(summary.header.arms)} arms, {len(summary.settings)} setting"
    words += "" if len(summary.settings) == 1 else "s"
    if summary.end is not None:
        words += f", {summary.end.seconds / 60:.1f} minutes"
    found.append(tile(count(prompts), words))
    return found


def clock(gain: Gain) -> str:
    """Of `Gain.steadier`."""
    return "cpu" if gain.cpu is not None else "wall"


def _section(figures: SettingFigures, summary: Summary) -> str:
    baseline = summary.header.baseline
    names, colours = ["wall time", f"slower than {baseline}", "A/A: noise"], ["c0", "slow", "c5"]
    if summary.has_cpu_clock:
        names.insert(1, "CPU time")
        colours.insert(1, "cpu")
    bars = both(lambda width: charts.speedups(figures, baseline, width))
    problems = problems_table(figures)
    return (
        f'<h2 id="setting{figures.index}">{escape(str(figures.setting))}</h2>'
        f'<p class="lead">{escape(lead(figures))}</p>'
        + card("Problems", table(problems, "words"))
        + card("Speed-up", legend(names, colours), bars)
        + card("All figures", table(results_table(figures, summary)))
        + _acceptance(figures)
        + _costs(figures, summary.on_device)
        + card("By category", table(category_table(figures, baseline)))
        + card("Latency and memory", table(latency_table(figures)))
    )


def _acceptance(figures: SettingFigures) -> str:
    panels = []
    for arm in figures.arms:
        accepted = arm.acceptance
        if accepted is None or accepted.positions < 1:
            continue
        total = sum(accepted.histogram.values())
        most = max(accepted.histogram)
        shares = [(n, accepted.histogram.get(n, 0) / total) for n in range(1, most + 1)]
        curve = charts.by_position(arm, accepted.marginal, accepted.conditional, _SMALL)
        kind = "" if accepted.chain else ", by depth in a tree"
        tau = f"{accepted.tau_per_step:.2f} tokens per round{kind}"
        panels.append(
            f'<div><h4>{escape(arm.name)}</h4><span class="note">{escape(tau)}</span>'
            f"{charts.histogram(arm, shares, _SMALL).render('')}{curve.render('')}</div>"
        )
    names = ["rounds by tokens; marginal: draft i accepted, of all rounds"]
    names.append("conditional: given that those before it were")
    shown = legend(names, ["c0", "c2"]) + f'<div class="small">{"".join(panels)}</div>'
    return card("Acceptance", shown if panels else "", table(acceptance_table(figures)))


def _costs(figures: SettingFigures, on_device: bool) -> str:
    shown = [arm for arm in figures.arms if arm.costs is not None and not arm.wrong]
    if not shown:
        return ""
    split = both(lambda width: charts.cost_split(shown, width))
    colours = [f"c{number}" for number in range(len(STAGES))]
    below = table(cost_table(figures, on_device))
    found = card("Where the time goes", legend(STAGES, colours), split, below)
    return found + card("Theory and measurement", _scatter(shown, figures, on_device))


def _scatter(shown: Sequence[ArmFigures], figures: SettingFigures, on_device: bool) -> str:
    if not any(arm.costs and arm.costs.residual is not None for arm in shown):
        return ""
    words = (
        "On the dashed line the measured speed-up is what the cost of a forward and the tokens per "
        "round predict; in the band it is within 15 %. Numbers as in the table."
    )
    drawn = both(lambda width: charts.predicted_measured(shown, width, not on_device))
    beside = table(prediction_table(figures, on_device))
    return f'<p class="note">{escape(words)}</p><div class="side"><div>{drawn}</div>' + (
        f"<div>{beside}</div></div>"
    )


def _curves(summary: Summary) -> str:
    drawable = [
        c for c in summary.curves if len(c.seconds) > 1 and float(c.seconds.get("1", 0)) > 0
    ]
    if not drawable:
        return ""
    names = [
        f"{c.dtype}, batch {c.batch}: {seconds(float(c.seconds['1']))} for one token"
        for c in drawable
    ]
    colours = [f"c{number % 6}" for number in range(len(drawable))]
    words = (
        "What a target forward over q tokens costs, relative to one token. Where the line is flat, "
        "verifying drafts is almost free; where it is steep, speculation must be small."
    )
    chart = both(lambda width: charts.curves(drawable, width))
    text = f'<p class="note">{escape(words)}</p>'
    return '<h2 id="cost">The target</h2>' + card(
        "Cost of a forward, t(q) / t(1)", legend(names, colours), chart, text
    )


def _answers(summary: Summary) -> str:
    wrong = {
        (figures.index, arm.name)
        for figures in summary.settings
        for arm in figures.arms
        if arm.wrong
    }
    again, shown = repeated_arm(summary.header.baseline), []
    views = [view for view in summary.views if view.arm != again]
    best = min(views, key=lambda view: len(view.rounds), default=None)
    for view in views:
        note = f"; {summary.header.settings[view.setting]}"
        note += "; this arm has WRONG texts" if (view.setting, view.arm) in wrong else ""
        shown.append(answer(view, note, view is best))
    words = "One tint per round, a thin rule after each token; point at a tint to read its round."
    inside = f'<p class="note">{escape(words)}</p><br>{"".join(shown)}'
    return '<h2 id="answers">Answers, round by round</h2>' + (
        card("Token view", inside) if shown else '<p class="lead">None was recorded.</p>'
    )


def _provenance(summary: Summary) -> str:
    header, end = summary.header, summary.end
    run = [("run", header.run_id), ("baseline", header.baseline), ("schema", str(header.schema))]
    if end is not None:
        run += [("stopped by", end.stopped_by), ("seconds", f"{end.seconds:.0f}")]
    return (
        '<h2 id="provenance">Provenance</h2>'
        + card("Run", facts(run))
        + card("Machine and versions", facts(flat(header.provenance)))
        + card("Options", facts(flat(header.config)))
    )
