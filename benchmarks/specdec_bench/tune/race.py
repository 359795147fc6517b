"""Timed answers of candidates, each beside one that plain decoding gave in the same minute."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from specdec.errors import SpecdecError
from specdec.hf.compat import input_device
from specdec.stats import GenerationStats
from specdec_bench.arm_names import BASELINE, ArmSpec
from specdec_bench.contracts import Unit, Workbench
from specdec_bench.measure.arms import GenerateArm
from specdec_bench.measure.measuring import timed
from specdec_bench.measure.schedule import order
from specdec_bench.measure.units import SHORTEST
from specdec_bench.summary.intervals import Ratio, time_ratio

PLAIN = ArmSpec(BASELINE, "none")
"""Our loop without speculation: what speed-ups are relative to."""

_TOGETHER = 7  # candidates that share one of plain's answers
_EXACT = ("float32", "float64")


@dataclass
class Timed:
    """What is known of one candidate.

    Attributes:
        spec: Method and sizes.
        seconds: Unit -> (plain's seconds, own seconds) of its repeats.
        stats: Unit -> what its newest answer counted.
    """

    spec: ArmSpec
    seconds: dict[Unit, list[tuple[float, float]]] = field(default_factory=dict)
    stats: dict[Unit, GenerationStats] = field(default_factory=dict)

    @property
    def gain(self) -> Ratio:
        """Speed-up over plain decoding with its interval."""
        return time_ratio(
            [[plain for plain, _ in pairs] for pairs in self.seconds.values()],
            [[own for _, own in pairs] for pairs in self.seconds.values()],
            [unit.record.cluster for unit in self.seconds],
            [unit.record.category for unit in self.seconds],
        )

    def to_json(self) -> dict[str, Any]:
        """For tables: also tokens and drafted nodes a row and round, and the prompts answered."""
        histogram = sum((stats.histogram for stats in self.stats.values()), Counter[int]())
        rounds = max(histogram.total(), 1)
        gain, has_interval = self.gain, self.gain.over != "nothing"
        return {
            "method": self.spec.method,
            "options": self.spec.options,
            "tau": sum(tokens * times for tokens, times in histogram.items()) / rounds,
            "nodes": sum(stats.drafted_nodes for stats in self.stats.values()) / rounds,
            "prompts": len(self.seconds),
            "measured": [gain.value, *((gain.low, gain.high) if has_interval else ())],
        }


@dataclass
class Race:
    """Times candidates beside plain decoding.

    Attributes:
        workbench: Model and setting.
        failed: Name -> why it could not run; nobody in here is asked again.
        known: What was timed, by name.
    """

    workbench: Workbench
    failed: dict[str, str] = field(default_factory=dict)
    known: dict[str, Timed] = field(default_factory=dict)
    _warm: set[str] = field(default_factory=set)

    def run(self, specs: Sequence[ArmSpec], units: Sequence[Unit], repeats: int = 1) -> None:
        """Times all of them on these units; what cannot run is noted in `failed`."""
        gc.collect()  # clocks run without collections
        for pair in range(repeats):
            for place, unit in enumerate(units):
                shift = (pair * len(units) + place) * _TOGETHER // 2 % max(len(specs), 1)
                turned = [*specs[shift:], *specs[:shift]]
                for start in range(0, len(turned), _TOGETHER):
                    self._turn(turned[start : start + _TOGETHER], unit, pair)

    def ranked(self, specs: Sequence[ArmSpec]) -> list[Timed]:
        """Those of them that ran, fastest first.

        Of those that drafted the same on every unit, if that was more than one, the fastest only.
        """
        found = [self.known[spec.name] for spec in specs if spec.name in self.known]
        different: dict[object, Timed] = {}
        for one in sorted(found, key=lambda one: -one.gain.value):
            drafts = [(stats.rounds, stats.drafted_nodes) for stats in one.stats.values()]
            same = (one.spec.method, *drafts) if len(drafts) > 1 else one.spec.name
            different.setdefault(same, one)
        return list(different.values())

    def _turn(self, specs: Sequence[ArmSpec], unit: Unit, pair: int) -> None:
        """One answer of each, and a plain one: whatever slows one slows all."""
        arms, seconds = [PLAIN, *specs], {}
        for place in order(len(arms), pair, unit.index):
            spec = arms[place]
            if spec.name in self.failed:
                continue
            try:
                seconds[spec.name] = self._time(spec, unit)
            except Exception as problem:
                if spec is PLAIN:
                    raise
                self.failed[spec.name] = str(problem) or type(problem).__name__
                self.known.pop(spec.name, None)
        plain = seconds.pop(PLAIN.name)
        for name, own in seconds.items():
            self.known[name].seconds.setdefault(unit, []).append((plain, own))

    def _time(self, spec: ArmSpec, unit: Unit) -> float:
        arm = GenerateArm(spec, self.workbench)
        if spec.name not in self._warm:
            self._answer(arm, beginning(unit))
            self._warm.add(spec.name)
        seconds = self._answer(arm, unit)
        if spec is PLAIN:
            return seconds
        self.known.setdefault(spec.name, Timed(spec))
        if arm.stats is not None:
            self.known[spec.name].stats[unit] = arm.stats
        return seconds

    def _answer(self, arm: GenerateArm, unit: Unit) -> float:
        """Seconds of one answer whose text is plain's, where that is promised.

        Raises:
            SpecdecError: It is not, or the arm cannot run on this target.
        """
        device = input_device(self.workbench.model)
        rows, seconds = timed(lambda: arm.run(unit), device)
        if self.workbench.setting.dtype in _EXACT and rows != [list(row) for row in unit.text_ids]:
            where = f"prompt {unit.record.unit}"
            raise SpecdecError(
                f"{arm.spec.name} writes another text than plain decoding on {where}"
            )
        # With one thread of a CPU, other programs disturb processor time less.
        by_cpu = device.type == "cpu" and torch.get_num_threads() == 1
        return seconds.cpu if by_cpu else seconds.wall


def beginning(unit: Unit) -> Unit:
    """The unit with the first tokens of its text, as many as show that a candidate runs."""
    texts = [row[:SHORTEST] for row in unit.text_ids]
    return replace(unit, record=replace(unit.record, new_tokens=len(texts[0])), text_ids=texts)
