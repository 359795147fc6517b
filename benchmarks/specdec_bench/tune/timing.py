"""Times the few candidates that are left: interleaved with plain decoding, fewer every time."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.errors import SpecdecError
from specdec.hf_compat import input_device
from specdec_bench.measure.measuring import timed
from specdec_bench.measure.units import Unit
from specdec_bench.summary.intervals import Ratio, time_ratio
from specdec_bench.tune.grid import Candidate
from specdec_bench.tune.measured import PLAIN, Bench, arm_of

ROUNDS = ((3, 1), (1, 1), (1, 1), (1, 2))
"""(one unit in so many, pairs) of every round; half of the candidates go after each."""

_FEWEST = 2  # candidates that a round leaves


Repeats = dict[int, list[tuple[float, float]]]
"""Unit -> (plain's seconds, own seconds) of each repeat."""


@dataclass
class Race:
    """Seconds of candidates, by unit.

    Attributes:
        bench: Model and units.
        by_cpu: Processor time counts: one thread of a CPU does all the work.
        seconds: Candidate -> unit -> its repeats. Plain has one list for each repeat of a race, so
            that every answer has a plain one beside it.
        final: Those of the last round alone.
        failed: Candidates that could not run, and why.
        timings: Answers timed so far, warm-up included.
        finalists: Those of the last round, fastest first.
    """

    bench: Bench
    by_cpu: bool = False
    seconds: dict[Candidate, Repeats] = field(default_factory=dict)
    final: dict[Candidate, Repeats] = field(default_factory=dict)
    failed: dict[Candidate, str] = field(default_factory=dict)
    timings: int = 0
    finalists: list[Candidate] = field(default_factory=list)

    def run(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Times them in rounds; returns those of the last round, fastest first."""
        left = list(candidates)
        for number, (share, pairs) in enumerate(ROUNDS):
            is_last = number + 1 == len(ROUNDS)
            units = self.bench.units if share == 1 else self.bench.some(share)
            if len(left) <= _FEWEST and not is_last:
                continue  # nobody would go
            for pair in range(pairs):
                gc.collect()  # not while an answer is timed
                for position, unit in enumerate(units):
                    self._time_unit(left, unit, pair + position, is_last)
            left = [candidate for candidate in left if candidate not in self.failed]
            gain = self.final_gain if is_last else self.gain
            left = sorted(left, key=lambda candidate: -gain(candidate).value)
            if not is_last:
                left = left[: max(_FEWEST, len(left) // 2)]
        self.finalists = left
        return left

    def gain(self, candidate: Candidate) -> Ratio:
        """Speed-up over plain decoding with its interval, over all that was timed."""
        return self._gain(self.seconds[candidate])

    def final_gain(self, candidate: Candidate) -> Ratio:
        """The same over the last round: what a candidate was chosen by says too much for it."""
        return self._gain(self.final[candidate])

    def _gain(self, found: Repeats) -> Ratio:
        units = sorted(found)
        records = [self.bench.units[unit].record for unit in units]
        return time_ratio(
            [[plain for plain, _ in found[unit]] for unit in units],
            [[own for _, own in found[unit]] for unit in units],
            [record.cluster for record in records],
            [record.category for record in records],
        )

    def _time_unit(
        self, candidates: Sequence[Candidate], unit: Unit, shift: int, is_last: bool
    ) -> None:
        """One answer of each, in turning order, and plain ones at both ends."""
        at = shift % max(len(candidates), 1)
        before = self._once(PLAIN, unit)
        found = []
        for candidate in [*candidates[at:], *candidates[:at]]:
            try:
                if candidate not in self.seconds:
                    self._once(candidate, unit)  # warms up
                    self.seconds[candidate] = {}
                found.append((candidate, self._once(candidate, unit)))
            except SpecdecError as problem:
                self.failed[candidate] = str(problem)
        plain = (before + self._once(PLAIN, unit)) / 2
        index = self.bench.units.index(unit)
        for candidate, own in found:
            self.seconds[candidate].setdefault(index, []).append((plain, own))
            if is_last:
                self.final.setdefault(candidate, {}).setdefault(index, []).append((plain, own))

    def _once(self, candidate: Candidate, unit: Unit) -> float:
        arm = arm_of(candidate, self.bench.workbench)
        self.timings += 1
        _, seconds = timed(lambda: arm.run(unit), input_device(self.bench.workbench.model))
        return seconds.cpu if self.by_cpu else seconds.wall
