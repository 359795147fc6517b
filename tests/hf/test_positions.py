"""Drafts must not change or overrun positions, and odd ids must not crash drafters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from helpers.hf import VOCAB, ids_of, plain, prompt, run_both, tiny_gpt2, tiny_llama
from specdec.drafters.row import DraftRow
from specdec.errors import FallbackWarning

METHODS = ["none", "prompt_lookup", "lookahead"]


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_draft(rope_type: str) -> None:
    """Frequencies follow the longest position of a forward: speculation stops short of there."""
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 100.0}
    if rope_type == "dynamic":
        rope["factor"] = 4.0
    else:
        factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope |= {**factors, "factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=32, hidden_size=32)
    for method in METHODS:
        specdec.augment(model, method)
        with pytest.warns(FallbackWarning, match="rotary positions"):
            found = model.generate(prompt(), max_new_tokens=40, do_sample=False)
        assert torch.equal(found, plain(model, prompt(), max_new_tokens=40, do_sample=False))
        short = model.generate(prompt(), max_new_tokens=20, do_sample=False)
        assert torch.equal(short, plain(model, prompt(), max_new_tokens=20, do_sample=False))
        assert specdec.last_stats(model).mode == "tree"


@pytest.mark.parametrize("method", METHODS)
def test_learned_positions_when_eos_comes_in_time(method: str) -> None:
    """The limit allows more than the table holds; the text ends before, drafts must not pass it."""
    model = specdec.augment(tiny_gpt2(positions=32), method)
    free = plain(model, prompt(), max_new_tokens=23, do_sample=False)
    last = ids_of(free)[0, 9:].tolist()
    ends = next(token for token in reversed(last) if last.count(token) == 1)
    for rows in (1, 2):
        call = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": ends}
        ids = prompt(rows=1).expand(rows, -1)
        found = model.generate(ids, **call)
        assert torch.equal(found, plain(model, ids, **call))


@pytest.mark.parametrize("method", METHODS)
def test_beyond_the_declared_context(method: str) -> None:
    """Rotary models go on past their declared length, one token a round."""
    model = specdec.augment(tiny_llama(max_position_embeddings=24), method)
    found = model.generate(prompt(), max_new_tokens=30, do_sample=False)
    assert torch.equal(found, plain(model, prompt(), max_new_tokens=30, do_sample=False))


@pytest.mark.parametrize("method", METHODS)
def test_placeholders_in_the_ids(llama: Any, method: str) -> None:
    """Multimodal prompts hold ids that no embedding has; the embeddings are what counts."""
    ids = prompt()
    embeds = llama.get_input_embeddings()(ids)
    ids[0, 3:6] = -200
    with specdec.augmented(llama, method):
        call = {"inputs_embeds": embeds, "max_new_tokens": 20, "do_sample": False}
        found = llama.generate(ids, **call)
        assert torch.equal(found, plain(llama, ids, **call))


def test_a_drafter_of_impossible_tokens(llama: Any) -> None:
    class Wild(specdec.RowDrafter):
        class Row(DraftRow):
            def propose(self, budget: int) -> specdec.TokenTree:
                ahead = [VOCAB + 7, 3, -5, 4]
                return specdec.TokenTree([self.text[-1], *ahead, 5], [-1, 0, 1, 0, 0, 4])

    specdec.register_drafter("wild", Wild)
    with specdec.augmented(llama, "wild"):
        found = llama.generate(prompt(), max_new_tokens=20, do_sample=False)
        assert torch.equal(found, plain(llama, prompt(), max_new_tokens=20, do_sample=False))
        assert specdec.last_stats(llama).drafted_nodes > 0


@pytest.mark.parametrize("rows", [1, 2])
def test_sampling_from_nan_raises_as_plain_does(llama: Any, rows: int) -> None:
    broken = specdec.augment(tiny_llama(), "none")
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    for speculate in (True, False):
        with pytest.raises(RuntimeError, match="probability tensor contains"):
            broken.generate(
                prompt(rows=rows), max_new_tokens=5, do_sample=True,
                **({} if speculate else {"specdec": False}),
            )  # fmt: skip


def test_int32_ids_come_back_as_plain_gives_them(llama: Any) -> None:
    both = run_both(llama, input_ids=prompt().int(), max_new_tokens=5, do_sample=False)
    assert ids_of(both.ours).dtype == torch.int64


def test_dropout_runs_plain() -> None:
    model = specdec.augment(tiny_llama(attention_dropout=0.1), "lookahead").train()
    with pytest.warns(FallbackWarning, match="dropout"):
        model.generate(prompt(), max_new_tokens=5, do_sample=False)
