"""Successive halving: few answers of many candidates, then more answers of the better half.

Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization"
(arXiv:1502.07943). Nothing is predicted: candidates are judged by answers that took what they took.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.cost.tuned_file import TunedChoice
from specdec.errors import ConfigError
from specdec_bench.arm_names import ArmSpec
from specdec_bench.contracts import Unit, Workbench
from specdec_bench.tune.grid import Grid
from specdec_bench.tune.race import Race, Timed

_FIRST_UNITS = 1  # that every candidate answers
_NEAR_UNITS = 2  # that neighbours answer, which are more alike
_STEPS = 2  # to the best neighbour of the best
_FINALISTS = 2
_PASSES = 2  # of the finalists over all units


@dataclass
class Search:
    """The search for one batch size.

    Attributes:
        workbench: Model and setting.
        units: Prompts with plain's texts.
        grids: By method.
        seed: Of the order of the units and of the sizes to begin with.
        tell: Told what goes on, a line at a time.
        finalists: Those of the last race, by it alone, fastest first.
        expected: Name -> speed-up before the last race.
        known: All that was timed, by name; of one in several races the last.
        failed: Name -> why it could not run.
        seconds: Wall seconds.
    """

    workbench: Workbench
    units: Sequence[Unit]
    grids: Mapping[str, Grid]
    seed: int
    tell: Callable[[str], object]
    finalists: Sequence[Timed] = ()
    expected: Mapping[str, float] = field(default_factory=dict)
    known: dict[str, Timed] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Every race has another order: who was lucky on its first prompts is judged by others."""
        self._random = random.Random(self.seed)

    @property
    def choice(self) -> TunedChoice:
        """The fastest of those that are shown to gain, or not to speculate.

        What a candidate was chosen by says too much for it, so the last race counts alone. It is
        run on the same prompts, so its interval is one for these prompts and not for others.
        """
        for spec, gain in ((found.spec, found.gain) for found in self.finalists):
            if gain.low > 1:
                measured, expected = (gain.value, gain.low, gain.high), self.expected[spec.name]
                return TunedChoice(spec.method, spec.options, expected, measured)
        return TunedChoice("none")

    @property
    def skipped(self) -> dict[str, str]:
        """Methods of which nothing could run, and why."""
        ran = {found.spec.method for found in self.known.values()}
        failed = {name.rpartition(":")[0]: reason for name, reason in self.failed.items()}
        return {method: reason for method, reason in failed.items() if method not in ran}

    def table(self) -> dict[str, dict[str, Any]]:
        """What is known of each candidate, by name: those with most answers first, then fastest."""
        found = sorted(
            (one for name, one in self.known.items() if name not in self.failed),
            key=lambda one: (-sum(map(len, one.seconds.values())), -one.gain.value),
        )
        return {one.spec.name: one.to_json() for one in found}

    def run(self, candidates: int) -> None:
        """Searches, from so many candidates of each method."""
        start = time.perf_counter()
        best = self._halved(self._start(candidates), _FIRST_UNITS, _FINALISTS)
        for _ in range(_STEPS if best else 0):
            leader = best[0]
            around = self.grids[leader.method].around(leader)
            new = [spec for spec in around if spec.name not in self.known]
            moved = self._halved([leader, *new], _NEAR_UNITS, 1) if new else []
            if not moved or moved[0].name == leader.name:
                break
            best[0] = moved[0]
        self.expected = {name: found.gain.value for name, found in self.known.items()}
        self._say(f"the last {len(best)} on all {len(self.units)} prompts")
        race = Race(self.workbench, self.failed)
        race.run(best, self.units, _PASSES)
        self.known |= race.known
        self.finalists, self.seconds = race.ranked(best), time.perf_counter() - start

    def _start(self, candidates: int) -> list[ArmSpec]:
        specs: list[ArmSpec] = []
        for method, grid in self.grids.items():
            try:
                specs += grid.sample(candidates, self.seed)
            except ConfigError as problem:
                self.failed[f"{method}:"] = str(problem)
        return specs

    def _halved(self, specs: Sequence[ArmSpec], first: int, most: int) -> list[ArmSpec]:
        """The fastest, when the better half of them goes on to twice the units each time.

        Text decides what pays, so the best of every method stays for as long as there is room.

        Args:
            specs: Who begins.
            first: Units of the first round.
            most: Ends when so many are left.
        """
        race, count = Race(self.workbench, self.failed), len(self.units)
        units = self._random.sample(list(self.units), count)
        begin, end = 0, min(first, count)
        while True:
            self._say(f"{len(specs)} candidates on {end} of {count} prompts")
            race.run(specs, units[begin:end])
            ranked = [found.spec for found in race.ranked(specs)]
            specs = _better(ranked, max(len(ranked) // 2, most))
            if end == count or len(specs) <= most:
                break
            begin, end = end, min(2 * end, count)
        self.known |= race.known
        return ranked[:most]

    def _say(self, line: str) -> None:
        self.tell(f"{self.workbench.setting}: {line}")


def _better(ranked: Sequence[ArmSpec], count: int) -> list[ArmSpec]:
    """So many of the fastest, among them the best of every method if they are not too many."""
    first = {spec.method: spec for spec in reversed(ranked)}
    if len(first) > count:
        return list(ranked[:count])
    others = [spec for spec in ranked if spec is not first[spec.method]]
    return [*first.values(), *others[: count - len(first)]]
