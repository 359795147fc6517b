"""The table at the end of a run, setting by setting, and what must be known to read it."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from io import StringIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specdec.artifacts.terminal import colour_wanted, say, wrapped
from specdec_bench.measure.schedule import Timings
from specdec_bench.printable import printable
from specdec_bench.report.cells import (
    Cell,
    again_cells,
    residual_cell,
    speedup_cells,
    text_cell,
)
from specdec_bench.report.format import NONE, plain_times, share
from specdec_bench.report.tables import NOT_PROMISED_NOTE, judged, lead, problems
from specdec_bench.results.records import Results, SamplingRecord
from specdec_bench.summary.summarize import summarize
from specdec_bench.summary.types import ArmFigures, SettingFigures, Summary

_STYLES = {"good": "green", "bad": "red", "warn": "yellow"}
_DOMINATES = 2**0.5  # over this, more than half of the variance is the prompts'
_WIDEST = 1 << 16  # columns; a name may be as long as it likes


def print_results(results: Results, no_colour: bool = False) -> Summary:
    """Prints everything a run found.

    Args:
        results: Of the run.
        no_colour: Never colour.

    Returns:
        The figures, for whoever decides about exit codes.
    """
    summary, colour = summarize(results), colour_wanted(sys.stdout, no_colour)
    for figures in summary.settings:
        say()
        say(_drawn(Text(str(figures.setting), "bold"), colour))
        say(wrapped(lead(figures)))
        _print_table(figures, summary, colour)
        for note in (*_notes(figures, summary), *_more_prompts(figures, summary, results)):
            say(_drawn(_written(note, wrapped(note.text, 2)), colour))
    say()
    for note in _last_words(results, summary):
        say(_drawn(_written(note, wrapped(note.text, 2)), colour))
    return summary


def _drawn(shown: Table | Text, colour: bool) -> str:
    """As a terminal shows it. Printing is ours: at a broken pipe rich would end the process."""
    console = Console(
        file=StringIO(),
        width=_WIDEST,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
    )
    with console.capture() as drawn:
        console.print(shown)
    return "\n".join(line.rstrip() for line in drawn.get().splitlines())


def _written(cell: Cell, words: str) -> Text:
    return Text(printable(words), _STYLES.get(cell.tone, cell.tone))


def _print_table(figures: SettingFigures, summary: Summary, colour: bool) -> None:
    clocks = ("speed-up (wall)", "speed-up (CPU)")[: 2 if summary.has_cpu_clock else 1]
    head = ["", "text", "tokens/round", *clocks, "over hf", "predicted", "residual"]
    rows = [_row(arm, figures, summary, len(clocks)) for arm in figures.arms]
    if figures.again is not None:
        first = Cell(f"A/A: {summary.header.baseline} over itself", "dim")
        again = again_cells(figures, figures.again, len(clocks))
        rows.insert(0, [first, Cell(""), Cell(""), *again, *[Cell("")] * 3])
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_written(cell, cell.words) for cell in row))
    needed = max(map(cell_len, _drawn(table, colour=False).splitlines()))
    if not sys.stdout.isatty() or needed <= shutil.get_terminal_size().columns:
        say(_drawn(table, colour))
        return
    # Each arm on a line of its own, its figures below it with their names.
    for row in rows:
        say(_drawn(_written(row[0], row[0].text), colour))
        named = zip(head[1:], row[1:], strict=True)
        found = "; ".join(f"{name} {cell.words}" for name, cell in named if cell.text)
        say(printable(wrapped(f"  {found}", 2)))


def _row(arm: ArmFigures, figures: SettingFigures, summary: Summary, clocks: int) -> list[Cell]:
    row = [Cell(arm.name), text_cell(arm.texts)]
    row.append(Cell("" if arm.tau is None else f"{arm.tau.value:.2f}"))
    row += speedup_cells(arm, summary.header.baseline, clocks)
    row.append(Cell(plain_times(arm.over_hf.steadier().value if arm.over_hf else None)))
    known = [one for one in judged(figures) if one[0] is arm]
    for _, _, costs, residual in known:
        row += [Cell(plain_times(costs.predicted)), residual_cell(residual, summary.on_device)]
    row += [] if known else [Cell("")] * 2
    return [Cell("") if cell.text == NONE else cell for cell in row]


def _notes(figures: SettingFigures, summary: Summary) -> Iterator[Cell]:
    """What must be said below a table."""
    for name, what in problems(figures):
        yield Cell(f"{name.text}: {what.text}", what.tone)
    if any(arm.texts.units.get("not_promised") for arm in figures.arms):
        yield Cell(NOT_PROMISED_NOTE, "dim")
    for arm, _, _, residual in judged(figures):
        found = residual_cell(residual, summary.on_device)
        if found.tone:
            words = f"{arm.name}: {found.text} of what its costs predict is unexplained"
            yield Cell(words, found.tone)
    if figures.noisy:
        clocks = " and ".join(figures.noisy)
        yield Cell(
            f"too noisy for small differences by {clocks} time: in the A/A row the same program "
            "differs from itself by more than 2 %, or nobody can tell to within 5 %; measure "
            "again with more --pairs or prompts, or on a quieter machine",
            "warn",
        )
    for test in summary.sampling:
        if test.setting == figures.index:
            yield _sampling_note(test)


def _sampling_note(test: SamplingRecord) -> Cell:
    words = (
        f"sampling of {test.arm}: p = {test.p_value:.3g} over {test.samples} texts, total "
        f"variation {test.total_variation:.3f} where noise gives {test.expected_variation:.3f}, "
        f"{test.same_text} texts equal to plain's"
    )
    return Cell(words, "dim") if test.passed else Cell(f"WRONG {words}", "bad")


def _more_prompts(figures: SettingFigures, summary: Summary, results: Results) -> Iterator[Cell]:
    """With --until-ci: whether what is left of the intervals is how far prompts lie apart."""
    wish = results.header.provenance.get("until_ci")
    if not isinstance(wish, int | float) or not wish:
        return
    units = [unit for (setting, _), unit in results.units.items() if setting == figures.index]
    timings = Timings(units, summary.header.baseline, summary.has_cpu_clock)
    for time in results.times:
        if time.setting == figures.index:
            timings.add(time)
    prompts, repeats = timings.widest(over_prompts=True), timings.widest()
    if wish < prompts < math.inf and prompts >= _DOMINATES * repeats:
        yield Cell(
            f"the widest interval is {share(prompts)} to each side, {share(repeats)} from repeats "
            "of the same prompts: more prompts, not more pairs, would narrow the rest",
            "warn",
        )


def _last_words(results: Results, summary: Summary) -> Iterator[Cell]:
    end, provenance = results.end, results.header.provenance
    threads = provenance.get("threads")
    where = f"{provenance.get('device_name')}, {threads} thread{'' if threads == 1 else 's'}"
    pairs = 1 + max((time.pair for time in results.times), default=-1)
    why = "" if end is None else f", {end.seconds:.0f} s, stopped by {end.stopped_by}"
    yield Cell(
        f"speed-up: time of {summary.header.baseline} (our loop without speculation) over the "
        "arm's for the same text, 95 % interval over prompts; "
        f"{pairs} pair{'' if pairs == 1 else 's'}{why}; {where}",
        "dim",
    )
    servers = provenance.get("servers")
    for arm, facts in servers.items() if isinstance(servers, dict) else ():
        kept = facts.get("prefix_cache") if isinstance(facts, dict) else None
        if kept in ("kept", "unknown"):
            may = "keeps" if kept == "kept" else "may keep"
            yield Cell(
                f"{arm} {may} prompts that it has read before: its time to the first token, and "
                "its speed-up with it, are those of a prefix cache",
                "warn",
            )
    if provenance.get("chat_template") is False:
        words = "the tokenizer has no chat template: chat prompts went in as plain text"
        yield Cell(words, "warn")
