"""The summary: planted figures come back, and nothing is shown that must not be."""

import math
from dataclasses import replace

import pytest

from bench.fake_results import ARMS, PROVENANCE, Fake, FakeArm, sampled, with_arm
from specdec.cost.curve import CostCurve
from specdec.cost.predict import RoundCosts
from specdec_bench.results.records import CurveRecord, PassRecord, Results, Setting
from specdec_bench.summary.passes import cost_curve, round_costs
from specdec_bench.summary.summarize import noisy_clocks, summarize
from specdec_bench.summary.types import ArmFigures, SettingFigures, Summary

EAGLE = "eagle3:depth=3,top_k=1"


def arm(summary: Summary, name: str, setting: int = 0) -> ArmFigures:
    return next(a for a in summary.settings[setting].arms if a.name == name)


@pytest.fixture(scope="module")
def quiet() -> Summary:
    return summarize(Fake().results())


def test_planted_speedups_come_back(quiet: Summary) -> None:
    for name, planted in ARMS.items():
        if name in ("loop0", "loop0_again"):
            continue
        gain = arm(quiet, name).gain
        assert gain is not None
        assert gain.cpu is not None
        for ratio in (gain.wall, gain.cpu, gain.geometric):
            assert ratio.value == pytest.approx(planted.speed, rel=0.02)
            assert ratio.low <= ratio.value <= ratio.high
        assert gain.units == 12


def test_speedup_times_loop_gain_is_speedup_over_hf(quiet: Summary) -> None:
    figures, method = quiet.settings[0], arm(quiet, EAGLE)
    assert method.gain is not None
    assert method.over_hf is not None
    assert figures.loop_gain is not None
    product = method.gain.wall.value * figures.loop_gain.wall.value
    assert method.over_hf.wall.value == pytest.approx(product)


def test_again_is_its_own_row_and_quiet(quiet: Summary) -> None:
    figures = quiet.settings[0]
    assert figures.again is not None
    assert figures.again.wall.value == pytest.approx(1.0, abs=0.02)
    assert figures.again.cpu is not None
    assert figures.again.cpu.value == pytest.approx(1.0, abs=0.01)
    assert not figures.noisy
    assert "loop0_again" not in [a.name for a in figures.arms]


def test_acceptance_costs_and_latency_are_sums_over_passes() -> None:
    results = Fake().results()
    summary = summarize(results)
    found = arm(summary, EAGLE)
    passes = [p for (_, _, name), p in results.passes.items() if name == EAGLE]
    tokens = sum(int(n) * times for p in passes for n, times in p.histogram.items())
    rounds = sum(times for p in passes for times in p.histogram.values())
    assert found.tau is not None
    assert found.tau.value == pytest.approx(tokens / rounds)
    own = [
        sum(int(n) * t for n, t in p.histogram.items()) / sum(p.histogram.values()) for p in passes
    ]
    assert found.tau_per_request is not None
    assert found.tau_per_request.value == pytest.approx(sum(own) / len(own))
    assert found.acceptance is not None
    assert 1 + sum(found.acceptance.marginal) == pytest.approx(tokens / rounds, abs=1e-9)
    assert found.costs is not None
    assert found.latency is not None
    whole = sum(p.seconds - p.first_token for p in passes)
    assert sum(found.costs.per_token.values()) == pytest.approx(whole / tokens)
    assert sum(found.costs.per_round.values()) == pytest.approx(whole / rounds)
    assert tuple(found.costs.per_round) == ("draft", "verify", "accept", "commit", "host")
    assert found.costs.per_round["verify"] == pytest.approx(0.72 * whole / rounds)
    assert found.costs.per_round["accept"] == pytest.approx(0.06 * whole / rounds)
    assert found.costs.per_round["host"] == pytest.approx((0.09 + 0.02) * whole / rounds)
    assert found.latency.per_token == pytest.approx(whole / tokens)
    assert found.latency.gaps[50] <= found.latency.gaps[95] <= found.latency.gaps[99]
    assert found.latency.largest_burst == 3
    assert found.peak_bytes == 3 << 20
    assert found.joules_per_token == pytest.approx(0.01)


def test_arms_without_rounds_have_no_acceptance(quiet: Summary) -> None:
    found = arm(quiet, "hf_prompt_lookup")
    assert (found.tau, found.acceptance, found.costs) == (None, None, None)
    assert found.latency is not None
    assert found.gain is not None


def test_categories_add_up(quiet: Summary) -> None:
    found = arm(quiet, "prompt_lookup")
    assert [c.category for c in found.categories] == ["code", "maths", "prose"]
    assert sum(c.prompts for c in found.categories) == quiet.settings[0].prompts
    assert all(c.gain is not None and c.tau is not None for c in found.categories)


