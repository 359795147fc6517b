"""Results of runs that never happened: every figure is planted, so that tests know the answer."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from specdec_bench.results.records import (
    CheckRecord,
    CurveRecord,
    EndRecord,
    Header,
    PassRecord,
    Results,
    SamplingRecord,
    Setting,
    TimeRecord,
    UnitRecord,
    ViewRecord,
    repeated_arm,
    to_json,
)

CATEGORIES = ("code", "maths", "prose")
STAGES = {"draft": 0.06, "forward": 0.72, "verify": 0.06, "commit": 0.05, "observe": 0.02}
PROVENANCE = {
    "specdec": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "device": "cpu",
    "threads": 1,
    "load": [1.2, 1.0, 0.9],
    "target": "demo",
    "target_sha256": "feed" * 16,
    "prompts_sha256": "beef" * 16,
    "git": "0123abc",
}


@dataclass(frozen=True)
class FakeArm:
    """How an arm behaves.

    Attributes:
        speed: How many times faster than the baseline it is.
        tau: Mean tokens per round; 0 for an arm that does not count rounds.
        wrong: Units whose text is wrong.
        near_tie: Units whose text is a near-tie.
        errors: Units whose first repeat fails.
        chain: Proposes chains.
        in_process: Has a CPU clock.
        sleep: Share of its time that it waits on top, without using the processor.
        own_texts: Its texts differ from plain's, and nobody compares them.
    """

    speed: float = 1.0
    tau: float = 1.0
    wrong: Sequence[int] = ()
    near_tie: Sequence[int] = ()
    errors: Sequence[int] = ()
    chain: bool = True
    in_process: bool = True
    sleep: float = 0.0
    own_texts: bool = False


ARMS: Mapping[str, FakeArm] = {
    "hf": FakeArm(0.93, 0),
    "loop0": FakeArm(),
    repeated_arm("loop0"): FakeArm(),
    "prompt_lookup": FakeArm(1.21, 1.5),
    "lookahead:window=3,ngram=3": FakeArm(1.05, 1.7, chain=False),
    "eagle3:depth=3,top_k=1": FakeArm(1.62, 2.6),
    "hf_prompt_lookup": FakeArm(0.88, 0),
}


@dataclass(frozen=True)
class Fake:
    """A run: see the defaults for a quiet one, in which nothing is wrong."""

    arms: Mapping[str, FakeArm] = field(default_factory=lambda: dict(ARMS))
    settings: Sequence[Setting] = (Setting(),)
    prompts: int = 12
    turns: int = 1
    pairs: int = 6
    noise: float = 0.03
    drift: float = 0.05
    seed: int = 0
    new_tokens: int = 64
    categories: Sequence[str] = CATEGORIES
    provenance: Mapping[str, Any] = field(default_factory=lambda: dict(PROVENANCE))
    token_seconds: float = 0.004
    text: str = "plain"

    def results(self) -> Results:
        """The run's records."""
        generator = np.random.default_rng(self.seed)
        # The same text is accepted in the same way whenever it is run.
        acceptance = np.random.default_rng(0)
        units: dict[tuple[int, str], UnitRecord] = {}
        times: list[TimeRecord] = []
        passes: dict[tuple[int, str, str], PassRecord] = {}
        checks: list[CheckRecord] = []
        for index, setting in enumerate(self.settings):
            for number in range(self.prompts * self.turns):
                unit = self._unit(index, setting, number)
                units[index, unit.unit] = unit
                for name, arm in self.arms.items():
                    if not arm.own_texts:
                        checks.append(_check(unit, number, name, arm))
                    passes[index, unit.unit, name] = self._pass(unit, name, arm, acceptance)
            times += self._times(index, [u for (s, _), u in units.items() if s == index], generator)
        curves = {
            (s.dtype, s.batch, 0): CurveRecord(
                s.dtype,
                s.batch,
                {str(q): self.token_seconds * (0.9 + 0.1 * q**0.8) for q in (1, 2, 4, 8, 16, 32)},
            )
            for s in self.settings
        }
        header = Header(
            "run" + str(self.seed),
            list(self.settings),
            list(self.arms),
            "loop0",
            {"tasks": ["smoke"], "pairs": self.pairs, "seed": 0},
            dict(self.provenance),
        )
        views = [
            ViewRecord(
                0,
                "prompt0/0",
                name,
                "def add(a, b):\n",
                [["    "], ["return", " a"], [" + ", "b", "\n"], ["<b>&amp;", "</script>"]],
            )
            for name in self.arms
        ]
        lines = 1 + len(units) + len(times) + len(passes) + len(checks) + len(curves) + len(views)
        end = EndRecord(lines, "pairs", sum(t.wall for t in times))
        return Results(header, units, times, passes, checks, curves, views, end)

    def _unit(self, setting_index: int, setting: Setting, number: int) -> UnitRecord:
        prompt, turn = divmod(number, self.turns)
        return UnitRecord(
            setting_index,
            f"prompt{prompt}/{turn}",
            f"prompt{prompt}",
            self.categories[prompt % len(self.categories)],
            0,
            [20 + prompt] * setting.batch,
            self.new_tokens + 4 * (prompt % 5),
            0.1 if prompt == 3 else 0.0,
            f"{self.text}-{setting_index}-{number}",
        )

    def _times(
        self, setting: int, units: Sequence[UnitRecord], generator: np.random.Generator
    ) -> list[TimeRecord]:
        found, level = [], 0.0
        for pair in range(self.pairs):
            for number, unit in enumerate(units):
                level += generator.normal(0, self.drift)
                for order, (name, arm) in enumerate(self.arms.items()):
                    error = "OutOfMemoryError" if pair == 0 and number in arm.errors else ""
                    seconds = unit.new_tokens * self.token_seconds / arm.speed
                    cpu = seconds * float(np.exp(generator.normal(0, self.noise / 3)))
                    wall = (
                        (1 + arm.sleep)
                        * seconds
                        * float(np.exp(level + generator.normal(0, self.noise)))
                    )
                    text = _text(unit, number, arm)
                    clock = cpu if arm.in_process else None
                    found.append(
                        TimeRecord(
                            setting, unit.unit, name, pair, order,
                            0.0 if error else wall, None if error else clock,
                            "" if error else text, error,
                        )
                    )  # fmt: skip
        return found

    def _pass(
        self, unit: UnitRecord, name: str, arm: FakeArm, generator: np.random.Generator
    ) -> PassRecord:
        batch = len(unit.prompt_tokens)
        seconds = unit.new_tokens * self.token_seconds / arm.speed
        first = seconds * 0.1
        if not arm.tau:
            gap = (seconds - first) / max(unit.new_tokens - 1, 1)
            gaps = [(1, gap)] * (unit.new_tokens - 1)
            return PassRecord(
                unit.setting, unit.unit, name, {}, 0, 0, False, {}, seconds, first, gaps, 1 << 20
            )
        histogram: Counter[int] = Counter()
        left = (unit.new_tokens - 1) * batch
        while left:
            drawn = 1 + int(generator.binomial(5, (arm.tau - 1) / 5))
            emitted = min(drawn, left)
            histogram[emitted] += 1
            left -= emitted
        rounds = -(-histogram.total() // batch)
        stages = {stage: share * (seconds - first) for stage, share in STAGES.items()}
        stages["prefill"] = first
        gap = (seconds - first) / rounds
        return PassRecord(
            unit.setting, unit.unit, name, {str(k): v for k, v in sorted(histogram.items())},
            rounds, 5 * histogram.total() if arm.tau > 1 else 0, arm.chain, stages, seconds, first,
            [(round(arm.tau), gap)] * rounds, 3 << 20, 0.01 * unit.tokens,
        )  # fmt: skip


def _text(unit: UnitRecord, number: int, arm: FakeArm) -> str:
    if arm.own_texts:
        return unit.text_sha256 + "-own"
    if number in arm.wrong:
        return unit.text_sha256 + "-wrong"
    if number in arm.near_tie:
        return unit.text_sha256 + "-near"
    return unit.text_sha256


def _check(unit: UnitRecord, number: int, name: str, arm: FakeArm) -> CheckRecord:
    text, total = _text(unit, number, arm), unit.tokens
    place = (unit.setting, unit.unit, name, text)
    if number in arm.wrong:
        return CheckRecord(*place, "wrong", {"exact": total - 3, "wrong": 3}, [0, 7], 41.5)
    if number in arm.near_tie:
        return CheckRecord(*place, "near_tie", {"exact": total - 1, "near_tie": 1}, [0, 9], 1.25)
    return CheckRecord(*place, "exact", {"exact": total})


def sampled(name: str, passed: bool) -> SamplingRecord:
    """A test of what an arm samples, in the first setting."""
    p_value = 0.4 if passed else 1e-9
    return SamplingRecord(0, name, 400, 5, p_value, 1e-5, 0.1, 0.1, 400, passed, passed)


def with_arm(fake: Fake, name: str, **changes: Any) -> Fake:
    """The run with an arm that behaves differently."""
    return replace(fake, arms={**fake.arms, name: replace(fake.arms[name], **changes)})


def write(results: Results, path: Path) -> Path:
    """The run as a file."""
    records = [
        results.header,
        *results.curves.values(),
        *results.units.values(),
        *results.checks,
        *results.times,
        *results.passes.values(),
        *results.views,
    ]
    if results.end is not None:
        records.append(results.end)
    path.write_text("".join(json.dumps(to_json(r)) + "\n" for r in records), encoding="utf-8")
    return path
