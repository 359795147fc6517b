"""From timed answers to gains: pairs the repeats of two arms and asks for their intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from specdec_bench.results.records import Results, TimeRecord, UnitRecord
from specdec_bench.summary.intervals import Ratio, geometric_mean_ratio, time_ratio
from specdec_bench.summary.types import Gain

Repeats = Mapping[int, TimeRecord]  # by pair


class Timings:
    """The valid timings of one setting.

    Attributes:
        has_cpu_clock: Whether processor time may be read.
    """

    def __init__(self, results: Results, setting: int, has_cpu_clock: bool) -> None:
        self.has_cpu_clock = has_cpu_clock
        self._units = {name: unit for (s, name), unit in results.units.items() if s == setting}
        self._rows: defaultdict[str, defaultdict[str, dict[int, TimeRecord]]]
        self._rows = defaultdict(lambda: defaultdict(dict))
        for row in results.times:
            if row.setting == setting and not row.error and row.unit in self._units:
                self._rows[row.arm][row.unit][row.pair] = row

    def gain(self, slower: str, faster: str, category: str | None = None) -> Gain | None:
        """How many times faster the second arm is; None without any pair of timings.

        Args:
            slower: Arm above the line, as the baseline.
            faster: Arm below the line.
            category: Only the units of this one.
        """
        above, below = self.repeats(slower), self.repeats(faster)
        units = [
            unit
            for name, unit in self._units.items()
            if category in (None, unit.category)
            and set(above.get(name, {})) & set(below.get(name, {}))
        ]
        if not units:
            return None
        wall = paired_seconds(above, below, units, "wall")
        cpu: Ratio | None = None
        if self.has_cpu_clock:
            seconds = paired_seconds(above, below, units, "cpu")
            if all(s > 0 for side in seconds for unit in side for s in unit):  # NaN is not, too
                cpu = time_ratio(*seconds, *groups(units))
        return Gain(
            time_ratio(*wall, *groups(units)),
            cpu,
            geometric_mean_ratio(*wall, *groups(units)),
            len(units),
        )

    def in_common(self, first: str, second: str) -> bool:
        """Whether any repeat of any unit has valid timings of both arms."""
        one, other = self.repeats(first), self.repeats(second)
        return any(set(rows) & set(other.get(unit, {})) for unit, rows in one.items())

    def repeats(self, arm: str) -> Mapping[str, Repeats]:
        """Valid timings of an arm, by unit and pair."""
        return self._rows.get(arm, {})


def groups(units: Sequence[UnitRecord]) -> tuple[list[str], list[str]]:
    """Clusters and strata of units, as the bootstrap takes them."""
    return [unit.cluster for unit in units], [unit.category for unit in units]


def paired_seconds(
    above: Mapping[str, Repeats],
    below: Mapping[str, Repeats],
    units: Iterable[UnitRecord],
    clock: str,
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of two arms by unit, over the repeats that both have, in the same order.

    Args:
        above: One arm's timings, by unit and pair.
        below: The other's.
        units: Units to take.
        clock: "wall" or "cpu"; NaN where a row has no such figure.
    """
    first, second = [], []
    for unit in units:
        one, other = above[unit.unit], below[unit.unit]
        common = sorted(set(one) & set(other))
        first.append([_seconds(one[pair], clock) for pair in common])
        second.append([_seconds(other[pair], clock) for pair in common])
    return first, second


def _seconds(row: TimeRecord, clock: str) -> float:
    value = row.wall if clock == "wall" else row.cpu
    return math.nan if value is None else value
