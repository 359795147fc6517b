"""The regret rule passes rounding and catches real faults."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.audit.exactness import audit, reference_model, replay_noise
from specdec.round.tree import TreeBatch

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


class _Uncopied:
    """Something heavy that `augment` keeps."""

    def __deepcopy__(self, memo: object) -> object:
        raise AssertionError("copied")


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_copy_has_the_weights_and_nothing_of_augment(
    model: LlamaForCausalLM, device: str | None
) -> None:
    with specdec.augmented(model, "none"):
        vars(model)["_specdec"].memory["head"] = _Uncopied()
        found = reference_model(model, device)
    assert not {"generate", "_specdec"} & set(vars(found))
    assert found.lm_head.weight is found.get_output_embeddings().weight
    own = dict(model.named_parameters())
    for name, weight in found.named_parameters():
        assert type(weight) is torch.nn.Parameter
        assert weight.dtype == torch.float64
        assert torch.equal(weight, own[name].double())
    assert all(b.dtype == torch.float64 for b in found.buffers() if b.is_floating_point())
    assert model.dtype == torch.bfloat16


def test_weights_move_before_they_are_widened(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own device may have no room for fp64 weights, or no fp64."""
    seen: list[torch.device] = []
    real = torch.Tensor.double

    def double(weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight.device)
        return real(weight)

    monkeypatch.setattr(torch.Tensor, "double", double)
    found = reference_model(model, "meta")
    assert {weight.device.type for weight in found.parameters()} == {"meta"}
    assert {device.type for device in seen} == {"meta"}
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def test_tied_weights_stay_tied_and_fp64_is_copied() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    tied = LlamaForCausalLM(config).double()
    found = reference_model(tied)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.lm_head.weight.data_ptr() != tied.lm_head.weight.data_ptr()


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
