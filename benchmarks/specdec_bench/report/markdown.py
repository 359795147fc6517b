"""The report as Markdown: the page's tables without its charts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from specdec_bench.report.format import facts, seconds
from specdec_bench.report.page import provenance_line, stamps
from specdec_bench.report.rounds import acceptance_table, position_table, rounds_table
from specdec_bench.report.tables import (
    Table,
    category_table,
    cost_table,
    latency_table,
    lead,
    prediction_table,
    problems_table,
    results_table,
)
from specdec_bench.summary.types import Summary

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")


def markdown(summary: Summary) -> str:
    """The whole document.

    Args:
        summary: What to show.
    """
    parts = ["# Speculative decoding, measured", escaped(provenance_line(summary))]
    for _, words, lines in stamps(summary):
        parts.append("\n".join([f"> **{words}**", *(f">\n> {escaped(line)}" for line in lines)]))
    for figures in summary.settings:
        parts.append(f"## {escaped(str(figures.setting))}")
        parts.append(escaped(lead(figures)))
        tables = [
            problems_table(figures),
            results_table(figures, summary),
            acceptance_table(figures),
            rounds_table(figures),
            position_table(figures),
            cost_table(figures, summary.on_device),
            prediction_table(figures, summary.on_device),
            category_table(figures, summary.header.baseline),
            latency_table(figures),
        ]
        parts += [_table(found) for found in tables if found is not None]
    for curve in summary.curves:
        points = sorted((int(q), s) for q, s in curve.seconds.items())
        rows = [[str(q) for q, _ in points], [seconds(s) for _, s in points]]
        parts.append(f"## t(q): {escaped(str(curve))}")
        parts.append(_grid(["q", *rows[0]], [["seconds", *rows[1]]]))
    pairs = [("run", summary.header.run_id), ("baseline", summary.header.baseline)]
    pairs += facts(summary.header.provenance) + facts(summary.header.config)
    parts.append("## Provenance")
    parts.append(_grid(["what", "value"], pairs))
    return "\n\n".join(parts) + "\n"


def escaped(words: str) -> str:
    """The words with nothing in them that Markdown or HTML would read."""
    return _SPECIAL.sub(r"\\\1", " ".join(words.split()))


def _table(found: Table) -> str:
    rows = [[cell.words for cell in row] for row in found.rows]
    note = f"\n\n{escaped(found.note)}" if found.note else ""
    return f"### {escaped(found.title)}\n\n{_grid(found.head, rows)}{note}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *(["---:"] * (len(head) - 1))]]
    text = [f"| {' | '.join(escaped(cell) for cell in lines[0])} |", f"| {' | '.join(lines[1])} |"]
    text += [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in rows]
    return "\n".join(text)
