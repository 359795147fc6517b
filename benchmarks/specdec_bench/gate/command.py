"""`specdec bench gate`: for CI, exit code 1 when a run is worse than an older one."""

from __future__ import annotations

from specdec.artifacts.terminal import columns, say, wrapped
from specdec_bench.gate.judge import Judgement, compare
from specdec_bench.gate.options import GateOptions
from specdec_bench.printable import printable
from specdec_bench.results.files import read_results


def run_gate(options: GateOptions) -> int:
    """Compares two result files and says what it found.

    Args:
        options: What to compare, and the limits.

    Returns:
        Exit code: 0 when nothing got worse as far as the intervals show, else 1.

    Raises:
        SpecdecError: A file cannot be read or is not whole, or the runs did not measure the same.
    """
    base, new = (read_results(path.expanduser()) for path in (options.base, options.new))
    judgement = compare(base, new, options)
    _show(judgement, options)
    return 1 if judgement.failures else 0


def _show(judgement: Judgement, options: GateOptions) -> None:
    reference = judgement.reference
    unit = f"relative to {reference} in the same run" if reference else "by seconds"
    if judgement.comparisons:
        say(_fit(f"Speed of the new run over the old one, {unit}, with 95 % intervals:"))
        clocks = list(dict.fromkeys(c for one in judgement.comparisons for c in one.speeds))
        rows = [["arm", "setting", *(f"{clock} time" for clock in clocks), "tokens per round", ""]]
        for one in judgement.comparisons:
            cells = [*(one.speeds.get(clock) for clock in clocks), one.tau]
            figures = ["-" if cell is None else str(cell) for cell in cells]
            verdict = "WORSE" if one.failures else "ok"
            rows.append([one.arm, str(one.setting), *figures, verdict])
        for line in columns(rows):
            say(printable(line))
    if reference:
        say(_fit(f"What slows {reference} and the others alike cannot be seen this way."))
    for words in judgement.warnings:
        say(_fit(f"warning: {words}", 2))
    for words in judgement.failures:
        say(_fit(f"FAILED: {words}", 2))
    if not judgement.failures:
        limit = f"{options.max_slowdown:.1%}"
        say(f"passed: no slowdown beyond {limit} is shown, all texts hold, acceptance held")


def _fit(words: str, hang: int = 0) -> str:
    return printable(wrapped(words, hang))
