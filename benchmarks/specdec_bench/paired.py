"""Interleaved timing of several arms, and the ratio of their total times with an interval.

A shared machine drifts by tens of percent within minutes, so arms alternate within one process and
are compared by ratio only. The interval is a bootstrap over units (prompts).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of total times with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def time_arms(
    arms: Mapping[str, Callable[[int], object]],
    units: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[list[float]]]:
    """Seconds of every arm: per unit a list over repeats.

    Args:
        arms: Name -> function of the unit's index.
        units: Number of units (prompts).
        repeats: Timed rounds over all units; each starts with another arm.
        clock: Wall clock, or `time.process_time` on a single-threaded CPU run.
    """
    names = list(arms)
    seconds = {name: [[0.0] * repeats for _ in range(units)] for name in names}
    for unit in range(units):  # untimed: caches, allocator, lazy imports
        for name in names:
            arms[name](unit)
    for repeat in tqdm(range(repeats), desc="interleaved repeats", mininterval=2):
        for unit in range(units):
            shift = (repeat + unit) % len(names)
            for name in names[shift:] + names[:shift]:
                start = clock()
                arms[name](unit)
                seconds[name][unit][repeat] = clock() - start
    return seconds


def ratio(
    numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]], seed: int = 0
) -> Ratio:
    """Total time of one arm over another's, bootstrapped over units, 2,000 resamples."""
    above, below = [sum(unit) for unit in numerator], [sum(unit) for unit in denominator]
    generator, found = random.Random(seed), []
    for _ in range(2000):
        drawn = generator.choices(range(len(above)), k=len(above))
        found.append(sum(above[i] for i in drawn) / sum(below[i] for i in drawn))
    found.sort()
    return Ratio(sum(above) / sum(below), found[49], found[1949])