def test_looping_share_is_of_tokens() -> None:
    figures = summarize(Fake().results()).settings[0]
    cut = (64 + 4 * 3) * (1 / 0.9 - 1)
    assert figures.looping == pytest.approx(cut / (figures.tokens + cut))


def test_wrong_text_shows_no_speedup_anywhere() -> None:
    summary = summarize(with_arm(Fake(turns=2), EAGLE, wrong=(3,)).results())
    found = arm(summary, EAGLE)
    assert found.wrong
    assert (found.gain, found.over_hf) == (None, None)
    assert all(c.gain is None for c in found.categories)
    assert found.costs is not None
    assert found.costs.residual is None
    assert found.no_gain == f"the text of {EAGLE} is wrong (unit prompt1/1, row 0, token 7)"
    assert summary.wrong == [f"{EAGLE} in float32, batch 1, greedy"]
    assert found.texts.units == {"exact": 23, "wrong": 1}
    assert found.texts.tokens["wrong"] == 3
    other = arm(summary, "prompt_lookup")
    assert not other.wrong
    assert (other.gain, other.over_hf) == (None, None)
    assert all(c.gain is None for c in other.categories)
    assert f"{found.no_gain}, so no speed-up is shown in this setting" == other.no_gain
    assert summary.settings[0].loop_gain is None
    assert summary.settings[0].again is not None  # noise, not a speed-up


def test_a_wrong_text_of_one_setting_leaves_the_others_alone() -> None:
    settings = (Setting(), Setting(batch=2))
    results = Fake(settings=settings).results()
    checks = [
        replace(c, verdict="wrong", first_difference=[0, 3])
        if c.setting == 1 and c.arm == EAGLE
        else c
        for c in results.checks
    ]
    summary = summarize(replace(results, checks=checks))
    assert arm(summary, "prompt_lookup", 0).gain is not None
    assert arm(summary, "prompt_lookup", 1).gain is None


def test_a_wrong_text_of_the_repeated_baseline_counts() -> None:
    summary = summarize(with_arm(Fake(), "loop0_again", wrong=(0,)).results())
    assert summary.wrong == ["loop0_again in float32, batch 1, greedy"]
    assert summary.settings[0].again is None
    assert all(a.gain is None for a in summary.settings[0].arms)


def own_texts(arms: list[str] | None) -> Fake:
    """A sampled run in which one arm draws texts of its own."""
    fake = with_arm(Fake(settings=(Setting(temperature=1.0),)), "hf_prompt_lookup", own_texts=True)
    facts = {} if arms is None else {"not_promised": {"0": arms}}
    return replace(fake, provenance={**PROVENANCE, **facts})


def test_a_text_that_is_not_promised_is_timed_and_named() -> None:
    found = arm(summarize(own_texts(["hf_prompt_lookup"]).results()), "hf_prompt_lookup")
    assert found.texts.units == {"not_promised": 12}
    assert not found.texts.unchecked
    assert found.gain is not None
    assert found.gain.wall.value == pytest.approx(0.88, rel=0.02)
    for other in (None, [], ["another"], "hf_prompt_lookup", [["hf_prompt_lookup"]]):
        unsaid = arm(summarize(own_texts(other).results()), "hf_prompt_lookup")  # type: ignore[arg-type]
        assert unsaid.texts.unchecked
        assert unsaid.gain is None


def test_the_baseline_always_promises_its_text() -> None:
    fake = with_arm(own_texts(["loop0", "loop0_again"]), "loop0", own_texts=True)
    assert arm(summarize(fake.results()), "loop0").texts.unchecked


def test_an_arm_of_another_law_has_no_speedup_anywhere() -> None:
    results = Fake(settings=(Setting(), Setting(batch=2))).results()
    tests = [sampled(EAGLE, False), sampled("prompt_lookup", True)]
    summary = summarize(replace(results, sampling=tests))
    for setting in (0, 1):
        found = arm(summary, EAGLE, setting)
        assert (found.gain, found.over_hf) == (None, None)
        assert "samples from another distribution" in found.no_gain
        assert arm(summary, "prompt_lookup", setting).gain is not None
    assert [test.arm for test in summary.wrong_sampling] == [EAGLE]


def test_wrong_baseline_takes_every_speedup_away() -> None:
    figures = summarize(with_arm(Fake(), "loop0", wrong=(0,)).results()).settings[0]
    assert figures.again is None
    assert figures.loop_gain is None
    assert all(a.gain is None and a.over_hf is None for a in figures.arms)


def test_a_text_that_nobody_checked_counts_as_no_text() -> None:
    results = with_arm(Fake(), EAGLE, near_tie=(1,)).results()
    assert arm(summarize(results), EAGLE).texts.units == {"exact": 11, "near_tie": 1}
    assert arm(summarize(results), EAGLE).gain is not None
    unchecked = replace(results, checks=[c for c in results.checks if c.verdict == "exact"])
    found = arm(summarize(unchecked), EAGLE)
    assert found.texts.unchecked
    assert found.gain is None
    assert "was not checked" in found.no_gain


