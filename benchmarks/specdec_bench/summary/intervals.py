"""Ratios of times and counts with 95 % intervals, by bootstrap over prompts.

What an interval covers. Timings of the two arms of a ratio are paired by their repeat, because arms
run side by side within a repeat and a drifting machine slows both. A unit's figure is its mean over
the repeats that both arms have, so that units weigh the same however far the last repeat came.
Whole clusters (the turns of one prompt) are then drawn again within their stratum (the category).
The noise of single timings needs no second draw: it is part of how far clusters lie apart, and a
second draw would count it twice. Nothing is trimmed: a slow outlier widens the interval.

Two corrections keep small samples honest. Of k clusters, k - 1 are drawn and weighted k / (k - 1)
(the rescaling bootstrap of Rao and Wu), because drawing k makes the spread of two prompts in a
category half as large as it is. And the percentiles are stretched, on the log scale, from the
normal quantile to Student's with the clusters minus the strata as degrees of freedom. Strata of a
single cluster are joined.

With fewer than four degrees of freedom a spread over prompts is not known in any useful way. Then
the repeats of each unit are drawn instead, and the interval holds for these prompts only;
`Ratio.over` says which it is. Without repeats either, there is no interval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from specdec.errors import SpecdecError

Floats = NDArray[np.float64]
Covered = Literal["prompts", "repeats", "nothing"]
Repeats = Sequence[Sequence[float]]

RESAMPLES = 2000
_CONFIDENCE = 0.95
_NORMAL = 1.959963984540054  # quantile at 0.975
_FEWEST_DEGREES = 4  # Student's quantile is 2.8 here and 12.7 at one


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio with its 95 % interval.

    Attributes:
        value: The ratio.
        low: Lower end of the interval; 0 when there is none.
        high: Upper end; infinite when there is none.
        over: What was drawn again: "prompts", so that it holds for others of the same kind;
            "repeats", so that it holds for these prompts; or "nothing", so that there is none.
    """

    value: float
    low: float
    high: float
    over: Covered = "prompts"

    def __str__(self) -> str:
        """For example "1.234 [1.200, 1.270]"."""
        if self.over == "nothing":
            return f"{self.value:.3f} [no interval]"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def half_width(self) -> float:
        """Half the interval, relative to the value; infinite when there is none."""
        return (self.high - self.low) / (2 * self.value)

    def excludes(self, value: float, by: float = 0.0) -> bool:
        """Whether the interval lies on one side of `value`, further away than the share `by`."""
        return self.low > value * (1 + by) or self.high < value * (1 - by)


