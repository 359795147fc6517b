"""From instrumented passes to acceptance, costs and latency of one arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specdec.cost.curve import CostCurve
from specdec.cost.predict import RoundCosts, predict
from specdec_bench.results.records import CurveRecord, PassRecord, UnitRecord
from specdec_bench.summary.acceptance import Acceptance, acceptance_of
from specdec_bench.summary.intervals import Ratio, mean_ratio_of_counts
from specdec_bench.summary.times import groups
from specdec_bench.summary.types import RECORDED_AS, Costs, Latency

_PERCENTILES = (50, 95, 99)
_LEAST_SECONDS = 1.0  # of energy; NVML's counter moves every tenth of a second or so


@dataclass(frozen=True)
class Passes:
    """The instrumented passes of one arm in one setting, beside their units.

    Attributes:
        units: Units that have a pass, in the order of the run.
        passes: Their passes.
    """

    units: Sequence[UnitRecord]
    passes: Sequence[PassRecord]

    def only(self, category: str) -> Passes:
        """Those of one category."""
        kept = [i for i, unit in enumerate(self.units) if unit.category == category]
        return Passes([self.units[i] for i in kept], [self.passes[i] for i in kept])

    def with_rounds(self) -> Passes:
        """Those whose rounds were counted."""
        kept = [i for i, found in enumerate(self.passes) if found.histogram]
        return Passes([self.units[i] for i in kept], [self.passes[i] for i in kept])

    def tau(self) -> Ratio | None:
        """Tokens per row and round over all rounds: per step."""
        counted = self.with_rounds()
        if not counted.units:
            return None
        tokens = [_tokens(found.histogram) for found in counted.passes]
        rounds = [sum(found.histogram.values()) for found in counted.passes]
        return mean_ratio_of_counts(tokens, rounds, *groups(counted.units))

    def tau_per_request(self) -> Ratio | None:
        """Mean over units of their own tokens per round; the rows of a batch count as one."""
        counted = self.with_rounds()
        if not counted.units:
            return None
        own = [_tokens(found.histogram) / sum(found.histogram.values()) for found in counted.passes]
        return mean_ratio_of_counts(own, [1.0] * len(own), *groups(counted.units))

    def acceptance(self) -> Acceptance | None:
        """By position, and what was drafted in vain."""
        counted = self.with_rounds()
        rows = [len(unit.prompt_tokens) for unit in counted.units]
        return acceptance_of(counted.passes, rows) if counted.units else None

    def latency(self) -> Latency | None:
        """How answers arrived."""
        if not self.passes:
            return None
        both = zip(self.units, self.passes, strict=True)
        later = sum(max(unit.new_tokens - found.first_tokens, 0) for unit, found in both)
        seconds = sum(found.seconds - found.first_token for found in self.passes)
        gaps = [gap for found in self.passes for _, gap in found.gaps]
        bursts = [tokens for found in self.passes for tokens, _ in found.gaps]
        at = np.percentile(gaps, _PERCENTILES).tolist() if gaps else []
        return Latency(
            float(np.median([found.first_token for found in self.passes])),
            seconds / max(later, 1),
            dict(zip(_PERCENTILES, at, strict=False)),
            sum(bursts) / max(len(bursts), 1),
            max(bursts, default=0),
        )

    def costs(
        self,
        baseline: Passes,
        curve: CurveRecord | None,
        on_device: bool,
        measured: float | None,
    ) -> Costs | None:
        """Where the time went, and what theory gives.

        Args:
            baseline: Passes of the baseline in the same setting.
            curve: t(q) of the setting's dtype and batch, if it was measured.
            on_device: Whether the target ran on a GPU.
            measured: Speed-up over the baseline, if it may be shown.
        """
        counted = self.with_rounds()
        rounds = sum(found.rounds for found in counted.passes)
        if not rounds or not any(found.stages for found in counted.passes):
            return None
        totals = {
            stage: sum(found.stages.get(name, 0.0) for found in counted.passes)
            for stage, name in RECORDED_AS.items()
        }
        prefill = sum(found.stages.get("prefill", 0.0) for found in counted.passes)
        timed = prefill + sum(totals.values())
        totals["host"] = max(sum(found.seconds for found in counted.passes) - timed, 0.0)
        emitted = sum(_tokens(found.histogram) for found in counted.passes)
        predicted = None if curve is None else self._predicted(baseline, curve, on_device)
        residual = measured / predicted - 1 if measured and predicted else None
        return Costs(
            {stage: seconds / emitted for stage, seconds in totals.items()},
            {stage: seconds / rounds for stage, seconds in totals.items()},
            sum(found.first_token for found in counted.passes) / len(counted.passes),
            predicted,
            residual,
        )

    def _predicted(self, baseline: Passes, curve: CurveRecord, on_device: bool) -> float | None:
        """Over the units that both have."""
        of_baseline = {u.unit: p for u, p in zip(baseline.units, baseline.passes, strict=True)}
        common = [
            (found, of_baseline[unit.unit])
            for unit, found in zip(self.units, self.passes, strict=True)
            if unit.unit in of_baseline
        ]
        own, other = ([pair[side] for pair in common] for side in (0, 1))
        return predict(round_costs(own), round_costs(other), cost_curve(curve), on_device)

    def peak_bytes(self) -> int | None:
        """Most memory above that before an answer."""
        return max((p.peak_bytes for p in self.passes if p.peak_bytes is not None), default=None)

    def joules_per_token(self) -> float | None:
        """Energy over emitted tokens; None for less than a second: counters are coarse."""
        read = [
            (found.joules, unit.tokens, found.seconds)
            for unit, found in zip(self.units, self.passes, strict=True)
            if found.joules is not None
        ]
        if not sum(seconds for _, _, seconds in read) >= _LEAST_SECONDS:
            return None
        return sum(joules for joules, _, _ in read) / sum(tokens for _, tokens, _ in read)


def round_costs(passes: Sequence[PassRecord]) -> RoundCosts:
    """The instrumented passes of one arm in one setting, summed over units."""
    stages, sizes = Counter[str](), Counter[int]()
    for found in passes:
        stages.update({k: v for k, v in found.stages.items() if k != "prefill"})
        sizes.update({int(q): count for q, count in found.sizes.items()})
    prefill = sum(found.first_token for found in passes)
    return RoundCosts(sum(found.rounds for found in passes), prefill, stages, sizes)


def cost_curve(record: CurveRecord) -> CostCurve:
    """The curve in a record, whose keys JSON made strings."""
    return CostCurve({int(q): seconds for q, seconds in record.seconds.items()})


def _tokens(histogram: Mapping[str, int]) -> int:
    return sum(int(tokens) * times for tokens, times in histogram.items())
