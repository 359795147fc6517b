"""Times the few candidates that are left: interleaved with plain decoding, fewer every time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specdec.errors import SpecdecError
from specdec_bench.measure.units import Unit
from specdec_bench.summary.intervals import Ratio, time_ratio
from specdec_bench.tune.grid import Candidate
from specdec_bench.tune.measured import PLAIN, Bench, arm_of

ROUNDS = ((3, 1), (1, 1), (1, 1), (1, 2))
"""(one unit in so many, pairs) of every round; half of the candidates go after each."""

_FEWEST = 2  # candidates that a round leaves


@dataclass
class Race:
    """Seconds of candidates, by unit.

    Attributes:
        bench: Model and units.
        clock: Seconds; processor time where one thread of a CPU does all the work.
        seconds: Candidate -> unit -> its repeats. Plain has one list for each repeat of a race, so
            that every answer has a plain one beside it.
        failed: Candidates that could not run, and why.
        timings: Answers timed so far, warm-up included.
        finalists: Those of the last round, fastest first.
    """

    bench: Bench
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[Candidate, dict[int, list[tuple[float, float]]]] = field(default_factory=dict)
    failed: dict[Candidate, str] = field(default_factory=dict)
    timings: int = 0
    finalists: list[Candidate] = field(default_factory=list)

    def run(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Times them in rounds; returns those of the last round, fastest first."""
        left = list(candidates)
        for number, (share, pairs) in enumerate(ROUNDS):
            units = self.bench.units if share == 1 else self.bench.some(share)
            if len(left) <= _FEWEST and number + 1 < len(ROUNDS):
                continue  # nobody would go
            for pair in range(pairs):
                for position, unit in enumerate(units):
                    self._time_unit(left, unit, pair + position)
            left = [candidate for candidate in left if candidate not in self.failed]
            left.sort(key=lambda candidate: -self.gain(candidate).value)
            if number + 1 < len(ROUNDS):
                left = left[: max(_FEWEST, len(left) // 2)]
        self.finalists = left
        return left

    def gain(self, candidate: Candidate) -> Ratio:
        """Speed-up over plain decoding with its interval, over all that was timed."""
        found = self.seconds[candidate]
        units = sorted(found)
        records = [self.bench.units[unit].record for unit in units]
        return time_ratio(
            [[plain for plain, _ in found[unit]] for unit in units],
            [[own for _, own in found[unit]] for unit in units],
            [record.cluster for record in records],
            [record.category for record in records],
        )

    def _time_unit(self, candidates: Sequence[Candidate], unit: Unit, shift: int) -> None:
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

    def _once(self, candidate: Candidate, unit: Unit) -> float:
        arm = arm_of(candidate, self.bench.workbench)
        self.timings += 1
        start = self.clock()
        arm.run(unit)
        return self.clock() - start
