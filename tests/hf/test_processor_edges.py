"""Processors that write into what they are given, and penalties that must skip the padding."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

import specdec
from helpers.hf import ids_of, left_padded, oracle, plain, prompt, run_both, tiny_llama

NEW = 16


class Shouting(LogitsProcessor):
    """Changes the scores in place, more with every token of the text."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores.mul_(1 + input_ids.shape[1] % 4)
        scores[:, int(input_ids[0, -1])] += 5
        return scores


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "top_k": 0}])
def test_in_place_changes_do_not_reach_the_logits(sampled: dict[str, Any]) -> None:
    """In float32 the scores need no conversion, so only a copy keeps the two apart.

    (Plain `generate` reports as `logits` what the processor left of them.)
    """
    model = specdec.augment(tiny_llama(torch.float32), "prompt_lookup")
    call = {
        "max_new_tokens": NEW, "output_logits": True, "output_scores": True,
        "return_dict_in_generate": True, **sampled,
    }  # fmt: skip
    torch.manual_seed(0)
    wanted = plain(model, prompt(), **call, logits_processor=[Shouting()])
    torch.manual_seed(0)
    got = model.generate(prompt(), **call, logits_processor=[Shouting()], specdec=oracle(wanted, 9))
    assert torch.equal(got.sequences, wanted.sequences)
    for mine, other in zip(got.scores, wanted.scores, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        exact = model(input_ids=got.sequences[:, :-1], use_cache=False).logits[0, 8:]
    torch.testing.assert_close(torch.cat(got.logits), exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "top_k": 0}])
def test_padding_is_not_a_repetition(llama: Any, sampled: dict[str, Any]) -> None:
    """The padding id is one that every row likes to say: a penalty for padding would be seen."""
    inputs = left_padded((9, 4, 6, 1))
    torch.manual_seed(1)
    free = plain(llama, **inputs, max_new_tokens=NEW, repetition_penalty=1.2, **sampled)
    said = Counter(ids_of(free)[1:, 9:].flatten().tolist())
    for pad, _ in said.most_common(4):
        inputs["input_ids"][inputs["attention_mask"] == 0] = pad
        run_both(llama, **inputs, max_new_tokens=NEW, repetition_penalty=1.2, pad_token_id=pad,
                 **sampled)  # fmt: skip
