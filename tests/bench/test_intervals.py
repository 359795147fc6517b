"""Intervals: what they are for planted data, and how often they cover the truth."""

import math

import numpy as np
import pytest

from specdec.errors import SpecdecError
from specdec_bench.summary import intervals
from specdec_bench.summary.intervals import (
    Ratio,
    geometric_mean_ratio,
    mean_ratio_of_counts,
    ratio_of_time_ratios,
    time_ratio,
)


def timings(
    seed: int, units: int, pairs: int, noise: float, effect: float, spread: float = 0.0
) -> tuple[list[list[float]], list[list[float]]]:
    """Two arms on a machine whose speed walks by 5 % a unit; the first is `effect` times slower."""
    generator = np.random.default_rng(seed)
    drift = np.cumsum(generator.normal(0, 0.05, (pairs, units))).reshape(pairs, units).T
    length = generator.normal(0, 0.5, (units, 1))
    own = generator.normal(0, spread, (units, 1))
    above = length + own + drift + generator.normal(0, noise, drift.shape) + math.log(effect)
    below = length + drift + generator.normal(0, noise, drift.shape)
    return np.exp(above).tolist(), np.exp(below).tolist()


def test_values() -> None:
    ratio = time_ratio([[2, 4], [12]], [[1, 3], [4]], ["a", "b"], ["x", "x"])
    assert ratio.value == pytest.approx((3 + 12) / (2 + 4))
    geometric = geometric_mean_ratio([[2, 4], [12]], [[1, 3], [4]], ["a", "b"], ["x", "x"])
    assert geometric.value == pytest.approx(math.sqrt(3 / 2 * 3))
    tau = mean_ratio_of_counts([10, 30], [5, 10], ["a", "b"], ["x", "x"])
    assert tau.value == pytest.approx(40 / 15)
    changed = ratio_of_time_ratios(([[3.0]], [[1.0]]), ([[2.0]], [[1.0]]), ["a"], ["x"])
    assert changed.value == pytest.approx(1.5)


def test_only_repeats_that_both_arms_have_count() -> None:
    nan = math.nan
    ratio = time_ratio([[2, 100, 2], [4, nan]], [[1, nan], [2, 7, 9]], ["a", "b"], ["x", "x"])
    assert ratio.value == pytest.approx(2)


def test_text() -> None:
    assert str(Ratio(1.2341, 1.2, 1.27)) == "1.234 [1.200, 1.270]"
    alone = time_ratio([[2.0]], [[1.0]], ["a"], ["x"])
    assert (str(alone), alone.over) == ("2.000 [no interval]", "nothing")
    assert alone.half_width == math.inf
    assert not alone.excludes(1.0)


def test_same_seed_same_interval_and_constant_ratio_has_no_width() -> None:
    above, below = timings(1, 12, 4, 0.1, 1.0)
    names, strata = list(range(12)), [n % 3 for n in range(12)]
    assert time_ratio(above, below, names, strata) == time_ratio(above, below, names, strata)
    assert time_ratio(above, below, names, strata) != time_ratio(
        above, below, names, strata, seed=1
    )
    exact = time_ratio([[3 * s for s in unit] for unit in below], below, names, strata)
    assert (exact.low, exact.high) == pytest.approx((3, 3))


def test_what_an_interval_holds_for() -> None:
    def over(units: int, pairs: int, strata: int) -> str:
        above, below = timings(0, units, pairs, 0.1, 1.0)
        return time_ratio(above, below, range(units), [n % strata for n in range(units)]).over

    assert over(12, 3, 3) == "prompts"
    assert over(12, 1, 6) == "prompts"
    assert over(12, 3, 12) == "prompts"  # strata of one cluster are joined
    assert over(4, 3, 1) == "repeats"
    assert over(1, 2, 1) == "repeats"
    assert over(4, 1, 2) == "nothing"
    assert over(1, 1, 1) == "nothing"


def test_turns_of_a_prompt_are_drawn_together() -> None:
    """Twice the same unit in a cluster tells nothing new, so the interval must stay as wide."""
    above, below = timings(3, 12, 3, 0.1, 1.0, spread=0.2)
    once = time_ratio(above, below, range(12), ["x"] * 12)
    twice = time_ratio(above + above, below + below, [*range(12)] * 2, ["x"] * 24)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    apart = time_ratio(above + above, below + below, range(24), ["x"] * 24)
    assert apart.half_width < 0.8 * once.half_width


