"""The page docs/models.md, made from the sweep's reports."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

import transformers

from helpers.drafters import THROW_AWAY
from specdec.registry import methods
from sweep.cells import Report
from sweep.situations import NEW_TOKENS, SITUATIONS
from sweep.tiny import VARIANTS

_MODES = ("tree", "chain", "plain")
_INTRODUCTION = """\
# Models

There is no list of supported architectures. When `specdec.augment` is called, a self-test runs a
handful of tiny forwards on the model itself and chooses one of three modes; `mode` and
`mode_reason` of `specdec.last_stats(model)` tell which one a call had, and why.

- **tree**: one forward verifies a whole token tree. Needs attention that is told its positions and
  its mask, which is most models.
- **chain**: one forward verifies a single path of drafted tokens. For models that fold their past
  into a state (recurrent, convolutional and hybrid ones) or derive positions from the cache: a
  rejected token cannot be cut out of a state, so the state before the draft is kept, and accepted
  tokens are fed again with the next draft.
- **plain**: the call runs as the model's own `generate`, with one warning that says why. The text
  is right and nothing is gained.

The mode decides the speed, never the text. This page is the proof on random models: every causal
LM class of transformers {version} is built tiny and generates with every method, and the tokens are
compared with those of its own `generate`.
"""
_HOW = """\
## How it was measured

`make models` runs it again and writes this page (`tests/sweep`). A model is built from its config
class's defaults with every size made small, 2 to 4 layers that show each kind of layer the class
has, windows of 16 tokens, random weights scaled up so that the text is varied, in float64 where
the class can. Four situations, {tokens} new tokens each: greedy and seeded sampling, one prompt
and a left-padded batch of three, whose rows end early at different steps when sampled. Each runs
twice as plain `generate`; a situation whose plain call fails or does not repeat itself has
nothing to compare with and is left out below. Then it runs with every method ({methods}) and with
the test suite's own drafters ({own}), which know the text and lie here and there, so that long
and branching drafts are accepted. A cell is one call: the tokens, and after sampling the state of
the random generator, must equal plain's.

The mode in the table is that of the self-test. A call that crosses a boundary which no mask tells,
such as a window that only the layers know, runs as plain; these boundaries are as small here as the
windows. One of the suite's own drafters proposes nothing but trees and always runs as plain on
models that take chains.

Only where both ways to run a class that are its own (token by token, and one forward over the whole
text) disagree about a choice because of rounding may the tokens differ; such cells are counted as
margins.

The modes are those of these small models. A class whose layers are configured otherwise, with a
sliding window or a rope that changes with the length, may get another one; what counts is what the
self-test says about the model at hand.
"""


def wrong(report: Report) -> bool:
    """Whether a class has cells that differ, or errors."""
    return bool(report.failed) or any(c.outcome in ("differs", "error") for c in report.cells)


def complaint(report: Report) -> str:
    """What is wrong with a class, a line a cell."""
    lines = [f"{report.model_type}: {report.failed}"] if report.failed else []
    lines += [
        f"{report.model_type}: {cell.situation}, {cell.method}: {cell.outcome}, {cell.detail}"
        for cell in report.cells
        if cell.outcome in ("differs", "error")
    ]
    return "\n".join(lines)


def totals(reports: Sequence[Report]) -> list[str]:
    """The sweep in a few lines."""
    outcomes = Counter(cell.outcome for report in reports for cell in report.cells)
    taking_part = [report for report in reports if report.cells]
    types = sum(report.model_type not in VARIANTS for report in reports)
    taken = sum(report.model_type not in VARIANTS for report in taking_part)
    modes = Counter(report.mode for report in taking_part)
    failed = sum(bool(report.failed) for report in reports)
    errors = outcomes["error"] + failed
    by_mode = ", ".join(f"{modes[mode]} {mode}" for mode in _MODES)
    return [
        f"transformers {transformers.__version__}: {taken} of {types} model types took part, and "
        f"{len(taking_part) - taken} variants ({by_mode})",
        f"{outcomes.total()} cells: {outcomes['differs']} differing, {errors} errors, "
        f"{outcomes['margin']} margins below rounding noise",
    ]


def reasons(report: Report) -> str:
    """Why a class has its mode, and where its calls ran in another one."""
    parts = [report.reason]
    others = Counter(
        (cell.mode, cell.reason) for cell in report.cells if cell.mode not in ("", report.mode)
    )
    for mode, reason in others:
        there = [c for c in report.cells if (c.mode, c.reason) == (mode, reason)]
        if all(cell.method in THROW_AWAY for cell in there):
            continue  # one of the test suite's own proposes nothing but trees
        padded = [situation.name for situation in SITUATIONS if situation.rows > 1]
        only_padded = all(cell.situation in padded for cell in there)
        parts.append(f"{mode} {'in padded batches' if only_padded else 'here'}: {reason}")
    return "; ".join(part for part in parts if part)


def render(reports: Sequence[Report]) -> str:
    """The whole page."""
    own = sorted(THROW_AWAY)
    named = [name for name in methods.names() if name not in own]
    lines = [
        "<!-- Written by tests/sweep/run.py: run `make models` instead of editing. -->",
        "",
        _INTRODUCTION.format(version=transformers.__version__),
        "## Result",
        "",
        *(f"- {line}" for line in totals(reports)),
        "",
        "| model type | class | mode | reason | cells | differing |",
        "|---|---|---|---|---:|---:|",
        *(_row(report) for report in reports if report.cells or report.failed),
        "",
        *_left_out(reports),
        _wrapped(_HOW.format(tokens=NEW_TOKENS, methods=", ".join(named), own=", ".join(own))),
    ]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    """Paragraphs whose inserted names may have made lines too long."""
    return (
        "\n\n".join(
            textwrap.fill(part, 100, break_on_hyphens=False) for part in text.strip().split("\n\n")
        )
        + "\n"
    )


def _row(report: Report) -> str:
    differing = sum(cell.outcome in ("differs", "error") for cell in report.cells)
    return _cells(
        report.model_type,
        f"`{report.class_name}`",
        report.mode,
        report.failed or reasons(report),
        len(report.cells),
        differing + bool(report.failed),
    )


def _cells(*values: object) -> str:
    return "| " + " | ".join(str(value).replace("|", "\\|") for value in values) + " |"


def _left_out(reports: Sequence[Report]) -> list[str]:
    """What has no cells, and why."""
    rows = []
    for report in reports:
        if report.unbuilt:
            rows.append(_cells(report.model_type, "everything", report.unbuilt))
        by_reason: dict[str, list[str]] = {}
        for situation, why in report.excluded.items():
            by_reason.setdefault(why, []).append(situation)
        for why, situations in by_reason.items():
            whole = len(situations) == len(SITUATIONS)
            what = "everything" if whole else "; ".join(situations)
            rows.append(_cells(report.model_type, what, why))
    if not rows:
        return []
    head = ["## Left out", "", "| model type | what | why |", "|---|---|---|"]
    return [*head, *rows, ""]
