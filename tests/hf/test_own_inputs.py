"""Positions of the user's own and token types: plain `generate` continues them, and so do trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import specdec
from helpers.hf import (
    fallbacks,
    ids_of,
    left_padded,
    oracle,
    plain,
    prompt,
    run_both,
    tiny_gpt2,
    tiny_llama,
)
from helpers.names import CACHE
from specdec.api import capability

NEW = 12
MODELS = ("llama", "gemma3", "gpt2")


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


every_model = pytest.mark.parametrize("model", MODELS, indirect=True)


def stretched(ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, S] positions with gaps, other ones in every row."""
    mask = torch.ones_like(ids) if mask is None else mask
    rows = torch.arange(1, len(ids) + 1)[:, None]
    return ((mask.cumsum(1) - 1) * (rows % 2 + 1) + rows * 2).masked_fill(mask == 0, 0)


@every_model
@pytest.mark.parametrize("decoding", [{}, {"do_sample": True, "top_k": 0}])
def test_positions(model: Any, decoding: dict[str, Any]) -> None:
    for ids in (prompt(), prompt(20), prompt(9, 3)):
        call = {"input_ids": ids, "max_new_tokens": NEW, **decoding}
        both = run_both(model, **call, position_ids=stretched(ids))
        if model.config.model_type == "gpt2":
            ordinary = plain(model, input_ids=ids, max_new_tokens=NEW)
            assert decoding or not torch.equal(both.ours, ordinary), "positions change nothing"
    padded = left_padded()
    positions = stretched(padded["input_ids"], padded["attention_mask"])
    run_both(model, **padded, position_ids=positions, max_new_tokens=NEW, **decoding)


@every_model
@pytest.mark.parametrize("method", ["none", "prompt_lookup", "lookahead"])
def test_methods(model: Any, method: str) -> None:
    ids = prompt(9, 2)
    call = {"input_ids": ids, "position_ids": stretched(ids), "max_new_tokens": NEW}
    expected = plain(model, **call)
    with fallbacks() as texts:
        got = model.generate(**call, specdec=specdec.SpecConfig(method))
    assert torch.equal(got, expected)
    assert not texts


def test_the_same_positions_for_all_rows(llama: Any) -> None:
    ids = prompt(9, 3)
    run_both(llama, input_ids=ids, position_ids=stretched(ids[:1]), max_new_tokens=NEW)


def test_default_positions_written_out() -> None:
    """These take the ordinary way, without a test of the prompt."""
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    run_both(model, input_ids=prompt(), position_ids=torch.arange(9)[None], max_new_tokens=NEW)
    assert not capability(model).prompts
    run_both(model, input_ids=prompt(), position_ids=torch.arange(1, 10)[None], max_new_tokens=NEW)
    assert list(capability(model).prompts.values()) == [None]


@pytest.mark.parametrize("method", ["none", "prompt_lookup", "lookahead"])
def test_learned_positions_run_out_sooner(method: str) -> None:
    """A table of 32: an EOS comes in time, and a draft must not reach past the last position."""
    model = specdec.augment(tiny_gpt2(positions=32), method)
    ids, positions = prompt(), torch.arange(9)[None] + 10
    call = {"input_ids": ids, "position_ids": positions, "do_sample": False}
    free = plain(model, **call, max_new_tokens=13)[0, 9:].tolist()
    ends = next(token for token in reversed(free) if free.count(token) == 1)
    expected = plain(model, **call, max_new_tokens=60, eos_token_id=ends)
    found = model.generate(**call, max_new_tokens=60, eos_token_id=ends)
    assert torch.equal(found, expected)
    assert specdec.last_stats(model).mode == "tree"
    deep = oracle(torch.cat([expected, ids, ids], dim=1), 9, depth=12)
    found = model.generate(**call, max_new_tokens=60, eos_token_id=ends, specdec=deep)
    assert torch.equal(found, expected)


def test_turns_with_positions(llama: Any) -> None:
    """The second turn's positions go on behind a gap."""
    caches = DynamicCache(), DynamicCache()
    ids, positions = prompt(), torch.arange(9)[None] * 2
    for turn in range(3):
        pair = iter(caches)
        both = run_both(
            llama, lambda pair=pair: {CACHE: next(pair)}, input_ids=ids,
            position_ids=positions, max_new_tokens=NEW,
        )  # fmt: skip
        for mine, other in zip(caches[1].layers, caches[0].layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys, atol=1e-10, rtol=0)
        said = ids_of(both.ours)
        more = prompt(4, seed=turn)
        ids = torch.cat([said, more], dim=1)
        grown = positions[:, -1:] + 1 + torch.arange(said.shape[1] - positions.shape[1])
        behind = grown[:, -1:] + 5 + torch.arange(4)
        positions = torch.cat([positions, grown, behind], dim=1)


def test_rotary_frequencies_that_follow_the_longest_position() -> None:
    """The boundary counts positions, not tokens."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=32, hidden_size=32)
    specdec.augment(model, "prompt_lookup")
    call = {"input_ids": prompt(), "max_new_tokens": NEW}
    with fallbacks() as texts:
        got = model.generate(**call, position_ids=torch.arange(9)[None] + 12)
    assert "rotary positions" in texts[0]
    assert torch.equal(got, plain(model, **call, position_ids=torch.arange(9)[None] + 12))
    run_both(model, **call, position_ids=torch.arange(9)[None] + 5)


def test_positions_that_do_not_fit(llama: Any) -> None:
    """Whatever plain `generate` says to them, we say."""
    ids = prompt(9, 2)
    for positions in (
        torch.arange(5)[None], torch.arange(9).expand(3, -1) + 1, torch.arange(1, 10),
        torch.arange(1, 15)[None],
    ):  # fmt: skip
        outcomes = []
        for settings in (False, None):
            try:
                with fallbacks():
                    got = llama.generate(
                        ids, position_ids=positions, max_new_tokens=NEW, specdec=settings
                    )
                outcomes.append(got.tolist())
            except (RuntimeError, ValueError, IndexError) as problem:
                outcomes.append(type(problem))
        assert outcomes[0] == outcomes[1]


def test_token_types() -> None:
    """GPT-2 adds an embedding of the type; plain `generate` repeats the last one."""
    model = specdec.augment(tiny_gpt2(), "prompt_lookup")
    ids = prompt(9, 2)
    types = torch.tensor([[5] * 4 + [7] * 5, [9] * 9])
    call = {"input_ids": ids, "max_new_tokens": NEW}
    both = run_both(model, **call, token_type_ids=types)
    assert not torch.equal(both.ours, plain(model, **call)), "types change nothing"
    padded = left_padded()
    types = torch.full_like(padded["input_ids"], 3)
    run_both(model, **padded, token_type_ids=types, max_new_tokens=NEW)
