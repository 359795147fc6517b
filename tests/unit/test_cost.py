"""Costs: the curve, what it predicts, sizes that follow it, and a budget that learns."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import specdec
from specdec.api import capability
from specdec.contracts import BatchState, FixedBudget
from specdec.cost.curve import CostCurve, measure_cost
from specdec.cost.predict import RoundCosts, predict
from specdec.cost.sizes import choose_sizes
from specdec.demo import load_target, load_tokenizer
from specdec.generate import decode
from specdec.stats import RoundRecord

SIZES = (1, 2, 4, 8, 16, 32, 64)


CURVE = CostCurve({1: 2.0, 2: 2.2, 8: 4.0, 16: 6.0})


@pytest.mark.parametrize(
    ("size", "ratio"), [(1, 1.0), (2, 1.1), (5, 1.55), (8, 2.0), (12, 2.5), (24, 4.0)]
)
def test_costs_between_and_beyond_what_was_measured(size: int, ratio: float) -> None:
    assert CURVE.ratio(size) == pytest.approx(ratio)


def test_noise_does_not_make_wide_forwards_cheap() -> None:
    """A slow model has few sizes measured, and the slope between two like times may be negative."""
    assert CostCurve({1: 0.300, 2: 0.297}).ratio(80) == 1.0
    assert CostCurve({1: 1.0, 2: 1.2, 4: 1.1}).ratio(64) == pytest.approx(1.2)


@pytest.mark.parametrize("seconds", [{}, {1: 2.0}, {2: 1.0, 4: 2.0}, {1: 0.0, 2: 1.0}])
def test_a_curve_that_says_nothing_is_flat(seconds: dict[int, float]) -> None:
    assert CostCurve(seconds).ratio(7) == 1.0


def test_the_prediction_is_the_formula() -> None:
    base = RoundCosts(30, 1.0, {"forward": 60.0, "verify": 3.0}, {1: 30})
    stages = {"draft": 4.0, "forward": 999.0, "verify": 2.0, "commit": 1.0}
    arm = RoundCosts(10, 1.0, stages, {1: 5, 8: 5})
    # Rounds of the arm: 0.4 draft, 1.5 forwards of 2 s, 0.3 of the rest.
    assert predict(arm, base, CURVE) == pytest.approx((1 + 30 * 2.1) / (1 + 10 * (0.4 + 3 + 0.3)))
    # On a GPU verify waits for the forward and grows with it.
    on_device = (1 + 30 * 2.1) / (1 + 10 * (0.4 + 1.5 * 2.1 + 0.1))
    assert predict(arm, base, CURVE, on_device=True) == pytest.approx(on_device)
    assert predict(base, base, CURVE) == pytest.approx(1.0)
    assert predict(RoundCosts(0, 0.0, {}, {}), base, CURVE) is None


def test_a_curve_is_measured_in_every_batch() -> None:
    model = load_target()
    for batch in (1, 2):
        curve = measure_cost(model, seconds=0.01, batch=batch)
        assert {1, 2} <= set(curve.seconds)
        assert all(0 < seconds < 10 for seconds in curve.seconds.values())


def test_a_flat_curve_gets_large_sizes_and_a_steep_one_none() -> None:
    flat = choose_sizes(CostCurve(dict.fromkeys(SIZES, 1.0)), "lookahead")
    steep = choose_sizes(CostCurve({size: float(size) for size in SIZES}), "lookahead")
    middle = choose_sizes(CostCurve({size: 1 + 0.05 * size for size in SIZES}), "lookahead")
    assert flat.method == "lookahead"
    assert flat.options["window"] >= 10
    assert steep.method == "none"
    assert 1 < middle.predicted < flat.predicted
    assert middle.options["window"] < flat.options["window"]


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        n_positions=32, n_embd=16, n_head=2, n_layer=1, vocab_size=50,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_the_probe_fits_short_contexts_and_leaves_the_model_alone() -> None:
    model = tiny_gpt2().train()
    state = torch.get_rng_state()
    curve = measure_cost(model, seconds=0.01)
    assert all(seconds > 0 for seconds in curve.seconds.values())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_augment_without_a_method_uses_the_choice() -> None:
    model = specdec.augment(tiny_gpt2())
    assert capability(model).mode == "tree"
    ids = torch.arange(1, 9)[None]
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, specdec=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), plain)
    assert specdec.last_stats(model).method in ("lookahead", "none")


class Hopeful:
    """Doubles what was believed in full, halves what was not, as a controller might."""

    def __init__(self) -> None:
        self.size, self.asked, self.seen = 1, list[int](), list[RoundRecord]()

    def nodes(self, state: BatchState) -> int:
        self.asked.append(self.size)
        return self.size

    def observe(self, record: RoundRecord) -> None:
        self.seen.append(record)
        believed = len(record.paths[0]) == record.nodes - 1
        self.size = min(2 * self.size, 16) if believed else max(self.size // 2, 1)


def test_a_budget_learns_once_a_round_and_changes_the_speed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = Hopeful()
    monkeypatch.setattr(decode, "FixedBudget", lambda size: policy)
    rounds: list[RoundRecord] = []
    ids = load_tokenizer()("a = [1, 2, 3, 1, 2, 3, 1, 2, 3, ", return_tensors="pt").input_ids
    model = specdec.augment(load_target(), "prompt_lookup")
    settings = specdec.SpecConfig("prompt_lookup", on_round=rounds.append)
    text = model.generate(ids, specdec=settings, max_new_tokens=48, do_sample=False)
    plain = model.generate(ids, specdec=False, max_new_tokens=48, do_sample=False)
    assert torch.equal(text, plain)
    assert policy.seen == rounds[1:], "not the prefill, and every round once"
    assert all({"draft", "forward", "observe"} <= set(record.seconds) for record in policy.seen)
    assert max(policy.asked) > 1
    for size, record in zip(policy.asked, policy.seen, strict=True):
        assert record.nodes <= size + 1


def test_a_fixed_budget_learns_nothing() -> None:
    budget = FixedBudget(3)
    budget.observe(RoundRecord(1, 4, [[5]], [[]], {}))
    assert budget == FixedBudget(3)
