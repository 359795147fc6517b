"""From the records of a run to the figures that may be shown: the only place that decides which.

No speed-up of any arm leaves this module in a setting in which any arm's text is wrong; none for an
arm with a text that nobody checked, or that was seen to sample from another distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec_bench.results.records import (
    PLAIN,
    PassRecord,
    Results,
    TimeRecord,
    UnitRecord,
    repeated_arm,
)
from specdec_bench.summary.passes import Passes
from specdec_bench.summary.texts import texts_by_arm
from specdec_bench.summary.times import Timings
from specdec_bench.summary.types import (
    ArmFigures,
    CategoryFigures,
    Gain,
    SettingFigures,
    Summary,
    Texts,
)

_MOST_BIAS = 0.02  # of an A/A row: how far from 1 its interval may begin
_MOST_WIDTH = 0.05  # half of the interval


def summarize(results: Results) -> Summary:
    """Every figure of a run, each with its interval where it has one.

    Args:
        results: Of a finished run, or of one that goes on.
    """
    has_cpu_clock = cpu_clock_means_something(results)
    return Summary(
        results.header,
        [_Setting(results, index, has_cpu_clock).figures() for index in _measured(results)],
        [results.curves[key] for key in sorted(results.curves)],
        results.views,
        results.end,
        has_cpu_clock,
        runs_on_device(results),
        results.sampling,
    )


def cpu_clock_means_something(results: Results) -> bool:
    """Whether processor time is a measure of work: one thread on a CPU.

    Threads that wait spin, and a GPU's work is not on the processor's clock.
    """
    provenance = results.header.provenance
    return provenance.get("threads") == 1 and not runs_on_device(results)


def runs_on_device(results: Results) -> bool:
    """Whether the target ran on a GPU or another accelerator."""
    return not str(results.header.provenance.get("device", "cpu")).startswith("cpu")


def _measured(results: Results) -> list[int]:
    """Settings that have units."""
    return sorted({setting for setting, _ in results.units})


class _Setting:
    """What is known of one setting."""

    def __init__(self, results: Results, index: int, has_cpu_clock: bool) -> None:
        self._results, self._index = results, index
        self._units = [unit for (s, _), unit in results.units.items() if s == index]
        self._timings = Timings(results, index, has_cpu_clock)
        self._baseline = results.header.baseline
        arms = results.header.arms
        self._texts = texts_by_arm(results, index)
        self._wrong_texts = {arm: texts for arm, texts in self._texts.items() if texts.wrong}
        self._wrong_laws = {test.arm: test for test in results.sampling if not test.passed}
        self._timed: dict[str, list[TimeRecord]] = {arm: [] for arm in arms}
        for row in results.times:
            if row.setting == index:
                self._timed[row.arm].append(row)
        setting = results.header.settings[index]
        self._curve = results.curves.get((setting.dtype, setting.batch, setting.prompt_tokens or 0))
        self._passes = {arm: self._passes_of(arm) for arm in arms}

    def figures(self) -> SettingFigures:
        """All of it."""
        again = repeated_arm(self._baseline)
        # Not a speed-up but this machine's noise: it is shown unless it is of a wrong text itself.
        of_again = self._allowed_gain(self._baseline, again, is_noise=True)
        tokens = [unit.tokens for unit in self._units]
        # `looping` is the cut-off share of a text whose kept part has `tokens` tokens.
        whole = [
            count / (1 - min(unit.looping, 0.999))
            for count, unit in zip(tokens, self._units, strict=True)
        ]
        return SettingFigures(
            self._index,
            self._results.header.settings[self._index],
            len(self._units),
            len({unit.cluster for unit in self._units}),
            sum(tokens),
            1 - sum(tokens) / sum(whole) if sum(whole) else 0.0,
            of_again,
            self._allowed_gain(PLAIN, self._baseline),
            noisy_clocks(of_again),
            [self._arm(arm) for arm in self._results.header.arms if arm != again],
            self._results.skipped.get(self._index),
            self._wrong_texts,
        )

    def _arm(self, arm: str) -> ArmFigures:
        rows = self._timed[arm]
        errors = [row.error for row in rows if row.error]
        gain = None if arm == self._baseline else self._allowed_gain(self._baseline, arm)
        passes = self._passes[arm]
        measured = gain.steadier().value if gain else None
        return ArmFigures(
            arm,
            gain,
            None if arm == PLAIN else self._allowed_gain(PLAIN, arm),
            "" if gain or arm == self._baseline else self._why_no_gain(arm),
            self._texts[arm],
            len(rows),
            len(errors),
            errors[0] if errors else "",
            passes.tau(),
            passes.tau_per_request(),
            passes.acceptance(),
            passes.costs(
                self._passes[self._baseline], self._curve, runs_on_device(self._results), measured
            ),
            passes.latency(),
            passes.peak_bytes(),
            passes.joules_per_token(),
            self._categories(arm, gain is not None),
        )

    def _allowed_gain(self, slower: str, faster: str, is_noise: bool = False) -> Gain | None:
        if self._why_none(slower, faster) or (self._wrong_texts and not is_noise):
            return None
        return self._timings.gain(slower, faster)

    def _why_no_gain(self, arm: str) -> str:
        """Its own fault, or a wrong text of another arm."""
        own = self._why_none(self._baseline, arm)
        if own:
            return own
        if not self._wrong_texts:
            return ""
        name, texts = next(iter(self._wrong_texts.items()))
        return f"the text of {name} is {_fault(texts)}, so no speed-up is shown in this setting"

    def _why_none(self, slower: str, faster: str) -> str:
        """Why no speed-up of `faster` over `slower` may be shown; empty when it may."""
        baseline = self._texts.get(self._baseline)
        if baseline is not None and (baseline.wrong or baseline.unchecked):
            return f"the text of {self._baseline} is {_fault(baseline)}"
        for arm in (faster, slower):
            texts = self._texts.get(arm)
            if texts is None:
                return f"{arm} was not run"
            if texts.wrong or texts.unchecked:
                return f"the text of {arm} is {_fault(texts)}"
            if arm in self._wrong_laws:
                p_value = self._wrong_laws[arm].p_value
                return f"{arm} samples from another distribution than the target, p = {p_value:.3g}"
        if not self._timings.in_common(slower, faster):
            return f"no timed answer of both {slower} and {faster}"
        return ""

    def _categories(self, arm: str, shown: bool) -> Sequence[CategoryFigures]:
        found = []
        for category in dict.fromkeys(unit.category for unit in self._units):
            clusters = {unit.cluster for unit in self._units if unit.category == category}
            gain = self._timings.gain(self._baseline, arm, category) if shown else None
            tau = self._passes[arm].only(category).tau()
            found.append(CategoryFigures(category, len(clusters), gain, tau))
        return found

    def _passes_of(self, arm: str) -> Passes:
        units: list[UnitRecord] = []
        passes: list[PassRecord] = []
        for unit in self._units:
            found = self._results.passes.get((self._index, unit.unit, arm))
            if found is not None:
                units.append(unit)
                passes.append(found)
        return Passes(units, passes)


def noisy_clocks(again: Gain | None) -> list[str]:
    """Clocks on which the baseline over itself is too far from 1, or too uncertain.

    Args:
        again: The A/A row.
    """
    if again is None:
        return []
    clocks = {"wall": again.wall, "cpu": again.cpu}
    return [
        name
        for name, ratio in clocks.items()
        if ratio is not None
        and (ratio.excludes(1.0, by=_MOST_BIAS) or ratio.half_width > _MOST_WIDTH)
    ]


def _fault(texts: Texts) -> str:
    if texts.wrong:
        return f"wrong ({texts.first_wrong})" if texts.first_wrong else "wrong"
    return "not plain's, and was not checked"
