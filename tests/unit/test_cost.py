"""Sizes follow the measured cost curve."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import specdec
from specdec.api import capability
from specdec.cost.curve import CostCurve, choose_lookahead, measure_cost

SIZES = (1, 2, 4, 8, 16, 32, 64)


def test_ratio_is_linear_between_sizes_and_beyond() -> None:
    curve = CostCurve({1: 2.0, 2: 2.0, 4: 4.0})
    assert curve.ratio(1) == 1.0
    assert curve.ratio(3) == 1.5
    assert curve.ratio(6) == 3.0


def test_a_flat_curve_gets_large_sizes_and_a_steep_one_none() -> None:
    flat = choose_lookahead(CostCurve(dict.fromkeys(SIZES, 1.0)))
    steep = choose_lookahead(CostCurve({size: float(size) for size in SIZES}))
    middle = choose_lookahead(CostCurve({size: 1 + 0.05 * size for size in SIZES}))
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
