"""Whether a run is worse than an older one: by speed, by text, by acceptance.

Seconds of two processes on a shared machine differ by tens of percent with nothing changed. So an
arm's speed is taken relative to an arm that ran beside it in the same process, plain Hugging Face
generate by default, and these ratios are compared between the runs. What slows that arm and the
others alike cannot be seen so; `hf` runs none of specdec's loop, so what slows the loop is seen,
which a comparison with `loop0`, the loop without speculation, would hide.

Both clocks are looked at where processor time means something, and either can fail the gate: it is
steadier, so it shows smaller slowdowns, but it stands still while a program waits.

Both runs must have measured the same: target, prompts and settings. Where plain's own text of a
request differs between them, as after an update of torch, the two runs did different work, so the
request is left out, with a warning; and when fewer than half are left the comparison is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specdec.errors import ConfigError, SpecdecError
from specdec_bench.gate.options import GateOptions
from specdec_bench.results.records import PLAIN, Results, Setting, UnitRecord, repeated_arm
from specdec_bench.summary.intervals import Ratio, Repeats, ratio_of_time_ratios
from specdec_bench.summary.summarize import cpu_clock_means_something, noisy_clocks
from specdec_bench.summary.texts import texts_by_arm
from specdec_bench.summary.times import Timings, groups, paired_seconds

_TAU_TOLERANCE = 0.01  # a smaller drop costs less than any clock can show
_NARROWEST = 0.01  # half-width that no limit asks more than
_FEWEST_UNITS = 0.5  # share of the requests that must have the same text in both runs
_SHOULD_MATCH = ("device", "device_name", "threads", "packages", "attention")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm in one setting.

    Attributes:
        setting: Conditions.
        arm: Its name.
        speeds: New speed over old one, by clock ("wall", "cpu").
        tau: New tokens per round over old ones; None for arms that do not count rounds.
        failures: Why it fails; empty when it does not.
    """

    setting: Setting
    arm: str
    speeds: Mapping[str, Ratio]
    tau: Ratio | None
    failures: Sequence[str]


@dataclass(frozen=True)
class Judgement:
    """What the gate found.

    Attributes:
        reference: Arm that speeds are relative to; None for seconds.
        comparisons: Arms that could be compared.
        failures: Why the gate fails, those of the comparisons included; empty when it passes.
        warnings: What limits the comparison.
    """

    reference: str | None
    comparisons: Sequence[Comparison]
    failures: Sequence[str]
    warnings: Sequence[str]


def compare(base: Results, new: Results, options: GateOptions) -> Judgement:
    """Compares two finished runs.

    Args:
        base: The older run.
        new: The one to judge.
        options: Limits.

    Raises:
        ConfigError: An option is out of range or names an arm that is not in both.
        SpecdecError: The runs did not measure the same.
    """
    if not 0 <= options.max_slowdown < 1:
        raise ConfigError(f"--max-slowdown must be from 0 to below 1, got {options.max_slowdown}")
    warnings = _check_same_subject(base, new)
    reference = _reference(base, new, options)
    failures = _text_failures(new) + _sampling_failures(new)
    comparisons: list[Comparison] = []
    for setting in base.header.settings:
        pair = _SettingPair(base, new, setting, reference, options, warnings)
        comparisons += pair.comparisons(failures)
    if not comparisons and not failures:
        raise SpecdecError("no arm was timed in both runs, so there is nothing to compare")
    failures += [f"{one.arm}, {one.setting}: {why}" for one in comparisons for why in one.failures]
    return Judgement(reference, comparisons, failures, warnings)


