"""The table at the end of a run, setting by setting, and what must be known to read it."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from specdec.artifacts.terminal import bold, colour_wanted, columns, dim, say, wrapped
from specdec_bench.measure.schedule import Timings
from specdec_bench.printable import printable
from specdec_bench.report.cells import text_cell
from specdec_bench.report.format import NONE, fine, plain_times, share, signed_share, times
from specdec_bench.report.tables import NOT_PROMISED_NOTE
from specdec_bench.results.records import Results
from specdec_bench.summary.intervals import Ratio
from specdec_bench.summary.summarize import runs_on_device, summarize
from specdec_bench.summary.types import ArmFigures, SettingFigures, Summary

_RED, _GREEN, _YELLOW, _RESET = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"
_LARGE_RESIDUAL = 0.15
_DOMINATES = 2**0.5  # over this, more than half of the variance is the prompts'
_AGAIN = "A/A: {} again"


def print_results(results: Results, no_colour: bool = False) -> Summary:
    """Prints everything a run found.

    Args:
        results: Of the run.
        no_colour: Never colour.

    Returns:
        The figures, for whoever decides about exit codes.
    """
    summary, stream = summarize(results), sys.stdout
    colour = colour_wanted(stream, no_colour)
    for figures in summary.settings:
        say()
        say(bold(str(figures.setting), colour))
        say(wrapped(_units_line(figures, results)))
        _print_table(figures, summary, colour, stream)
        for text, tone in [*_notes(figures, results), *_more_prompts(figures, summary, results)]:
            say(_toned(wrapped(text, 2), tone, colour))
    say()
    for text, tone in _last_words(results, summary):
        say(_toned(wrapped(text, 2), tone, colour))
    return summary


def _units_line(figures: SettingFigures, results: Results) -> str:
    skipped = results.skipped.get(figures.index)
    words = f"{figures.units} units of {figures.prompts} prompts, {figures.tokens:,} tokens an arm"
    if figures.looping:
        words += f"; {share(figures.looping)} of plain's text was looping and is cut off"
    if skipped is not None and skipped.short:
        words += (
            f"; {skipped.short} of {skipped.asked} texts end or loop before the 16th token and "
            "are left out"
        )
    if skipped is not None and skipped.ungrouped:
        words += f"; {skipped.ungrouped} filled no batch"
    if skipped is not None and skipped.shortened:
        words += f"; {skipped.shortened} prompts were too long and lost their beginning"
    return words


def _print_table(figures: SettingFigures, summary: Summary, colour: bool, stream: TextIO) -> None:
    head = ["", "text", "tokens/round", "speed-up (wall)"]
    head += ["speed-up (CPU)"] if summary.has_cpu_clock else []
    head += ["over hf", "predicted", "residual"]
    rows, tones = [head], ["bold"]
    baseline = summary.header.baseline
    if figures.again is not None:
        again = figures.again
        row = [_AGAIN.format(baseline), "", "", fine(again.wall)]
        row += [fine(again.cpu)] if summary.has_cpu_clock else []
        rows.append([*row, "", "", ""])
        tones.append("warn" if figures.noisy else "dim")
    for arm in figures.arms:
        rows.append(_row(arm, baseline, summary.has_cpu_clock))
        tones.append(_tone(arm, baseline))
    lines = columns(rows, gap=2)
    width = shutil.get_terminal_size().columns
    if stream.isatty() and max(map(len, lines)) > width:
        _print_narrow(rows, tones, colour)
        return
    for line, tone in zip(lines, tones, strict=True):
        say(_toned(line, tone, colour))


def _print_narrow(rows: Sequence[Sequence[str]], tones: Sequence[str], colour: bool) -> None:
    """Each arm on a line of its own, its figures below it with their names."""
    head = rows[0][1:]
    for row, tone in zip(rows[1:], tones[1:], strict=True):
        say(_toned(row[0], tone, colour))
        found = [f"{name} {cell}" for name, cell in zip(head, row[1:], strict=True) if cell]
        say(printable(wrapped("  " + "; ".join(found), 2)))


def _row(arm: ArmFigures, baseline: str, has_cpu_clock: bool) -> list[str]:
    tau = "" if arm.tau is None else f"{arm.tau.value:.2f}"
    row = [arm.name, text_cell(arm.texts).words, tau]
    if arm.name == baseline:
        row += ["1"] * (2 if has_cpu_clock else 1)
    elif arm.gain is None:
        row += ["none" if arm.errors < arm.timings else "failed"]
        row += [""] if has_cpu_clock else []
    else:
        row.append(times(arm.gain.wall))
        row += [times(arm.gain.cpu)] if has_cpu_clock else []
    over = _steadier(arm, has_cpu_clock)
    costs = arm.costs
    shown = costs is not None and arm.name != baseline and arm.gain is not None
    row += [
        plain_times(over.value) if over is not None else "",
        plain_times(costs.predicted) if costs is not None and shown else "",
        signed_share(costs.residual) if costs is not None and shown else "",
    ]
    return ["" if cell == NONE else cell for cell in row]


def _steadier(arm: ArmFigures, has_cpu_clock: bool) -> Ratio | None:
    """Over Hugging Face's generate, by the clock that other programs disturb less."""
    if arm.over_hf is None:
        return None
    return arm.over_hf.steadier() if has_cpu_clock else arm.over_hf.wall


