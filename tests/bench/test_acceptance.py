"""Acceptance from the histogram, and the profile that other programs read."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL
from specdec.errors import SpecdecError
from specdec_bench.results.records import PassRecord
from specdec_bench.summary.acceptance import Acceptance, Counts, acceptance_of
from specdec_bench.summary.speculation_profile import (
    Measured,
    build_profile,
    check_profile,
    save_profile,
    write_profile,
)


def passed(histogram: dict[str, int], drafted: int, gaps: Any = (), chain: bool = True) -> Any:
    rounds = sum(histogram.values())
    return PassRecord(0, "u", "a", histogram, rounds, drafted, chain, {}, 1.0, 0.1, gaps)


def test_by_hand() -> None:
    # 40 rounds accepted no draft, 30 one, 20 two, none three, 10 four.
    found = Acceptance.of({"1": 40, "2": 30, "3": 20, "5": 10}, drafted=500)
    assert (found.rounds, found.tokens, found.accepted, found.positions) == (100, 210, 110, 4)
    assert found.tau_per_step == found.tau_per_request == 2.1
    assert found.marginal == (0.6, 0.3, 0.1, 0.1)
    assert found.conditional == (0.6, 0.5, pytest.approx(1 / 3), 1.0)
    assert found.acceptance_rate == 110 / 500
    assert found.wasted_per_round == 3.9


def test_the_identity_holds_for_any_histogram() -> None:
    chosen = random.Random(0)
    for _ in range(500):
        sizes = chosen.sample(range(1, 60), chosen.randint(1, 12))
        histogram = {size: chosen.randint(1, 10 ** chosen.randint(0, 7)) for size in sizes}
        found = Acceptance.of(histogram)
        assert abs(1 + sum(found.marginal) - found.tau_per_step) < 1e-9
        assert all(a >= b for a, b in zip(found.marginal, found.marginal[1:], strict=False))
        product = 1.0
        for conditional, marginal in zip(found.conditional, found.marginal, strict=True):
            product *= conditional
            assert product == pytest.approx(marginal, abs=1e-12)


def test_rounds_counted_one_by_one_agree() -> None:
    chosen = random.Random(1)
    accepted = [min(int(chosen.expovariate(0.8)), 6) for _ in range(3000)]
    found = Acceptance.of(Counter(n + 1 for n in accepted))
    for position, rate in enumerate(found.marginal):
        assert rate == sum(n > position for n in accepted) / len(accepted)


def test_per_request_is_not_per_step() -> None:
    long, short = {"1": 90, "2": 10}, {"4": 2}
    found = Acceptance.of_requests([Counts(long, 300), Counts(short, 6), Counts({}, 0)])
    assert found.tau_per_step == (90 + 20 + 8) / 102
    assert found.tau_per_request == (1.1 + 4.0) / 2
    assert (found.requests, found.drafted) == (2, 306)


def test_the_last_round_of_an_answer() -> None:
    # An answer of 3 + 3 + 1: the limit left one token for the last round.
    found = acceptance_of([passed({"1": 1, "3": 2}, 4, [(3, 0.1), (3, 0.1), (1, 0.1)])])
    assert found is not None
    assert found.tau_per_step == 7 / 3
    assert found.tau_without_last == 3.0
    assert Acceptance.of({"1": 1, "3": 2}).tau_without_last is None
    # Rows of a batch end at different times; bursts of the batch do not say when.
    both = acceptance_of([passed({"1": 2, "3": 4}, 8, [(1, 0.1)])], rows=[2])
    assert both is not None
    assert both.tau_without_last is None
    with pytest.raises(SpecdecError, match="not in its histogram"):
        Acceptance.of_requests([Counts({2: 1}, 1, True, (3,))])


def test_arms_that_count_nothing() -> None:
    assert acceptance_of([]) is None
    assert acceptance_of([passed({}, 0)]) is None
    with pytest.raises(SpecdecError, match="at least one round"):
        Acceptance.of({})
    with pytest.raises(SpecdecError, match="at least one round"):
        Acceptance.of({"2": 0})
    unknown = Acceptance.of({"2": 3})
    assert (unknown.acceptance_rate, unknown.wasted_per_round) == (None, None)
    silent = Acceptance.of({"1": 3}, drafted=0)
    assert (silent.acceptance_rate, silent.wasted_per_round, silent.marginal) == (None, 0.0, ())


@pytest.mark.parametrize(
    ("histogram", "drafted", "message"),
    [
        ({"0": 1}, None, "from 1 on, got '0'"),
        ({"-2": 1}, None, "from 1 on"),
        ({"x": 1}, None, "from 1 on"),
        ({1.5: 1}, None, "from 1 on"),
        ({"2": -1}, None, "counted -1 times"),
        ({"2": 0.5}, None, "counted 0.5 times"),
        ({"3": 5}, 9, "10 drafts were accepted, but only 9 were proposed"),
    ],
)
def test_impossible_counts(histogram: Any, drafted: int | None, message: str) -> None:
    with pytest.raises(SpecdecError, match=message):
        Acceptance.of(histogram, drafted)


def test_the_profile(tmp_path: Path) -> None:
    acceptance = Acceptance.of({"1": 40, "2": 30, "3": 30}, drafted=300)
    other = Acceptance.of({"1": 10})
    measured = Measured(
        "eagle3", 3, "/somewhere/private/org/model", "C:\\heads\\mine", {"code": other}, {"n": 1},
        DRAFT_HEAD,
    )  # fmt: skip
    path = tmp_path / "speculation_profile.json"
    save_profile(path, build_profile(acceptance, measured))
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["schema_version"] == "1.0"
    assert found["marginal_accept_rates"] == [0.6, 0.3, 0.0]
    assert found["conditional_accept_rates"] == [0.6, 0.5, 0.0]
    assert found["mean_accept_length"] == 1.9
    assert found["acceptance_length_histogram"] == {"1": 40, "2": 30, "3": 30}
    assert found["accept_length_model"] == "chain_analytic"
    assert found["target_model"] == "org/model"
    assert found["draft_checkpoint"] == "heads/mine"
    assert found["per_category"]["code"]["mean_accept_length"] == 1.0
    assert found["validation"]["mean_consistency"]["passed"]
    assert found["validation"]["marginal_monotonicity"] == {"passed": True, "violations": []}
    check_profile(found)


def test_which_profiles_may_be_extrapolated() -> None:
    chain, tree = Acceptance.of({"2": 1}), Acceptance.of({"2": 1}, 8, chain=False)
    for acceptance, drafts_with, wanted in [
        (chain, DRAFT_HEAD, "chain_analytic"),
        (chain, DRAFT_MODEL, "chain_analytic"),
        (tree, DRAFT_HEAD, "measured_per_k"),
        (chain, None, "measured_per_k"),
    ]:
        profile = build_profile(acceptance, Measured("x", 4, drafts_with=drafts_with))
        assert profile["accept_length_model"] == wanted


def test_a_profile_is_as_long_as_what_was_accepted(tmp_path: Path) -> None:
    counted = {"code": [Counts({"4": 3}), Counts({"1": 1})], "maths": [Counts({})]}
    write_profile(tmp_path / "new" / "p.json", Measured("x", 2), counted)
    found = json.loads((tmp_path / "new" / "p.json").read_text(encoding="utf-8"))
    assert found["num_speculative_tokens"] == 3
    assert found["acceptance_length_histogram"] == {"1": 1, "4": 3}
    assert list(found["per_category"]) == ["code"], "maths has no round"


def test_a_profile_that_would_be_cut_short() -> None:
    with pytest.raises(SpecdecError, match="2 speculative tokens cannot hold rounds that accept"):
        build_profile(Acceptance.of({"4": 3}), Measured("eagle3", 2))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("marginal_accept_rates", [0.6, 0.31, 0.0], "do not follow from the histogram"),
        ("marginal_accept_rates", [0.6, 0.3], "do not follow"),
        ("conditional_accept_rates", [0.6, 0.3, 0.0], "conditional_accept_rates"),
        ("mean_accept_length", 1.92, "mean_accept_length 1.92 does not follow"),
        ("acceptance_length_histogram", {"1": 41, "2": 30, "3": 30}, "do not follow"),
        ("schema_version", "2.0", "schema '2.0'"),
    ],
)
def test_a_profile_that_contradicts_itself_is_not_written(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    profile = build_profile(Acceptance.of({"1": 40, "2": 30, "3": 30}), Measured("eagle3", 3))
    profile[field] = value
    with pytest.raises(SpecdecError, match=message):
        save_profile(tmp_path / "p.json", profile)
    assert not list(tmp_path.iterdir())
    del profile[field]
    with pytest.raises(SpecdecError):
        check_profile(profile)
