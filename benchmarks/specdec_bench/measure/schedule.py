"""In which order arms take their turns, and when enough has been measured."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from specdec_bench.results.records import TimeRecord, UnitRecord
from specdec_bench.summary.intervals import time_ratio

_FIRST_PAIRS = 2
"""Repeats before an interval is believed."""
_RESAMPLES = 500  # drawn after every repeat, and of all repeats


def order(arms: int, pair: int, unit: int) -> list[int]:
    """Who is timed when, in one repeat of one unit: a permutation of the arms' numbers.

    Rows of a Williams square, in which every arm follows every other about equally often, so that
    what one arm leaves in the caches is shared out. Each unit begins with another row, and every
    second repeat runs the row of the first backwards (ABBA), so that a steady drift cancels out.

    Args:
        arms: How many there are.
        pair: Number of the repeat.
        unit: Number of the unit.
    """
    zigzag = [(-(at // 2) if at % 2 == 0 else at // 2 + 1) % arms for at in range(arms)]
    row = [(arm + unit + pair // 2) % arms for arm in zigzag]
    return row[::-1] if pair % 2 else row


@dataclass
class Stopping:
    """Decides when the timing of a setting ends: between repeats, so that all units have as many.

    Attributes:
        pairs: Repeats at most.
        seconds: For this setting, from now on; 0 for no limit.
        until_ci: Half-width, relative, that the interval of every arm is wanted to be below when
            the repeats are drawn again and the prompts are kept; 0 for none. How far prompts lie
            apart no repeat can narrow.
    """

    pairs: int
    seconds: float = 0.0
    until_ci: float = 0.0
    _start: float = field(default_factory=time.perf_counter, init=False)
    _last: float = field(default=0.0, init=False)
    _slowest: float = field(default=0.0, init=False)

    def reason(self, done: int, times: Timings) -> str:
        """Why timing ends after `done` repeats, or an empty text."""
        now = time.perf_counter() - self._start
        if self._last:
            self._slowest = max(self._slowest, now - self._last)
        self._last = now
        if done >= self.pairs:
            return "pairs"
        if self.until_ci and done >= _FIRST_PAIRS and times.widest() < self.until_ci:
            return "until-ci"
        if self.seconds and done and now + self._slowest > self.seconds:
            return "time-budget"
        return ""


class Timings:
    """The timed answers of one setting.

    Args:
        units: Of the setting.
        baseline: The arm that ratios are relative to.
        by_cpu: Processor time is the steadier clock: one thread on a CPU.
    """

    def __init__(self, units: Iterable[UnitRecord], baseline: str, by_cpu: bool) -> None:
        self._units = {unit.unit: unit for unit in units}
        self._baseline, self._by_cpu = baseline, by_cpu
        self._seconds: dict[str, dict[str, dict[int, float]]] = {}
        self._done: set[tuple[str, str, int]] = set()
        self._failed: set[tuple[str, str]] = set()

    def add(self, record: TimeRecord) -> None:
        """Takes a timed answer, or an error."""
        self._done.add((record.unit, record.arm, record.pair))
        if record.error:
            self._failed.add((record.unit, record.arm))
            return
        seconds = record.cpu if self._by_cpu and record.cpu is not None else record.wall
        by_unit = self._seconds.setdefault(record.arm, {})
        by_unit.setdefault(record.unit, {})[record.pair] = seconds

    @property
    def begun(self) -> int:
        """Repeats of which something was timed."""
        return 1 + max((pair for _, _, pair in self._done), default=-1)

    def is_done(self, unit: str, arm: str, pair: int) -> bool:
        """Whether there is nothing to time: it was, or it failed before."""
        return (unit, arm, pair) in self._done or (unit, arm) in self._failed

    def has_failed(self, unit: str, arm: str) -> bool:
        """Whether an arm failed on a unit."""
        return (unit, arm) in self._failed

    def widest(self, over_prompts: bool = False) -> float:
        """Largest half-width of all arms' speed-ups, relative; infinite without any.

        Args:
            over_prompts: Of the intervals over prompts, as tables show them; else of those over
                repeats of these prompts, which alone become narrower with more repeats.
        """
        arms = (arm for arm in self._seconds if arm != self._baseline)
        widths = (self._half_width(arm, over_prompts) for arm in arms)
        return max((width for width in widths if width is not None), default=float("inf"))

    def _half_width(self, arm: str, over_prompts: bool) -> float | None:
        """None for an arm that fails everywhere: waiting does not help it."""
        above, below = self._seconds.get(self._baseline, {}), self._seconds[arm]
        kept = [
            unit
            for name, unit in self._units.items()
            if name in above
            and name in below
            and not self.has_failed(name, arm)
            and not self.has_failed(name, self._baseline)
        ]
        if not kept:
            return None
        pairs = [_common(above[unit.unit], below[unit.unit]) for unit in kept]
        # Of a single cluster there is nothing to draw but its repeats.
        return time_ratio(
            [seconds for seconds, _ in pairs],
            [seconds for _, seconds in pairs],
            [unit.cluster if over_prompts else "" for unit in kept],
            [unit.category if over_prompts else "" for unit in kept],
            _RESAMPLES,
        ).half_width


def _common(
    above: Mapping[int, float], below: Mapping[int, float]
) -> tuple[Sequence[float], Sequence[float]]:
    """Seconds of the repeats that both have."""
    both = sorted(set(above) & set(below))
    return [above[pair] for pair in both], [below[pair] for pair in both]