def _tone(arm: ArmFigures, baseline: str) -> str:
    if arm.wrong or (arm.gain is None and arm.name != baseline):
        return "bad"
    if arm.gain is None:
        return "dim"
    ratio = arm.gain.steadier()
    if not ratio.excludes(1.0):
        return ""
    return "good" if ratio.value > 1 else "slow"


def _toned(text: str, tone: str, colour: bool) -> str:
    text = printable(text)
    if tone in ("bold", "dim"):
        return (bold if tone == "bold" else dim)(text, colour)
    code = {"bad": _RED, "good": _GREEN, "warn": _YELLOW}.get(tone)
    return f"{code}{text}{_RESET}" if colour and code else text


def _notes(figures: SettingFigures, results: Results) -> list[tuple[str, str]]:
    """What must be said below a table."""
    found: list[tuple[str, str]] = [
        (f"WRONG TEXT: {name}, {texts.first_wrong}; no speed-up of any arm is shown here", "bad")
        for name, texts in figures.wrong_texts.items()
    ]
    if any(arm.texts.units.get("not_promised") for arm in figures.arms):
        found.append((NOT_PROMISED_NOTE, "dim"))
    for arm in figures.arms:
        if arm.no_gain and not figures.wrong:
            found.append((f"no speed-up of {arm.name}: {arm.no_gain}", "bad"))
        if arm.errors:
            words = f"{arm.name} failed {arm.errors} of {arm.timings} times: {arm.first_error}"
            found.append((words, "bad"))
        residual = arm.costs.residual if arm.costs is not None else None
        on_device = runs_on_device(results)
        if residual is not None and abs(residual) > _LARGE_RESIDUAL and not on_device:
            words = f"{arm.name}: {signed_share(residual)} of what its costs predict is unexplained"
            found.append((words, "warn"))
    if figures.noisy:
        clocks = " and ".join(figures.noisy)
        words = (
            f"too noisy for small differences by {clocks} time: in the A/A row the same program "
            "differs from itself by more than 2 %, or nobody can tell to within 5 %; measure "
            "again with more --pairs or prompts, or on a quieter machine"
        )
        found.append((words, "warn"))
    for test in results.sampling:
        if test.setting == figures.index:
            found.append(_sampling_note(test))
    return found


def _more_prompts(
    figures: SettingFigures, summary: Summary, results: Results
) -> list[tuple[str, str]]:
    """With --until-ci: whether what is left of the intervals is how far prompts lie apart."""
    wish = results.header.provenance.get("until_ci")
    if not isinstance(wish, int | float) or not wish:
        return []
    units = [unit for (setting, _), unit in results.units.items() if setting == figures.index]
    timings = Timings(units, summary.header.baseline, summary.has_cpu_clock)
    for time in results.times:
        if time.setting == figures.index:
            timings.add(time)
    prompts, repeats = timings.widest(over_prompts=True), timings.widest()
    if not wish < prompts < math.inf or prompts < _DOMINATES * repeats:
        return []
    words = (
        f"the widest interval is {share(prompts)} to each side, {share(repeats)} from repeats of "
        "the same prompts: more prompts, not more pairs, would narrow the rest"
    )
    return [(words, "warn")]


def _sampling_note(test: Any) -> tuple[str, str]:
    words = (
        f"sampling of {test.arm}: p = {test.p_value:.3g} over {test.samples} texts, total "
        f"variation {test.total_variation:.3f} where noise gives {test.expected_variation:.3f}, "
        f"{test.same_text} texts equal to plain's"
    )
    return (words, "dim") if test.passed else (f"WRONG {words}", "bad")


def _last_words(results: Results, summary: Summary) -> list[tuple[str, str]]:
    end, provenance = results.end, results.header.provenance
    threads = provenance.get("threads")
    where = f"{provenance.get('device_name')}, {threads} thread{'' if threads == 1 else 's'}"
    pairs = 1 + max((time.pair for time in results.times), default=-1)
    why = "" if end is None else f", {end.seconds:.0f} s, stopped by {end.stopped_by}"
    words = (
        f"speed-up: time of {summary.header.baseline} (our loop without speculation) over the "
        "arm's for the same text, 95 % interval over prompts; "
        f"{pairs} pair{'' if pairs == 1 else 's'}{why}; {where}"
    )
    found = [(words, "dim")]
    servers = provenance.get("servers")
    for arm, facts in servers.items() if isinstance(servers, dict) else ():
        kept = facts.get("prefix_cache") if isinstance(facts, dict) else None
        if kept in ("kept", "unknown"):
            may = "keeps" if kept == "kept" else "may keep"
            words = (
                f"{arm} {may} prompts that it has read before: its time to the first token, and "
                "its speed-up with it, are those of a prefix cache"
            )
            found.append((words, "warn"))
    if provenance.get("chat_template") is False:
        words = "the tokenizer has no chat template: chat prompts went in as plain text"
        found.append((words, "warn"))
    return found
