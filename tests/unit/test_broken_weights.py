"""Weights that no text can come of are named; what only looks like it is not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import specdec
from helpers.hf import tiny_llama
from specdec.audit.broken_weights import first_broken_parameter
from specdec.cli.main import main
from specdec.config import SpecConfig
from specdec.errors import ConfigError, UnsupportedModelError


def break_one(model: nn.Module, name: str, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_broken_parameter_is_named(value: float, dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        break_one(model, name, value)
    what = "NaN" if math.isnan(value) else "inf"
    assert first_broken_parameter(model.named_parameters()) == (
        "model.layers.1.mlp.up_proj.weight",
        what,
    )
    with pytest.raises(UnsupportedModelError, match=rf"layers.1.mlp.up_proj.weight.* holds {what}"):
        specdec.augment(model, "prompt_lookup")
    assert "generate" not in vars(model)


def test_large_and_odd_weights_are_no_broken_ones() -> None:
    largest = torch.finfo(torch.float16).max
    tensors = {
        "large": torch.full((64,), largest, dtype=torch.float16),
        "both": torch.tensor([largest, -largest], dtype=torch.float16),
        "ints": torch.arange(4),
        "nothing": torch.empty(0),
        "elsewhere": torch.full((4,), math.nan, device="meta"),
        "eighths": torch.zeros(4).to(torch.float8_e4m3fn),
        "lm_head.bias": torch.tensor([0.0, -math.inf]),  # rules a token out
    }
    assert first_broken_parameter(tensors.items()) is None
    assert first_broken_parameter({**tensors, "bias": torch.tensor([math.inf])}.items()) is not None


def test_a_broken_draft_model_is_named() -> None:
    draft = tiny_llama()
    break_one(draft, "lm_head.weight", math.nan)
    model = specdec.augment(tiny_llama(), "draft_model", draft=draft)
    with pytest.raises(ConfigError, match=r"parameter 'lm_head.weight' of draft .* holds NaN"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)


def test_doctor_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(torch.float32)
    break_one(model, "model.embed_tokens.weight", math.inf)
    model.save_pretrained(tmp_path)
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "parameter 'model.embed_tokens.weight' of" in said.err
    assert "holds inf" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("budget", [4097, 10**6, 10**30])
def test_budgets_beyond_what_can_be_verified(budget: int) -> None:
    with pytest.raises(ConfigError, match=f"budget must be at most 4096 nodes, got {budget}"):
        SpecConfig("prompt_lookup", budget=budget)
    with pytest.raises(ConfigError, match="at most 4096 nodes"):
        specdec.augment(tiny_llama(), "prompt_lookup", budget=budget)
    SpecConfig("prompt_lookup", budget=4096)