def time_ratio(
    numerator: Repeats,
    denominator: Repeats,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """Total time of one arm over another's, each unit counted once: the share of time saved.

    Args:
        numerator: Seconds, by unit and repeat; NaN where a repeat has no figure.
        denominator: The same of the other arm; equal positions are one repeat.
        clusters: Of each unit; units of one cluster are drawn together.
        strata: Of each unit; clusters are drawn within their stratum.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        The ratio; "nothing" is covered with one repeat of a few prompts.

    Raises:
        SpecdecError: The lists do not fit together, a unit has no repeat that both arms have, or
            a time is not above 0.
    """
    paired = _paired(numerator, denominator)
    return bootstrap([paired], _first_over_second, clusters, strata, resamples, seed)


def geometric_mean_ratio(
    numerator: Repeats,
    denominator: Repeats,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """Geometric mean of the units' ratios: what a typical request sees. As `time_ratio` else."""
    paired = _paired(numerator, denominator)
    return bootstrap([paired], _geometric_mean, clusters, strata, resamples, seed)


def mean_ratio_of_counts(
    numerator: Sequence[float],
    denominator: Sequence[float],
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """Sum over sum of what was counted once per unit, as tokens over rounds. Repeats add nothing.

    Args:
        numerator: Count of each unit, above 0.
        denominator: Count of each unit, above 0.
        clusters: Of each unit.
        strata: Of each unit.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        The ratio; "nothing" is covered with a few prompts.

    Raises:
        SpecdecError: As `time_ratio`.
    """
    paired = _paired([[n] for n in numerator], [[d] for d in denominator])
    return bootstrap([paired], _first_over_second, clusters, strata, resamples, seed)


def ratio_of_time_ratios(
    new: tuple[Repeats, Repeats],
    base: tuple[Repeats, Repeats],
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """How a ratio of times changed between two runs of the same units.

    Repeats of the two runs have nothing to do with each other; units have, so they are drawn
    together.

    Args:
        new: Numerator and denominator of the new run, as for `time_ratio`.
        base: The same of the old one.
        clusters: Of each unit.
        strata: Of each unit.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        The new ratio over the old one.

    Raises:
        SpecdecError: As `time_ratio`.
    """
    groups = [_paired(*new), _paired(*base)]
    return bootstrap(groups, _ratio_of_ratios, clusters, strata, resamples, seed)


def bootstrap(
    groups: Sequence[Sequence[Floats]],
    statistic: Callable[[Floats, Floats], Floats],
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """The interval behind all others.

    Args:
        groups: For each group of columns that were measured side by side, one [repeats, columns]
            array per unit; repeats of one group are drawn together.
        statistic: From weights [B, units] and figures [units, columns of all groups] or
            [B, units, columns] to [B] positive numbers.
        clusters: Of each unit.
        strata: Of each unit.
        resamples: B.
        seed: Of the draws.

    Raises:
        SpecdecError: The lengths do not fit, or a cluster is in two strata.
    """
    units = len(clusters)
    if not units or len(strata) != units or any(len(group) != units for group in groups):
        lengths = [units, len(strata), *(len(group) for group in groups)]
        raise SpecdecError(f"an interval needs figures of the same units; got lengths {lengths}")
    means = np.concatenate([[unit.mean(0) for unit in group] for group in groups], 1)
    value = float(statistic(np.ones((1, units)), means)[0])
    members = _members(clusters, strata)
    degrees = sum(len(clusters_of) - 1 for clusters_of in members)
    fewest = min(len(unit) for group in groups for unit in group)
    if degrees >= _FEWEST_DEGREES:
        frozen = tuple(tuple(map(tuple, stratum)) for stratum in members)
        found = statistic(_cluster_weights(frozen, units, resamples, seed), means)
        return _interval(value, found, degrees, "prompts")
    if fewest >= 2:
        degrees = sum(len(unit) - 1 for group in groups for unit in group)
        drawn = _drawn_repeats(groups, resamples, seed)
        found = statistic(np.ones((resamples, units)), drawn)
        return _interval(value, found, degrees, "repeats")
    return Ratio(value, 0.0, math.inf, "nothing")


def _paired(numerator: Repeats, denominator: Repeats) -> list[Floats]:
    """[repeats, 2] of each unit: the repeats that both have."""
    if len(numerator) != len(denominator):
        raise SpecdecError(
            f"a ratio needs the same units above and below; got {len(numerator)} and "
            f"{len(denominator)}"
        )
    found = []
    for index, (above, below) in enumerate(zip(numerator, denominator, strict=True)):
        common = min(len(above), len(below))
        both = np.array([above[:common], below[:common]], dtype=np.float64).T
        both = both[~np.isnan(both).any(1)]
        if not len(both):
            raise SpecdecError(f"unit {index} has no repeat with figures of both arms")
        if not 0 < both.min() <= both.max() < math.inf:
            raise SpecdecError(f"unit {index} has a figure that is not above 0: {both.min()}")
        found.append(both)
    return found


def _members(clusters: Sequence[Hashable], strata: Sequence[Hashable]) -> list[list[list[int]]]:
    """Units by cluster by stratum; strata of one cluster are joined, with another if need be."""
    stratum_of: dict[Hashable, Hashable] = {}
    units_of: dict[Hashable, list[int]] = {}
    for unit, (cluster, stratum) in enumerate(zip(clusters, strata, strict=True)):
        if stratum_of.setdefault(cluster, stratum) != stratum:
            raise SpecdecError(f"cluster {cluster!r} is in {stratum_of[cluster]!r} and {stratum!r}")
        units_of.setdefault(cluster, []).append(unit)
    sizes = Counter(stratum_of.values())
    found = [
        [units_of[c] for c, stratum in stratum_of.items() if stratum == name]
        for name, size in sizes.items()
        if size > 1
    ]
    single = [units_of[c] for c, stratum in stratum_of.items() if sizes[stratum] == 1]
    if len(single) == 1 and found:
        min(found, key=len).extend(single)
    elif single:
        found.append(single)
    return found


@lru_cache(maxsize=16)  # all arms of a setting share their units, as those of a category do
def _cluster_weights(
    members: tuple[tuple[tuple[int, ...], ...], ...], units: int, resamples: int, seed: int
) -> Floats:
    """[B, units]: how often each unit counts in each resample."""
    generator = np.random.default_rng(seed)
    weights = np.empty((resamples, units))
    for stratum in members:
        size = len(stratum)
        draws = generator.integers(0, size, (resamples, size - 1))
        flat = (draws + np.arange(resamples)[:, None] * size).ravel()
        counts = np.bincount(flat, minlength=resamples * size).reshape(resamples, size)
        for column, its_units in enumerate(stratum):
            weights[:, list(its_units)] = counts[:, column, None] * (size / (size - 1))
    weights.flags.writeable = False
    return weights


def _drawn_repeats(groups: Sequence[Sequence[Floats]], resamples: int, seed: int) -> Floats:
    """[B, units, columns]: means over repeats drawn again, of n repeats n - 1."""
    generator = np.random.default_rng(seed)
    columns = []
    for group in groups:
        per_unit = []
        for unit in group:
            draws = generator.integers(0, len(unit), (resamples, len(unit) - 1))
            per_unit.append(unit[draws].mean(1))
        columns.append(np.stack(per_unit, 1))
    return np.concatenate(columns, 2)


def _interval(value: float, found: Floats, degrees: int, over: Covered) -> Ratio:
    tail = (1 - _CONFIDENCE) / 2
    ends = np.log(np.quantile(found, [tail, 1 - tail])) - math.log(value)
    low, high = (ends * (_student_quantile(degrees) / _NORMAL)).tolist()
    # A skewed distribution can leave its own point estimate outside; no interval may.
    return Ratio(value, value * math.exp(min(low, 0)), value * math.exp(max(high, 0)), over)


def _student_quantile(degrees: int) -> float:
    """Student's t at 0.975: exact for 1 and 2, Fisher's expansion (error below 0.003) beyond."""
    if degrees == 1:
        return math.tan(math.pi * 0.475)
    if degrees == 2:
        return _CONFIDENCE * math.sqrt(2 / (1 - _CONFIDENCE**2))
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, 1))


def _weighted(weights: Floats, figures: Floats) -> Floats:
    """[B, columns]: weighted sums over units."""
    if figures.ndim == 2:
        return weights @ figures
    return np.asarray(np.einsum("bu,buc->bc", weights, figures))


def _first_over_second(weights: Floats, figures: Floats) -> Floats:
    sums = _weighted(weights, figures)
    return np.asarray(sums[:, 0] / sums[:, 1])


def _ratio_of_ratios(weights: Floats, figures: Floats) -> Floats:
    sums = _weighted(weights, figures)
    return np.asarray(sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3]))


def _geometric_mean(weights: Floats, figures: Floats) -> Floats:
    logs = np.log(figures[..., :1] / figures[..., 1:2])
    return np.asarray(np.exp(_weighted(weights, logs)[:, 0] / weights.sum(1)))