def _check_same_subject(base: Results, new: Results) -> list[str]:
    """Refuses runs of different targets, prompts or settings; returns what is only suspicious."""
    old, now, warnings = base.header.provenance, new.header.provenance, []
    for name, what in (("target_sha256", "targets"), ("prompts_sha256", "prompts")):
        if old.get(name) != now.get(name):
            raise SpecdecError(
                f"the runs have different {what} ({name} {_short(old.get(name))} and "
                f"{_short(now.get(name))}); measure both with the same ones"
            )
        if not old.get(name):
            warnings.append(f"neither run says which {what} it had ({name})")
    if base.header.baseline != new.header.baseline:
        raise SpecdecError(
            f"the runs have different baselines: {base.header.baseline}, {new.header.baseline}"
        )
    different = set(map(_key, base.header.settings)) ^ set(map(_key, new.header.settings))
    if different:
        raise SpecdecError(
            "the runs have different settings, only one of them has "
            f"{'; '.join(sorted(str(Setting(*key)) for key in different))}; measure both with the "
            "same --dtypes, --batches, --temperatures and --prompt-tokens"
        )
    if base.header.run_id == new.header.run_id:
        warnings.append("both files hold the same run")
    for name in _SHOULD_MATCH:
        if old.get(name) != now.get(name):
            warnings.append(f"{name.replace('_', ' ')}: {old.get(name)} then, {now.get(name)} now")
    return warnings


def _key(setting: Setting) -> tuple[str, int, float, int | None]:
    return setting.dtype, setting.batch, setting.temperature, setting.prompt_tokens


def _short(value: object) -> str:
    return str(value)[:12] if value else "unknown"


def _reference(base: Results, new: Results, options: GateOptions) -> str | None:
    """The arm that speeds are relative to."""
    if options.absolute:
        if options.relative_to is not None:
            raise ConfigError("give --absolute or --relative-to, not both")
        return None
    common = [arm for arm in base.header.arms if arm in new.header.arms]
    if options.relative_to is not None:
        if options.relative_to not in common:
            raise ConfigError(
                f"--relative-to {options.relative_to} is not in both runs; they have "
                f"{', '.join(common)}"
            )
        return options.relative_to
    return PLAIN if PLAIN in common else base.header.baseline


def _text_failures(new: Results) -> list[str]:
    """Every wrong or unchecked text of the new run, also of arms that the old one has not."""
    found = []
    for index in sorted({setting for setting, _ in new.units}):
        for arm, texts in texts_by_arm(new, index).items():
            where = f"{arm}, {new.header.settings[index]}"
            if texts.wrong:
                many = f"{texts.units['wrong']} of {sum(texts.units.values())} requests"
                found.append(f"{where}: WRONG TEXT in {many}, first at {texts.first_wrong}")
            if texts.unchecked:
                found.append(f"{where}: a text differs from plain's, and nobody checked it")
    return found


def _sampling_failures(new: Results) -> list[str]:
    """Every arm of the new run that was seen to sample from another distribution."""
    return [
        f"{test.arm}, {new.header.settings[test.setting]}: WRONG DISTRIBUTION, p = "
        f"{test.p_value:.3g} over {test.samples} sampled texts, {test.same_text} equal to plain's"
        for test in new.sampling
        if not test.passed
    ]


