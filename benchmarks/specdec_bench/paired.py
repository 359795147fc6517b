"""Interleaved timing of several arms, and the ratio of their total times with an interval.

A shared machine drifts by tens of percent within minutes, so arms alternate within one process and
are compared by ratio only. The interval is that of `summary.intervals`, over units (prompts).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from specdec_bench.summary.intervals import Ratio, time_ratio


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
    """Total time of one arm over another's, each unit a cluster of its own.

    Args:
        numerator: Seconds of one arm, by unit and repeat.
        denominator: Those of the other.
        seed: Of the bootstrap.

    Raises:
        SpecdecError: The lengths do not fit, or a figure is not above 0.
    """
    units = range(len(numerator))
    return time_ratio(numerator, denominator, units, [""] * len(units), seed=seed)
