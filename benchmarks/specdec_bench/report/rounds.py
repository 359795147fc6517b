"""The tables of acceptance: tokens per round, and what was accepted at which position."""

from __future__ import annotations

from specdec_bench.report.format import NONE, count, share
from specdec_bench.report.tables import Cell, Table, tau_cell
from specdec_bench.summary.types import SettingFigures


def rounds_table(figures: SettingFigures) -> Table | None:
    """The histogram: shares of the rounds by how many tokens a row emitted in them."""
    counted = [(arm.name, a) for arm in figures.arms if (a := arm.acceptance) is not None]
    if not counted:
        return None
    most = max(max(found.histogram) for _, found in counted)
    rows = [
        [
            Cell(name),
            Cell(count(found.rounds)),
            *(
                Cell(share(found.histogram.get(n, 0) / found.rounds, 1))
                if n <= max(found.histogram)
                else Cell(NONE, "dim")
                for n in range(1, most + 1)
            ),
        ]
        for name, found in counted
    ]
    head = ["arm", "rounds", *(str(n) for n in range(1, most + 1))]
    return Table("Rounds by tokens", head, rows, "Share of the rounds that emitted so many tokens.")


def position_table(figures: SettingFigures) -> Table | None:
    """Chance that the i-th draft is accepted: at all, and given that those before it were."""
    counted = [(a.name, a.acceptance) for a in figures.arms if a.acceptance is not None]
    most = max((found.positions for _, found in counted), default=0)
    if most < 1:
        return None
    rows = [
        [
            Cell(name),
            Cell(kind),
            *(Cell(share(rate, 1)) for rate in rates),
            *[Cell(NONE, "dim")] * (most - len(rates)),
        ]
        for name, found in counted
        if found.positions
        for kind, rates in (("marginal", found.marginal), ("conditional", found.conditional))
    ]
    note = (
        "Marginal: rounds that accepted so many drafts or more, of all rounds. Conditional: given "
        "that the drafts before it were accepted. In a tree, positions are depths."
    )
    head = ["arm", "rate", *(str(n) for n in range(1, most + 1))]
    return Table("Acceptance by position", head, rows, note)


def acceptance_table(figures: SettingFigures) -> Table | None:
    """Tokens per round in both conventions, and what was drafted in vain."""
    counted = [arm for arm in figures.arms if arm.tau is not None]
    if not counted:
        return None
    head = ["arm", "per step", "per request", "drafts accepted", "rejected drafts per round"]
    rows = []
    for arm in counted:
        rate = wasted = None
        if arm.acceptance is not None and arm.acceptance.drafted:
            rate, wasted = arm.acceptance.acceptance_rate, arm.acceptance.wasted_per_round
        rows.append(
            [
                Cell(arm.name),
                tau_cell(arm.tau),
                tau_cell(arm.tau_per_request),
                Cell(share(rate, 1)),
                Cell(NONE if wasted is None else f"{wasted:.2f}"),
            ]
        )
    note = (
        "Per step: emitted tokens over rounds, pooled. Per request: mean of each request's own "
        "ratio. The two differ, and papers use both under one name."
    )
    return Table("Tokens per round", head, rows, note)