def test_strata_take_their_differences_out() -> None:
    generator = np.random.default_rng(0)
    above = [[1.0 + n % 2 + generator.normal(0, 0.01)] for n in range(20)]
    below = [[1.0]] * 20
    mixed = time_ratio(above, below, range(20), ["x"] * 20)
    apart = time_ratio(above, below, range(20), [n % 2 for n in range(20)])
    assert apart.half_width < mixed.half_width / 5


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("units", "pairs", "noise", "spread", "strata"),
    [
        (12, 4, 0.06, 0.0, 6),
        (12, 10, 0.2, 0.0, 1),
        (20, 4, 0.2, 0.1, 4),
        (20, 10, 0.1, 0.0, 20),
        (1, 10, 0.2, 0.0, 1),
        (3, 8, 0.1, 0.0, 3),
    ],
)
def test_coverage(units: int, pairs: int, noise: float, spread: float, strata: int) -> None:
    """Of 95 % intervals, 91 to 98 % cover; 400 draws have a standard error of 1.1 %.

    The lower bound is below the nominal level because the prompts differ in length, so that fewer
    than `units` of them decide the sums.
    """
    covered = {"time": 0, "geometric": 0}
    names, groups = list(range(units)), [n % strata for n in range(units)]
    # The truth of a ratio of sums is not the effect itself when units' own effects differ.
    truth = {"time": 1.05 * math.exp(spread**2 / 2), "geometric": 1.05}
    for seed in range(400):
        above, below = timings(seed, units, pairs, noise, 1.05, spread)
        for name, function in (("time", time_ratio), ("geometric", geometric_mean_ratio)):
            found = function(above, below, names, groups)
            covered[name] += found.low <= truth[name] <= found.high
    for name, count in covered.items():
        assert 0.91 <= count / 400 <= 0.98, name


@pytest.mark.statistical
def test_a_over_a_and_a_planted_gain() -> None:
    """The bar of the harness, at the noise of a CPU clock: 12 prompts, 10 repeats, 20 runs."""
    names, strata = list(range(12)), [n % 3 for n in range(12)]
    same, planted = [], []
    for seed in range(20):
        same.append(time_ratio(*timings(seed, 12, 10, 0.06, 1.0), names, strata))
        planted.append(time_ratio(*timings(100 + seed, 12, 10, 0.06, 1.05), names, strata))
    assert sum(r.low <= 1 <= r.high for r in same) >= 17
    assert float(np.median([r.half_width for r in same])) <= 0.02
    assert sum(r.low <= 1.05 <= r.high for r in planted) >= 17
    assert sum(r.excludes(1.0) for r in planted) >= 17


def test_students_quantile() -> None:
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 6: 2.447, 11: 2.201, 30: 2.042, 1000: 1.962}
    for degrees, quantile in known.items():
        assert intervals._student_quantile(degrees) == pytest.approx(quantile, abs=0.004)


@pytest.mark.parametrize(
    ("above", "below", "clusters", "strata", "words"),
    [
        ([[1.0]], [[1.0], [1.0]], ["a"], ["x"], "got 1 and 2"),
        ([[1.0]], [[1.0]], ["a", "b"], ["x"], "same units"),
        ([], [], [], [], "same units"),
        ([[math.nan]], [[1.0]], ["a"], ["x"], "unit 0 has no repeat"),
        ([[]], [[1.0]], ["a"], ["x"], "unit 0 has no repeat"),
        ([[0.0]], [[1.0]], ["a"], ["x"], "not above 0"),
        ([[1.0]], [[math.inf]], ["a"], ["x"], "not above 0"),
        ([[1.0]] * 2, [[1.0]] * 2, ["a", "a"], ["x", "y"], "is in 'x' and 'y'"),
    ],
)
def test_refused(above: list, below: list, clusters: list, strata: list, words: str) -> None:
    with pytest.raises(SpecdecError, match=words):
        time_ratio(above, below, clusters, strata)
