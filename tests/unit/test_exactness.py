"""The regret rule passes rounding and catches real faults."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.exactness import audit, reference_model, replay_noise
from specdec.tree import TreeBatch

TOKENS = 60


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


PROMPT = torch.arange(2, 14)[None]


@pytest.mark.parametrize("sample", [False, True])
def test_bf16_stays_within_twice_the_noise(model: LlamaForCausalLM, sample: bool) -> None:
    options = {"do_sample": sample} | ({"top_k": 0, "top_p": 1.0} if sample else {})
    with specdec.augmented(model, "lookahead", window=4, ngram=4, guesses=4):
        torch.manual_seed(5)
        text = model.generate(PROMPT, max_new_tokens=TOKENS, **options)[0]
    noise = replay_noise(5, TOKENS, 256, text.device) if sample else None
    found = audit(reference_model(model), model, text, PROMPT.shape[1], noise)
    assert len(found.regrets) == TOKENS
    assert found.violations == 0
    assert float(found.noise.max()) > 0


def test_a_wrong_mask_is_caught(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings that see each other: the text stays fluent, the rule does not."""
    right = TreeBatch.ancestor_mask

    def everybody_before(self: TreeBatch) -> torch.Tensor:
        return torch.ones_like(right(self)).tril()

    with specdec.augmented(model, "lookahead", window=4, ngram=4, guesses=4):
        monkeypatch.setattr(TreeBatch, "ancestor_mask", everybody_before)
        text = model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False)[0]
    monkeypatch.undo()
    assert audit(reference_model(model), model, text, PROMPT.shape[1]).violations > 0


def test_a_wrong_token_is_caught(model: LlamaForCausalLM) -> None:
    text = model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False)[0]
    text[20] = (text[20] + 1) % 256
    found = audit(reference_model(model), model, text, PROMPT.shape[1])
    assert found.violations > 0
    assert found.worst_ratio > 2