class _SettingPair:
    """Two runs in one setting."""

    def __init__(
        self,
        base: Results,
        new: Results,
        setting: Setting,
        reference: str | None,
        options: GateOptions,
        warnings: list[str],
    ) -> None:
        self._runs = (base, new)
        self._setting, self._reference, self._options = setting, reference, options
        self._warnings = warnings
        self._blind: dict[str, list[str]] = {}
        keys = [list(map(_key, run.header.settings)) for run in self._runs]
        self._indices = [found.index(_key(setting)) for found in keys]
        self._units = self._common_units()
        clocks = [cpu_clock_means_something(run) for run in self._runs]
        if options.clock == "cpu" and not all(clocks):
            raise ConfigError("--clock cpu needs runs with one thread on a CPU; give --clock wall")
        wanted = {"auto": ("wall", "cpu"), "wall": ("wall",), "cpu": ("cpu",)}[options.clock]
        self._clocks = [clock for clock in wanted if clock == "wall" or all(clocks)]
        self._timings = [
            Timings(run, index, "cpu" in self._clocks)
            for run, index in zip(self._runs, self._indices, strict=True)
        ]

    def comparisons(self, failures: list[str]) -> list[Comparison]:
        """Every arm that both runs timed; adds to the failures those that only the old one did."""
        base, new = self._runs
        skipped = {self._reference, repeated_arm(base.header.baseline)}
        if not self._units:
            self._warn("no request of this setting could be measured in either run")
            return []
        self._warn_about_noise()
        old = texts_by_arm(base, self._indices[0])
        if self._reference and (old[self._reference].wrong or old[self._reference].unchecked):
            raise SpecdecError(
                f"in {self._setting}, the old run's text of {self._reference} is wrong, so nothing "
                "can be relative to it; choose another with --relative-to, or measure BASE again"
            )
        found = []
        for arm in base.header.arms:
            if arm == self._reference:
                self._compare_errors(arm, failures)
            if arm in skipped:
                continue
            if arm not in new.header.arms:
                self._missing(f"{arm} is not in the new run, and was not compared", failures)
                continue
            if old[arm].wrong or old[arm].unchecked:
                self._warn(f"the old text of {arm} is wrong, so its speed was not compared")
                continue
            compared = self._comparison(arm, failures)
            if compared is not None:
                found.append(compared)
        for clock, arms in self._blind.items():
            self._warn(
                f"intervals by {clock} time are too wide to show a slowdown of "
                f"{self._options.max_slowdown:.1%} of {', '.join(arms)}; measure more pairs"
            )
        return found

    def _comparison(self, arm: str, failures: list[str]) -> Comparison | None:
        units = self._timed_units(arm)
        self._compare_errors(arm, failures)
        if not units:
            if self._timings[0].repeats(arm) and not self._timings[1].repeats(arm):
                failures.append(f"{arm}, {self._setting}: no answer of it could be timed any more")
            else:
                self._warn(f"{arm} has no request that both runs timed, and was not compared")
            return None
        speeds, tau = self._speeds(arm, units), self._tau(arm)
        limit = 1 - self._options.max_slowdown
        reasons = [
            f"speed by {clock} time fell to {speed} of what it was, below {limit:.3f}"
            for clock, speed in speeds.items()
            if speed.high < limit
        ]
        for clock, speed in speeds.items():
            if speed.half_width > max(self._options.max_slowdown, _NARROWEST):
                self._blind.setdefault(clock, []).append(arm)
        if tau is not None and tau.high < 1 - _TAU_TOLERANCE:
            reasons.append(f"tokens per round fell to {tau} of what they were")
        elif tau is not None and tau.over == "nothing" and tau.value < 1 - _TAU_TOLERANCE:
            self._warn(f"{arm}: tokens per round fell to {tau}; measure more prompts")
        return Comparison(self._setting, arm, speeds, tau, reasons)

    def _common_units(self) -> list[UnitRecord]:
        """Requests of the same work in both runs, as the new one has them."""
        old, now = (
            {name: unit for (s, name), unit in run.units.items() if s == index}
            for run, index in zip(self._runs, self._indices, strict=True)
        )
        if not old and not now:
            return []
        if set(old) != set(now):
            odd = sorted(set(old) ^ set(now))
            self._warn(f"{len(odd)} requests are in one run only ({odd[0]} is one); left out")
        common = [unit for name, unit in now.items() if name in old]
        same = [unit for unit in common if _work(unit) == _work(old[unit.unit])]
        if len(same) < len(common):
            self._warn(
                f"plain's own text differs in {len(common) - len(same)} of {len(common)} requests; "
                "left out"
            )
        if len(same) < _FEWEST_UNITS * max(len(old), len(now)):
            raise SpecdecError(
                f"in {self._setting}, only {len(same)} of {max(len(old), len(now))} requests are "
                "the same work in both runs; measure BASE again with what NEW was measured with"
            )
        return same

    def _timed_units(self, arm: str) -> list[UnitRecord]:
        """Those in which both runs have repeats with the arm and the reference."""
        kept = self._units
        for timings in self._timings:
            rows = timings.repeats(arm)
            others = timings.repeats(self._reference) if self._reference else rows
            kept = [u for u in kept if set(rows.get(u.unit, {})) & set(others.get(u.unit, {}))]
        return kept

    def _speeds(self, arm: str, units: Sequence[UnitRecord]) -> Mapping[str, Ratio]:
        """New speed over old one, by each clock that every row has."""
        found = {}
        for clock in self._clocks:
            base, new = (self._seconds(timings, arm, units, clock) for timings in self._timings)
            seconds = [s for run in (base, new) for side in run for unit in side for s in unit]
            if all(s > 0 for s in seconds):  # NaN is not
                found[clock] = ratio_of_time_ratios(new, base, *groups(units))
        if not found:
            raise SpecdecError(
                f"{arm} in {self._setting} has timings without {' or '.join(self._clocks)} seconds"
            )
        return found

    def _seconds(
        self, timings: Timings, arm: str, units: Sequence[UnitRecord], clock: str
    ) -> tuple[Repeats, Repeats]:
        rows = timings.repeats(arm)
        reference = timings.repeats(self._reference) if self._reference else rows
        above, below = paired_seconds(reference, rows, units, clock)
        if self._reference is None:
            above = [[1.0] * len(unit) for unit in below]
        return above, below

    def _tau(self, arm: str) -> Ratio | None:
        """New tokens per round over old ones, over requests whose rounds both runs counted."""
        base, new = (
            {
                unit.unit: _counts(run.passes[index, unit.unit, arm].histogram)
                for unit in self._units
                if (index, unit.unit, arm) in run.passes
                and run.passes[index, unit.unit, arm].histogram
            }
            for run, index in zip(self._runs, self._indices, strict=True)
        )
        units = [unit for unit in self._units if unit.unit in base and unit.unit in new]
        if not units:
            return None
        sides = [
            tuple([[counted[unit.unit][part]] for unit in units] for part in (0, 1))
            for counted in (new, base)
        ]
        return ratio_of_time_ratios(
            (sides[0][0], sides[0][1]), (sides[1][0], sides[1][1]), *groups(units)
        )

    def _warn_about_noise(self) -> None:
        baseline = self._runs[0].header.baseline
        for name, timings in zip(("old", "new"), self._timings, strict=True):
            again = repeated_arm(baseline)
            gain = timings.gain(baseline, again) if timings.in_common(baseline, again) else None
            for clock in noisy_clocks(gain):
                if clock in self._clocks:
                    self._warn(f"the {name} run was too noisy by its own A/A row, {clock} time")

    def _compare_errors(self, arm: str, failures: list[str]) -> None:
        """By request, for the runs may have repeated them differently often."""
        old, now = (
            {r.unit for r in run.times if r.setting == index and r.arm == arm and r.error}
            for run, index in zip(self._runs, self._indices, strict=True)
        )
        if len(now) > len(old):
            words = f"{arm} fails on {len(now)} requests, and failed on {len(old)} in the old run"
            self._missing(words, failures)

    def _missing(self, words: str, failures: list[str]) -> None:
        """What is not there cannot be slow: it fails, unless that is allowed."""
        if self._options.allow_missing:
            self._warn(words)
        else:
            failures.append(f"{self._setting}: {words}; --allow-missing would let it pass")

    def _warn(self, words: str) -> None:
        self._warnings.append(f"{self._setting}: {words}")


def _work(unit: UnitRecord) -> tuple[object, ...]:
    """What an arm had to do."""
    return unit.text_sha256, tuple(unit.prompt_tokens), unit.new_tokens, unit.cluster, unit.category


def _counts(histogram: Mapping[str, int]) -> tuple[float, float]:
    """Tokens and rounds."""
    tokens = sum(int(emitted) * times for emitted, times in histogram.items())
    return float(tokens), float(sum(histogram.values()))
