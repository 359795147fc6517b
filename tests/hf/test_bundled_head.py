"""The head that comes with the bundled target: its text is plain's, and it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec import SpecConfig, demo
from specdec.demo.prompts import PROMPTS

TOKENS = 48
SIZES: list[dict[str, int]] = [
    {"depth": 5, "top_k": 1},
    {"depth": 5, "top_k": 4, "nodes": 12},
    {"depth": 7, "top_k": 8, "nodes": 60},
]
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    "processors": {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    "first EOS": {"do_sample": False, "eos_token_id": [11, 199, 202]},
}


@pytest.fixture(scope="module")
def target() -> Any:
    return specdec.augment(demo.load_target(), "none")


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    tokenizer = demo.load_tokenizer()
    tokenizer.padding_side = "left"
    return dict(tokenizer(list(PROMPTS.values())[:4], return_tensors="pt", padding=True))


def generate(model: Any, inputs: dict[str, Tensor], specdec: Any, **call: Any) -> Tensor:
    torch.manual_seed(3)
    found: Tensor = model.generate(
        **inputs, max_new_tokens=TOKENS, pad_token_id=1, specdec=specdec, **call
    )
    return found


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_text_is_that_of_plain(
    target: Any, batch: dict[str, Tensor], call: str, sizes: dict[str, int], rows: int
) -> None:
    inputs = {name: value[:rows] for name, value in batch.items()}
    config = SpecConfig("eagle3", {"draft": str(demo.head_path()), **sizes})
    text = generate(target, inputs, config, **CALLS[call])
    assert torch.equal(text, generate(target, inputs, False, **CALLS[call]))
    assert specdec.last_stats(target).mode == "tree"


def test_the_head_is_small_and_accepts(target: Any, batch: dict[str, Tensor]) -> None:
    weights = demo.head_path() / "model.safetensors"
    assert weights.stat().st_size < 2_000_000
    config = SpecConfig("eagle3", {"draft": str(demo.head_path())})
    generate(target, batch, config, do_sample=False)
    assert specdec.last_stats(target).acceptance_length > 2
