"""What the tuner measures: passes that count and time single rounds, and what they predict."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from specdec.cost.predict import RoundCosts, predict
from specdec.stats import RoundRecord
from specdec_bench.arm_names import ArmSpec
from specdec_bench.contracts import Unit, Workbench
from specdec_bench.measure.arms import GenerateArm
from specdec_bench.measure.units import SHORTEST
from specdec_bench.results.records import CurveRecord
from specdec_bench.summary.passes import cost_curve
from specdec_bench.tune.grid import Candidate

PLAIN = Candidate("none")
"""Our loop without speculation: what speed-ups are relative to."""

_PARTS = 3
_TRIED_DIVISIONS = 500
_STAGES = ("draft", "forward", "verify", "commit", "observe")


@dataclass
class Rounds:
    """Rounds of one candidate on some units, measured or simulated.

    Attributes:
        sizes: Tokens a row of each forward.
        tokens: Emitted tokens of each row and round.
        stages: Stage -> seconds of each round.
        prefill: Seconds until the first token, over the units.
    """

    sizes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    prefill: float = 0.0

    @property
    def tau(self) -> float:
        """Tokens a row and round."""
        return sum(self.tokens) / max(len(self.tokens), 1)

    @property
    def nodes(self) -> float:
        """Mean number of tokens of a forward besides the root."""
        return sum(self.sizes) / max(len(self.sizes), 1) - 1

    def typical(self, stage: str) -> float:
        """Median seconds of a round: one hiccup of the machine does not count."""
        return statistics.median(self.stages.get(stage) or [0.0])

    def add(self, other: Rounds) -> None:
        """Joins the rounds of other units."""
        self.sizes += other.sizes
        self.tokens += other.tokens
        self.prefill += other.prefill
        for stage, seconds in other.stages.items():
            self.stages.setdefault(stage, []).extend(seconds)

    def costs(self, stages: Mapping[str, float] | None = None) -> RoundCosts:
        """For `predict`; `stages` replaces the seconds that a round typically takes."""
        rounds = len(self.sizes)
        found = {stage: self.typical(stage) for stage in _STAGES} | dict(stages or {})
        totals = {stage: seconds * rounds for stage, seconds in found.items()}
        return RoundCosts(rounds, self.prefill, totals, Counter(self.sizes))


@dataclass
class Bench:
    """What all parts of one tuning share.

    Attributes:
        workbench: Model and drafts; the setting is greedy.
        units: Prompts with plain's texts.
        curve: t(q) at the setting's batch size.
        passes: Instrumented passes so far, over units: the cost of tuning.
        plain: Rounds without speculation, by unit.
        text_rounds: By unit, the rounds that drafts from the text alone need.
    """

    workbench: Workbench
    units: Sequence[Unit]
    curve: CurveRecord
    passes: float = 0.0
    plain: list[Rounds] = field(default_factory=list)
    text_rounds: list[list[int]] = field(default_factory=list)
    _parts: list[list[int]] = field(default_factory=list)

    @property
    def on_device(self) -> bool:
        """Whether the model is not on the CPU."""
        return bool(self.workbench.model.device.type != "cpu")

    def measure_plain(self) -> None:
        """Runs the loop without speculation on the beginning of every unit.

        One round of it is like the next, and how many there are is known.
        """
        self.run(PLAIN, [beginning(self.units[0], SHORTEST)])  # warms up
        self.plain = []
        for unit in self.units:
            seen = self.run(PLAIN, [beginning(unit, SHORTEST)])
            rounds = unit.record.new_tokens - 1
            tokens = [1] * (rounds * len(unit.text_ids))
            self.plain.append(Rounds([1] * rounds, tokens, seen.stages, seen.prefill))

    def run(self, candidate: Candidate, units: Sequence[Unit]) -> Rounds:
        """One instrumented pass over some units.

        Raises:
            SpecdecError: The candidate cannot run on this target.
        """
        arm = arm_of(candidate, self.workbench)
        found = Rounds()
        for unit in units:
            watch = _Watch()
            arm.answer(unit, on_round=watch)
            found.add(watch.rounds)
            self.passes += 1
        return found

    def paced(self, rounds: Rounds) -> dict[str, float]:
        """Typical seconds by stage of a real pass, at the pace at which plain was measured.

        A busy machine slows a whole pass, and what its forwards should have taken is known.
        """
        found = {stage: rounds.typical(stage) for stage in _STAGES}
        forward = ("forward", "verify") if self.on_device else ("forward",)  # as in `predict`
        taken = sum(found[stage] for stage in forward)
        if not self.curve.seconds or not taken:
            return found
        plain = self.baseline(self.units)
        due = sum(plain.typical(stage) for stage in forward)
        due *= rounds.costs().relative_forward(cost_curve(self.curve))
        return {stage: seconds * due / taken for stage, seconds in found.items()}

    def baseline(self, units: Sequence[Unit]) -> Rounds:
        """Rounds without speculation on some units."""
        found = Rounds()
        for unit in units:
            found.add(self.plain[self.units.index(unit)])
        return found

    def predict(
        self, rounds: Rounds, units: Sequence[Unit], stages: Mapping[str, float] | None = None
    ) -> float | None:
        """Speed-up over plain on these units that the rounds let expect."""
        plain = self.baseline(units)
        arm = rounds.costs(stages)
        # The prompt is read once in either case; how long that took has nothing to do with rounds.
        arm = RoundCosts(arm.rounds, plain.prefill, arm.stages, arm.sizes)
        if not self.curve.seconds:  # nothing to look up: the forwards took what they took
            whole, own = (sum(found.stages.values()) for found in (plain.costs(), arm))
            return (plain.prefill + whole) / (plain.prefill + own) if arm.rounds else None
        return predict(arm, plain.costs(), cost_curve(self.curve), self.on_device)

    def part(self, number: int) -> Sequence[Unit]:
        """One of three parts of the units, each like all of them and of two units at least.

        Prompts differ by far more than candidates do. So of many ways to divide them it is the one
        in which drafts from the text alone are right as often in every part as on all units. Parts
        overlap only where units are few.
        """
        if not self._parts:
            self._parts = self._divide()
        return [self.units[place] for place in self._parts[number]]

    def _divide(self) -> list[list[int]]:
        rounds = [[float(rounds) for rounds in own] for own in zip(*self.text_rounds, strict=True)]
        tokens = [float(unit.record.new_tokens) for unit in self.units]
        whole = [sum(own) / sum(tokens) for own in rounds]

        def apart(places: Sequence[int]) -> float:
            length = sum(tokens[place] for place in places)
            shares = [sum(own[place] for place in places) / length for own in rounds]
            return sum(abs(math.log(a / b)) for a, b in zip(shares, whole, strict=True))

        generator, best = random.Random(0), (math.inf, [list(range(len(tokens)))] * _PARTS)
        for _ in range(_TRIED_DIVISIONS):
            parts = _dealt(generator.sample(range(len(tokens)), len(tokens)))
            best = min(best, (sum(map(apart, parts)), parts))
        return best[1]


def _dealt(places: Sequence[int]) -> list[list[int]]:
    """Parts of a third of the places, the last with what is left; dealt out again if too few."""
    count = len(places)
    size = min(max(2, count // _PARTS), count)
    starts = range(0, _PARTS * size, size)
    parts = [sorted(places[at % count] for at in range(start, start + size)) for start in starts]
    parts[-1] = sorted([*parts[-1], *places[_PARTS * size :]])
    return parts


def beginning(unit: Unit, new_tokens: int) -> Unit:
    """The unit with so many tokens of its text: enough to see what a round costs."""
    if unit.record.new_tokens <= new_tokens:
        return unit
    record = replace(unit.record, new_tokens=new_tokens)
    return replace(unit, record=record, text_ids=[row[:new_tokens] for row in unit.text_ids])


def arm_of(candidate: Candidate, workbench: Workbench) -> GenerateArm:
    """The candidate as an arm."""
    return GenerateArm(ArmSpec(str(candidate), candidate.method, candidate.mapping), workbench)


class _Watch:
    """Collects the rounds of one answer."""

    def __init__(self) -> None:
        self.rounds = Rounds()
        self._start = time.perf_counter()

    def __call__(self, record: RoundRecord) -> None:
        if record.index == 0:
            self.rounds.prefill = time.perf_counter() - self._start
            return
        self.rounds.sizes.append(record.nodes)
        self.rounds.tokens += [len(row) for row in record.tokens if row]
        for stage, seconds in record.seconds.items():
            self.rounds.stages.setdefault(stage, []).append(seconds)
