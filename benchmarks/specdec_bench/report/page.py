"""The report, from templates: one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from specdec_bench.report import charts
from specdec_bench.report.cells import Table, table
from specdec_bench.report.format import facts, seconds
from specdec_bench.report.headline import provenance_line, stamps, target_name, tiles, what_ran
from specdec_bench.report.svg import both
from specdec_bench.report.tables import lead, setting_tables
from specdec_bench.results.records import ViewRecord, repeated_arm
from specdec_bench.summary.types import STAGES, Summary

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")
_BREAK = re.compile(r"([:,_+])")  # where a long name of an arm may go on in the next line


def page(summary: Summary) -> str:
    """The page: no script, no font, no network."""
    header, end = summary.header, summary.end
    run = {"run": header.run_id, "baseline": header.baseline, "schema": header.schema}
    if end is not None:
        run |= {"stopped by": end.stopped_by, "seconds": f"{end.seconds:.0f}"}
    return _rendered(
        "page.html",
        summary=summary,
        title=target_name(summary),
        what_ran=what_ran(summary),
        provenance=provenance_line(summary),
        stamps=stamps(summary),
        tiles=tiles(summary),
        settings=[(s, lead(s), setting_tables(s, summary)) for s in summary.settings],
        curves=charts.drawable(summary.curves),
        answers=list(_answers(summary)),
        facts={
            "Run": facts(run),
            "Machine and versions": facts(header.provenance),
            "Options": facts(header.config),
        },
        charts=charts,
        both=both,
        seconds=seconds,
        stages=STAGES,
    )


def markdown(summary: Summary) -> str:
    """The page's tables without its charts."""
    sections: list[tuple[str, str, list[Table]]] = [
        (str(figures.setting), lead(figures), list(setting_tables(figures, summary).values()))
        for figures in summary.settings
    ]
    for curve in summary.curves:
        points = sorted((int(q), s) for q, s in curve.seconds.items())
        cells = ["seconds", *(seconds(s) for _, s in points)]
        found = table("", ["q", *(str(q) for q, _ in points)], [cells])
        sections.append((f"t(q): {curve}", "", [found]))
    run = {"run": summary.header.run_id, "baseline": summary.header.baseline}
    every = facts(run) + facts(summary.header.provenance) + facts(summary.header.config)
    sections.append(("Provenance", "", [table("", ["what", "value"], every)]))
    return _rendered(
        "report.md",
        finalize=lambda words: escaped(str(words)),
        provenance=provenance_line(summary),
        stamps=stamps(summary),
        sections=sections,
    )


def escaped(words: str) -> str:
    """The words with nothing in them that Markdown or HTML would read."""
    return _SPECIAL.sub(r"\\\1", " ".join(words.split()))


def _rendered(name: str, finalize: Any = None, **shown: Any) -> str:
    """A template filled in; `finalize` makes what stands in its braces safe, HTML is anyway."""
    environment = Environment(
        loader=PackageLoader("specdec_bench.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template(name).render(shown)


def _breakable(name: str) -> Markup:
    return Markup(_BREAK.sub(r"\1<wbr>", str(escape(name))))  # noqa: S704 - escaped right here


def _answers(summary: Summary) -> Iterator[tuple[ViewRecord, str, bool]]:
    """Answers as text, what is said of each, and whether it is open: the one of fewest rounds."""
    wrong = {(figures.index, name) for figures in summary.settings for name in figures.wrong}
    again = repeated_arm(summary.header.baseline)
    views = [view for view in summary.views if view.arm != again]
    best = min(views, key=lambda view: len(view.rounds), default=None)
    for view in views:
        said = f"{sum(map(len, view.rounds))} tokens in {max(len(view.rounds) - 1, 0)} rounds"
        said += f"; {summary.header.settings[view.setting]}"
        said += "; this arm has WRONG texts" if (view.setting, view.arm) in wrong else ""
        yield view, said, view is best
