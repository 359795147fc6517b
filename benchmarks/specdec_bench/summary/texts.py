"""What the checks said about each arm's texts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from specdec_bench.results.records import (
    NOT_PROMISED,
    CheckRecord,
    Results,
    UnitRecord,
    repeated_arm,
)
from specdec_bench.summary.types import Texts

_SEVERITY = ("exact", "near_tie", "not_promised", "unchecked", "wrong")

Seen = Mapping[str, Iterable[str]]
Checks = Mapping[tuple[str, str], CheckRecord]


def texts_by_arm(results: Results, setting: int) -> Mapping[str, Texts]:
    """The verdicts of each arm in a setting, each unit by the worst of its texts.

    A text with plain's hash is exact without a check. A text that differs and has none is
    "unchecked": whoever times must also look. Of an arm that keeps the distribution only, as the
    run's header says, it is "not_promised" to be plain's.

    Args:
        results: The run.
        setting: Index of the setting.
    """
    units = {name: unit for (index, name), unit in results.units.items() if index == setting}
    seen: dict[str, defaultdict[str, dict[str, None]]]
    seen = {arm: defaultdict(dict) for arm in results.header.arms}
    checks: dict[str, dict[tuple[str, str], CheckRecord]] = {arm: {} for arm in seen}
    for row in results.times:
        if row.setting == setting and not row.error and row.unit in units:
            seen[row.arm][row.unit][row.text_sha256] = None
    for check in results.checks:
        if check.setting == setting and check.unit in units:
            seen[check.arm][check.unit][check.text_sha256] = None
            checks[check.arm][check.unit, check.text_sha256] = check
    own_texts = _own_texts(results, setting)
    otherwise = {arm: "not_promised" if arm in own_texts else "unchecked" for arm in seen}
    return {arm: _texts(units, seen[arm], checks[arm], otherwise[arm]) for arm in seen}


def _own_texts(results: Results, setting: int) -> set[str]:
    """Arms whose texts in this setting need not be plain's; never the baseline."""
    found = results.header.provenance.get(NOT_PROMISED)
    names = found.get(str(setting)) if isinstance(found, Mapping) else None
    if not isinstance(names, list | tuple):
        return set()
    baseline = results.header.baseline
    return {name for name in names if isinstance(name, str)} - {baseline, repeated_arm(baseline)}


def _texts(
    units: Mapping[str, UnitRecord], seen: Seen, checks: Checks, otherwise: str = "unchecked"
) -> Texts:
    """Of one arm; `seen` are the different texts of each unit, timed or only checked.

    `otherwise` is the verdict on a text that differs and has no check.
    """
    by_unit: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for unit, texts in seen.items():
        verdicts = []
        for text in texts:
            check = checks.get((unit, text))
            if check is not None:
                verdicts.append(str(check.verdict))
                tokens.update(check.tokens)
            elif text == units[unit].text_sha256:
                verdicts.append("exact")
                tokens["exact"] += units[unit].tokens
            else:
                verdicts.append(otherwise)
        by_unit[max(verdicts, key=_SEVERITY.index)] += 1
    ratios = [c.worst_ratio for c in checks.values() if c.worst_ratio is not None]
    wrong = next((c for c in checks.values() if c.verdict == "wrong"), None)
    return Texts(
        {name: by_unit[name] for name in _SEVERITY if by_unit[name]},
        {name: tokens[name] for name in _SEVERITY if tokens[name]},
        "" if wrong is None else _place(wrong),
        max(ratios, default=None),
    )


def _place(check: CheckRecord) -> str:
    if not check.first_difference:
        return f"unit {check.unit}"
    row, position = check.first_difference
    return f"unit {check.unit}, row {row}, token {position}"