def test_plains_own_text_needs_no_check() -> None:
    results = replace(Fake().results(), checks=[])
    found = arm(summarize(results), EAGLE)
    assert found.texts.units == {"exact": 12}
    assert found.gain is not None


def test_errors_are_counted_and_left_out_of_both_arms() -> None:
    summary = summarize(with_arm(Fake(noise=0, drift=0), EAGLE, errors=(1, 2)).results())
    found = arm(summary, EAGLE)
    assert (found.errors, found.timings, found.first_error) == (2, 72, "OutOfMemoryError")
    assert found.gain is not None
    assert found.gain.wall.value == pytest.approx(1.62)
    everything = with_arm(Fake(pairs=1), EAGLE, errors=range(12)).results()
    failed = arm(summarize(everything), EAGLE)
    assert failed.gain is None
    assert failed.no_gain == f"no timed answer of both loop0 and {EAGLE}"


def test_noise_is_called_noise() -> None:
    noisy = summarize(Fake(noise=0.6, prompts=6).results())
    assert "wall" in noisy.settings[0].noisy
    assert noisy.noisy
    biased = summarize(with_arm(Fake(), "loop0_again", speed=1.06).results())
    assert set(biased.settings[0].noisy) == {"wall", "cpu"}
    slightly = summarize(with_arm(Fake(noise=0.001), "loop0_again", speed=1.01).results())
    assert not slightly.settings[0].noisy
    assert noisy_clocks(None) == []


@pytest.mark.parametrize(
    ("facts", "arm_in_process", "expected"),
    [({}, True, True), ({"threads": 2}, True, False), ({"device": "cuda"}, True, False),
     ({}, False, False)],
)  # fmt: skip
def test_cpu_clock(facts: dict, arm_in_process: bool, expected: bool) -> None:
    fake = replace(Fake(), provenance={**PROVENANCE, **facts})
    found = arm(summarize(with_arm(fake, EAGLE, in_process=arm_in_process).results()), EAGLE)
    assert found.gain is not None
    assert (found.gain.cpu is not None) == expected


def test_settings_do_not_mix() -> None:
    settings = (Setting(), Setting(dtype="bfloat16", batch=4))
    summary = summarize(Fake(settings=settings).results())
    assert [s.setting for s in summary.settings] == list(settings)
    assert summary.settings[1].tokens == 4 * summary.settings[0].tokens
    assert arm(summary, EAGLE, 1).gain != arm(summary, EAGLE, 0).gain


def test_predicted_is_compared_with_measured(quiet: Summary) -> None:
    costs = arm(quiet, EAGLE).costs
    gain = arm(quiet, EAGLE).gain
    assert costs is not None
    assert gain is not None
    assert costs.predicted is not None
    assert costs.residual == pytest.approx(gain.steadier().value / costs.predicted - 1)
    assert arm(quiet, "loop0").costs is not None
    no_curve = summarize(replace(Fake().results(), curves={}))
    found = arm(no_curve, EAGLE).costs
    assert found is not None
    assert (found.predicted, found.residual) == (None, None)


def test_the_rounds_of_an_arm_are_summed_without_the_prefill() -> None:
    passed = PassRecord(
        0, "u", "x", {"1": 10}, 10, 0, True, {"prefill": 1.0, "draft": 4.0}, 9.0, 1.0, [],
        sizes={"1": 5, "8": 5},
    )  # fmt: skip
    assert round_costs([passed, passed]) == RoundCosts(20, 2.0, {"draft": 8.0}, {1: 10, 8: 10})
    assert round_costs([]) == RoundCosts(0, 0, {}, {})
    record = CurveRecord("float32", 1, {"1": 2.0, "16": 6.0})
    assert cost_curve(record) == CostCurve({1: 2.0, 16: 6.0})


def test_one_prompt_one_repeat() -> None:
    summary = summarize(Fake(prompts=1, pairs=1).results())
    gain = arm(summary, EAGLE).gain
    assert gain is not None
    assert gain.wall.over == "nothing"
    assert gain.wall.high == math.inf
    assert summary.settings[0].noisy == ["wall", "cpu"]  # nothing says that it is not


def test_only_a_baseline_and_nothing_at_all() -> None:
    alone = summarize(Fake(arms={"loop0": FakeArm()}).results())
    figures: SettingFigures = alone.settings[0]
    assert figures.again is None
    assert [a.name for a in figures.arms] == ["loop0"]
    empty: Results = replace(Fake().results(), units={}, times=[], passes={}, checks=[])
    assert summarize(empty).settings == []
