"""What a run found: the figures that tables, report and gate show. Made by `summary.summarize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from specdec_bench.results.records import (
    CurveRecord,
    EndRecord,
    Header,
    SamplingRecord,
    Setting,
    SkippedRecord,
    ViewRecord,
)
from specdec_bench.results.values import Verdict
from specdec_bench.summary.intervals import Ratio

if TYPE_CHECKING:
    from specdec_bench.summary.acceptance import Acceptance

STAGES = ("draft", "verify", "accept", "commit", "host")
"""Stages of a round as readers know them, in the order of the charts. Verify is the target's
forward; host is what drafters note after a round, and what no timer saw."""
RECORDED_AS = {"draft": "draft", "verify": "forward", "accept": "verify", "commit": "commit"}
"""Stage -> its name in the records, which is the loop's own; host is the rest."""


@dataclass(frozen=True, slots=True)
class Gain:
    """How many times faster one arm is than another.

    Attributes:
        wall: By wall time over all units: the time saved.
        cpu: The same by processor time; None unless the run had a single thread on a CPU, and both
            arms ran in its process.
        geometric: Geometric mean of the units' wall ratios.
        units: Units with timings of both arms.
    """

    wall: Ratio
    cpu: Ratio | None
    geometric: Ratio
    units: int

    def steadier(self) -> Ratio:
        """By processor time where there is one: other programs disturb it less."""
        return self.cpu or self.wall


@dataclass(frozen=True, slots=True)
class Texts:
    """How an arm's texts compare with plain's.

    Attributes:
        units: Units by the worst verdict on any of their texts; "unchecked" has differing texts
            that nobody looked at, "not_promised" those of an arm that keeps the law only.
        tokens: Tokens by verdict over the texts that were checked.
        first_wrong: Unit, row and position of the first wrong text.
        worst_ratio: Largest regret over rounding noise; the rule allows 2.
    """

    units: Mapping[Verdict | str, int]
    tokens: Mapping[str, int]
    first_wrong: str = ""
    worst_ratio: float | None = None

    @property
    def wrong(self) -> bool:
        """Whether any text is wrong."""
        return bool(self.units.get("wrong"))

    @property
    def unchecked(self) -> bool:
        """Whether any differing text was not looked at."""
        return bool(self.units.get("unchecked"))


@dataclass(frozen=True, slots=True)
class Latency:
    """How an answer arrives, in an instrumented pass.

    Attributes:
        first_token: Median seconds until the first token.
        per_token: Seconds per output token of a row after the first: total over total.
        gaps: Seconds between bursts at the percentiles 50, 95 and 99; empty without bursts.
        burst: Mean tokens of a burst.
        largest_burst: Most tokens of a burst.
    """

    first_token: float
    per_token: float
    gaps: Mapping[int, float]
    burst: float
    largest_burst: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Where an arm's time goes, in an instrumented pass.

    Attributes:
        per_token: Seconds per emitted token after the first of each row, by stage; see `STAGES`.
        per_round: Seconds per round, by stage.
        prefill: Seconds until the first token, per answer.
        predicted: Speed-up over the baseline from t(q) and tau; None where it cannot be had.
        residual: Measured over predicted, minus 1; None without both.
    """

    per_token: Mapping[str, float]
    per_round: Mapping[str, float]
    prefill: float
    predicted: float | None = None
    residual: float | None = None


@dataclass(frozen=True, slots=True)
class CategoryFigures:
    """One arm on the prompts of one category.

    Attributes:
        category: Its name.
        prompts: Clusters.
        gain: Over the baseline; None where none may be shown.
        tau: Tokens per round; None for arms that do not count rounds.
    """

    category: str
    prompts: int
    gain: Gain | None
    tau: Ratio | None


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """One arm in one setting.

    Attributes:
        name: Of the arm.
        gain: Over the baseline; None where none may be shown.
        over_hf: Over plain Hugging Face generate; None likewise, or without that arm.
        no_gain: Why there is no gain; empty when there is one.
        texts: Checks.
        timings: Timed answers, errors among them.
        errors: Timed answers that failed.
        first_error: What the first of them said.
        tau: Tokens per row and round, over all rounds; None for arms that do not count rounds.
        tau_per_request: Mean over requests of their own tokens per round.
        acceptance: By position; None without rounds.
        costs: None where the loop was not instrumented.
        latency: None where no instrumented pass was made.
        peak_bytes: Most memory above that before an answer.
        joules_per_token: Energy.
        categories: The same by category, in the order of the units.
    """

    name: str
    gain: Gain | None
    over_hf: Gain | None
    no_gain: str
    texts: Texts
    timings: int
    errors: int
    first_error: str
    tau: Ratio | None
    tau_per_request: Ratio | None
    acceptance: Acceptance | None
    costs: Costs | None
    latency: Latency | None
    peak_bytes: int | None
    joules_per_token: float | None
    categories: Sequence[CategoryFigures]

    @property
    def wrong(self) -> bool:
        """Whether any of its texts is wrong; then no speed-up is shown in its setting."""
        return self.texts.wrong


@dataclass(frozen=True, slots=True)
class SettingFigures:
    """All arms in one setting.

    Attributes:
        index: Of the setting in the run.
        setting: Conditions.
        units: Requests.
        prompts: Clusters.
        tokens: Emitted tokens of an arm over all units.
        looping: Share of plain's text that was cut off because it repeated itself, by tokens.
        again: The baseline over itself (A/A); None if it was not run.
        loop_gain: The baseline over plain Hugging Face generate.
        noisy: Clocks ("wall", "cpu") whose A/A interval shows a machine too noisy to believe.
        arms: The others, in the order of the tables.
        skipped: Requests that became no unit, if the run says.
        wrong_texts: Arms with a wrong text, the repeated baseline among them, and their texts;
            unless it is empty, no speed-up of any arm is shown in this setting.
    """

    index: int
    setting: Setting
    units: int
    prompts: int
    tokens: int
    looping: float
    again: Gain | None
    loop_gain: Gain | None
    noisy: Sequence[str]
    arms: Sequence[ArmFigures]
    skipped: SkippedRecord | None = None
    wrong_texts: Mapping[str, Texts] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """Names of arms with a wrong text."""
        return list(self.wrong_texts)


@dataclass(frozen=True)
class Summary:
    """All of a run.

    Attributes:
        header: As in the file.
        settings: Figures by setting.
        curves: t(q).
        views: Answers as text.
        end: How the run ended; None for one that was cut off.
        has_cpu_clock: Whether processor time means anything: one thread, on a CPU.
        on_device: The target ran on a GPU or another accelerator.
        sampling: Tests of what arms sample, if they were made.
    """

    header: Header
    settings: Sequence[SettingFigures]
    curves: Sequence[CurveRecord]
    views: Sequence[ViewRecord]
    end: EndRecord | None
    has_cpu_clock: bool
    on_device: bool = False
    sampling: Sequence[SamplingRecord] = ()

    @property
    def wrong_sampling(self) -> list[SamplingRecord]:
        """Tests that failed: those arms have no speed-up in any setting."""
        return [test for test in self.sampling if not test.passed]

    @property
    def wrong(self) -> list[str]:
        """ "Arm in setting" of every wrong text."""
        return [f"{name} in {s.setting}" for s in self.settings for name in s.wrong]

    @property
    def noisy(self) -> list[str]:
        """ "Clock in setting" of every A/A row that is too far from 1 or too wide."""
        return [f"{clock} time in {s.setting}" for s in self.settings for clock in s.noisy]
