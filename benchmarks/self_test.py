"""Does the harness see what is there, and nothing else? Planted slowdowns against A/A runs.

First many short runs: the interval of an arm over itself should cover 1.0, and that of an arm whose
every answer takes 1.05 times as long should cover 1/1.05 and not 1.0. Then the gate: the same arm,
asleep for 2 % or 10 % of each answer's time in the newer run, must pass and fail. Run:

    python benchmarks/self_test.py --runs 20
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from specdec_bench import RunOptions, run
from specdec_bench.gate.command import run_gate
from specdec_bench.gate.options import GateOptions
from specdec_bench.measure.arms import GenerateArm, Workbench, parse_arm
from specdec_bench.measure.units import Unit
from specdec_bench.summary.intervals import Ratio
from specdec_bench.summary.summarize import summarize
from specdec_bench.summary.types import Gain

_SLOWED = 1.05
_PLANTED = "planted"


@dataclass(frozen=True)
class Options:
    """What to test."""

    runs: int = 20
    """A/A runs."""
    pairs: int = 8
    """Timed repeats of an A/A run."""
    gate_pairs: int = 16
    """Timed repeats of the runs that the gate compares; 0 leaves it out."""
    arm: str = "prompt_lookup"
    """Arm that sleeps in the runs for the gate."""


def planted(spec: str, pause: Callable[[float], None]) -> Callable[[Workbench], Any]:
    """An arm that does what `spec` says, then pauses for a function of the seconds it took."""

    class Planted(GenerateArm):
        def answer(self, unit: Unit, *args: Any, **more: Any) -> list[list[int]]:
            start = time.perf_counter()
            found = super().answer(unit, *args, **more)
            pause(time.perf_counter() - start)
            return found

    return lambda bench: Planted(replace(parse_arm(spec), name=_PLANTED), bench)


def work(seconds: float) -> None:
    """Keeps the processor busy for the planted share of an answer's seconds."""
    end = time.perf_counter() + (_SLOWED - 1) * seconds
    while time.perf_counter() < end:
        pass


def gains(options: Options, folder: Path, number: int) -> tuple[Gain, Gain]:
    """(the baseline over itself, the planted arm over the baseline) of one run."""
    settings = RunOptions(
        arms=("loop0",), pairs=options.pairs, seed=number, output=folder / f"{number}.jsonl"
    )
    figures = summarize(run(settings, {_PLANTED: planted("loop0", work)})).settings[0]
    (slow,) = (arm.gain for arm in figures.arms if arm.name == _PLANTED)
    if figures.again is None or slow is None:
        raise SystemExit("a run gave no speed-up; its texts must be wrong")
    return figures.again, slow


def covers(found: Ratio, value: float) -> bool:
    """Whether the interval holds the value."""
    return found.low <= value <= found.high


def print_coverage(found: list[tuple[Gain, Gain]]) -> None:
    """A table by clock."""
    print("\n| clock | A/A covers 1 | median half-width | 1.05 covered | 1.0 excluded |")
    print("|---|---|---|---|---|")
    for clock in ("wall", "cpu"):
        pairs = [(getattr(again, clock), getattr(slow, clock)) for again, slow in found]
        width = statistics.median((again.high - again.low) / 2 for again, _ in pairs)
        same = sum(covers(again, 1) for again, _ in pairs)
        seen = sum(covers(slow, 1 / _SLOWED) for _, slow in pairs)
        told = sum(not covers(slow, 1) for _, slow in pairs)
        runs = len(pairs)
        print(f"| {clock} | {same}/{runs} | {100 * width:.2f} % | {seen}/{runs} | {told}/{runs} |")


def gate_codes(options: Options, folder: Path) -> dict[str, int]:
    """Exit code of the gate by what was planted in the newer run."""
    for share in (0.0, 0.02, 0.1):
        pause = planted(options.arm, lambda seconds, share=share: time.sleep(share * seconds))
        settings = RunOptions(
            arms=("hf",), pairs=options.gate_pairs, output=folder / f"gate-{share}.jsonl"
        )
        run(settings, {_PLANTED: pause})
    base = folder / "gate-0.0.jsonl"
    return {
        f"{100 * share:.0f} % sleep": run_gate(GateOptions(base, folder / f"gate-{share}.jsonl"))
        for share in (0.02, 0.1)
    }


def main() -> None:
    """Tests and prints the tables last."""
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = gate_codes(options, folder) if options.gate_pairs else {}
        found = [gains(options, folder, number) for number in range(options.runs)]
    print_coverage(found)
    for what, code in codes.items():
        print(f"gate with a {what}: exit code {code}")


if __name__ == "__main__":
    main()
