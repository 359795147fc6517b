"""Times the few candidates that are left: interleaved with plain decoding, fewer every time."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.errors import SpecdecError
from specdec.hf.compat import input_device
from specdec_bench.contracts import Unit
from specdec_bench.measure.measuring import timed
from specdec_bench.summary.intervals import Ratio, time_ratio
from specdec_bench.tune.grid import Candidate
from specdec_bench.tune.measured import PLAIN, Bench, arm_of

ROUNDS: Sequence[tuple[int | None, int]] = ((1, 1), (2, 1), (None, 2))
"""(part of the units, or all; pairs) of every round. What was looked into by real answers were
those of part 0: a candidate that was lucky there, or in one round, needs no such luck in the
next."""

_FINALISTS = 2  # candidates of the last round; the same share goes after every one before


Repeats = dict[int, list[tuple[float, float]]]
"""Unit -> (plain's seconds, own seconds) of each repeat."""


@dataclass
class Race:
    """Seconds of candidates, by unit.

    Attributes:
        bench: Model and units.
        by_cpu: Processor time counts: one thread of a CPU does all the work.
        seconds: Candidate -> unit -> its repeats; every answer has a plain one beside it, which
            all candidates of the repeat share.
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
        gc.collect()  # what is left of the search, which is no candidate's
        share = (_FINALISTS / max(len(left), _FINALISTS)) ** (1 / max(len(ROUNDS) - 1, 1))
        stay = float(len(left))
        for number, (part, pairs) in enumerate(ROUNDS):
            is_last = number + 1 == len(ROUNDS)
            units = self.bench.units if part is None else self.bench.part(part)
            if len(left) <= _FINALISTS and not is_last:
                continue  # nobody would go
            self.time(left, units, pairs, is_last)
            left = [candidate for candidate in left if candidate not in self.failed]
            gain = self.final_gain if is_last else self.gain
            left = sorted(left, key=lambda candidate: -gain(candidate).value)
            if not is_last:
                stay *= share
                left = left[: round(stay)]
        self.finalists = left
        return left

    def time(
        self,
        candidates: Sequence[Candidate],
        units: Sequence[Unit],
        pairs: int,
        is_last: bool = False,
    ) -> None:
        """Times all of them on these units; what cannot run is noted in `failed`."""
        for pair in range(pairs):
            for position, unit in enumerate(units):
                left = [candidate for candidate in candidates if candidate not in self.failed]
                self._time_unit(left, unit, pair + position, is_last)

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
        """One answer of each and a plain one, in turning order: a drift hits all alike."""
        arms = [PLAIN, *candidates]
        at, found = shift % len(arms), {}
        for arm in [*arms[at:], *arms[:at]]:
            try:
                if arm not in self.seconds and arm != PLAIN:
                    self._once(arm, unit)  # warms up
                    self.seconds[arm] = {}
                found[arm] = self._once(arm, unit)
            except SpecdecError as problem:
                if arm == PLAIN:
                    raise
                self.failed[arm] = str(problem)
        index, plain = self.bench.units.index(unit), found.pop(PLAIN)
        for candidate, own in found.items():
            self.seconds[candidate].setdefault(index, []).append((plain, own))
            if is_last:
                self.final.setdefault(candidate, {}).setdefault(index, []).append((plain, own))

    def _once(self, candidate: Candidate, unit: Unit) -> float:
        arm = arm_of(candidate, self.bench.workbench)
        self.timings += 1
        _, seconds = timed(lambda: arm.run(unit), input_device(self.bench.workbench.model))
        return seconds.cpu if self.by_cpu else seconds.wall
