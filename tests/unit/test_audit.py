"""The audit's figures are those of a float64 run of the model's own weights."""

from __future__ import annotations

import copy

import torch

import specdec
from helpers.hf import prompt, tiny_llama
from specdec.audit.exactness import audit, reference_model


def test_the_reference_is_the_same_model_in_float64() -> None:
    model = specdec.augment(tiny_llama(torch.bfloat16), "prompt_lookup")
    reference = reference_model(model)
    assert "generate" not in vars(reference)
    assert model.dtype == torch.bfloat16
    for mine, exact in zip(model.parameters(), reference.parameters(), strict=True):
        assert exact.dtype == torch.float64
        assert torch.equal(mine.double(), exact)
        assert mine.data_ptr() != exact.data_ptr()


@torch.no_grad()
def test_regrets_are_those_of_the_exact_run() -> None:
    model = tiny_llama(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    text = torch.cat([prompt(9), prompt(6, seed=1)], 1)[0]
    found = audit(reference_model(model), model, text, 9)
    assert len(found.regrets) == len(found.noise) == 6
    for step, token in enumerate(text[9:]):
        scores = exact(input_ids=text[None, : 9 + step]).logits[0, -1]
        rounded = model(input_ids=text[None, : 9 + step]).logits[0, -1].double()
        torch.testing.assert_close(found.regrets[step], scores.max() - scores[token])
        assert 0 < float(found.noise[step]) < 10 * float((scores - rounded).abs().max())
