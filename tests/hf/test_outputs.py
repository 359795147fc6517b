"""What `return_dict_in_generate` returns, value by value, and that collecting it is cheap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

import specdec
from helpers.hf import Both, left_padded, oracle, plain, prompt, run_both, tiny_llama
from helpers.names import CACHE, cache_of
from specdec.generate.outputs import Recorder
from specdec.round import noise

NEW = 16
EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}
SAMPLED = {"do_sample": True, "top_k": 20, "temperature": 1.5}


def compare_steps(both: Both, name: str) -> None:
    """Equal everywhere, at the padding of rows that have ended, too."""
    ours, theirs = getattr(both.ours, name), getattr(both.plain, name)
    assert isinstance(ours, tuple)
    assert len(ours) == len(theirs) == both.ours.sequences.shape[1] - 9
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-6)


def compare_hidden(both: Both) -> None:
    """Equal everywhere, at the padding in front of a prompt and behind a text, too."""
    ours, theirs = both.ours.hidden_states, both.plain.hidden_states
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == len(other)
        for layer, reference in zip(mine, other, strict=True):
            assert layer.dtype == reference.dtype
            torch.testing.assert_close(layer, reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize("sampled", [{}, SAMPLED])
@pytest.mark.parametrize("batch", [1, 4])
def test_everything(llama: Any, sampled: dict[str, Any], batch: int) -> None:
    inputs = left_padded((9, 9, 4, 2)) if batch == 4 else {"input_ids": prompt()}
    if batch == 4:
        inputs["input_ids"][inputs["attention_mask"] == 0] = 2  # the embedding of 0 is zero
    ends = {5, 17, 40, 11}
    both = run_both(
        llama, **inputs, **EVERYTHING, **sampled, max_new_tokens=NEW, eos_token_id=sorted(ends)
    )
    assert type(both.ours) is GenerateDecoderOnlyOutput
    assert set(both.ours.keys()) == set(both.plain.keys())
    compare_steps(both, "scores")
    compare_steps(both, "logits")
    compare_hidden(both)


def test_each_output_alone(llama: Any) -> None:
    for name in ("output_scores", "output_logits", "output_hidden_states"):
        both = run_both(
            llama, input_ids=prompt(), max_new_tokens=NEW, return_dict_in_generate=True,
            **{name: True},
        )  # fmt: skip
        assert set(both.ours.keys()) == set(both.plain.keys())
    both = run_both(llama, input_ids=prompt(), max_new_tokens=NEW, return_dict_in_generate=True)
    assert both.ours.scores is None
    assert both.ours.hidden_states is None


def test_outputs_without_a_dict_are_ignored(llama: Any) -> None:
    both = run_both(llama, input_ids=prompt(), max_new_tokens=NEW, output_scores=True)
    assert isinstance(both.ours, Tensor)


def test_outputs_of_a_single_token(llama: Any) -> None:
    both = run_both(llama, input_ids=prompt(), max_new_tokens=1, **EVERYTHING)
    compare_steps(both, "scores")
    compare_hidden(both)


def test_scores_with_a_prefix_dependent_processor(llama: Any) -> None:
    for inputs in ({"input_ids": prompt()}, left_padded()):
        both = run_both(
            llama, **inputs, **EVERYTHING, max_new_tokens=NEW, repetition_penalty=1.4,
            no_repeat_ngram_size=2,
        )  # fmt: skip
        compare_steps(both, "scores")
        compare_steps(both, "logits")


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_other_families(request: pytest.FixtureRequest, name: str) -> None:
    model = request.getfixturevalue(name)
    inputs = left_padded((9, 3))
    both = run_both(model, **inputs, **EVERYTHING, max_new_tokens=NEW)
    compare_steps(both, "scores")
    compare_hidden(both)


def test_rows_that_end_early_with_a_prefix_dependent_processor(llama: Any) -> None:
    """The padding is in the prefix that processors see, as in plain generate."""
    wanted = plain(llama, **left_padded((9, 4, 2)), max_new_tokens=NEW, repetition_penalty=1.4)
    ends = [int(row[9 + at]) for row, at in zip(wanted, (2, 5, 9), strict=True)]
    both = run_both(
        llama, **left_padded((9, 4, 2)), **EVERYTHING, max_new_tokens=NEW, repetition_penalty=1.4,
        eos_token_id=ends, pad_token_id=2,
    )  # fmt: skip
    assert 2 in both.ours.sequences[:, -1]
    for name in ("scores", "logits"):
        compare_steps(both, name)
    compare_hidden(both)


@pytest.mark.parametrize("chunk", [3, 7])
def test_hidden_states_of_padding_in_chunks_and_behind_a_cache(llama: Any, chunk: int) -> None:
    """A padded prompt in pieces, and a second turn whose first one is in the user's cache."""
    inputs = left_padded((9, 4))
    inputs["input_ids"][inputs["attention_mask"] == 0] = 2  # the embedding of 0 is zero
    both = run_both(llama, **inputs, **EVERYTHING, max_new_tokens=4, prefill_chunk_size=chunk)
    compare_hidden(both)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 7, dtype=torch.long)], 1)
    ids = torch.cat([both.plain.sequences, prompt(3, rows=2, seed=5)], 1)
    caches = iter([cache_of(both.plain), cache_of(both.ours)])
    again = run_both(llama, lambda: {CACHE: next(caches)}, input_ids=ids, attention_mask=mask,
                     **EVERYTHING, max_new_tokens=NEW)  # fmt: skip
    compare_hidden(again)


@pytest.mark.parametrize("chunk", [3, 7])
def test_hidden_states_of_a_chunked_prefill(llama: Any, chunk: int) -> None:
    expected = plain(llama, prompt(), **EVERYTHING, max_new_tokens=NEW, prefill_chunk_size=chunk)
    got = llama.generate(prompt(), **EVERYTHING, max_new_tokens=NEW, prefill_chunk_size=chunk,
                         specdec=oracle(expected, 9))  # fmt: skip
    assert torch.equal(got.sequences, expected.sequences)
    assert [len(step) for step in got.hidden_states] == [len(s) for s in expected.hidden_states]
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        for layer, reference in zip(mine, other, strict=True):
            torch.testing.assert_close(layer, reference, atol=1e-10, rtol=0)


def test_returned_cache_is_reusable(llama: Any) -> None:
    """The cache equals plain's, and a second turn that reuses it says what plain says."""
    both = run_both(llama, input_ids=prompt(), max_new_tokens=NEW, return_dict_in_generate=True)
    ours, theirs = cache_of(both.ours), cache_of(both.plain)
    assert type(ours) is type(theirs)
    assert ours.get_seq_length() == theirs.get_seq_length() == 9 + NEW - 1
    for layer, reference in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(layer.keys, reference.keys, atol=1e-10, rtol=0)
        torch.testing.assert_close(layer.values, reference.values, atol=1e-10, rtol=0)
    ids = torch.cat([both.plain.sequences, prompt(5, seed=3)], dim=1)
    caches = iter([theirs, ours])
    run_both(llama, lambda: {CACHE: next(caches)}, input_ids=ids, max_new_tokens=NEW)


def test_recorder_does_not_keep_whole_trees_alive(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept row must not be a view of its round's [B, T, V] logits or [B, T, H] hidden states."""
    kept: list[Tensor] = []
    outputs = Recorder.outputs

    def watched(self: Any, steps: int) -> dict[str, Any]:
        kept.extend([*self._scores[0], *self._logits[0]])
        kept.extend(layer for node in self._hidden[0] for layer in node)
        return outputs(self, steps)

    monkeypatch.setattr(Recorder, "outputs", watched)
    for settings in ({}, {"no_repeat_ngram_size": 3}):
        expected = plain(llama, prompt(), max_new_tokens=NEW, **settings)
        llama.generate(
            prompt(), **EVERYTHING, **settings, max_new_tokens=NEW, specdec=oracle(expected, 9)
        )
    assert len(kept) == 2 * (NEW + NEW + 3 * (NEW - 1))
    for value in kept:
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_long_generation_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 tokens: noise is dropped as it is used, and buffers fit the text."""
    model = specdec.augment(tiny_llama(torch.float32, num_hidden_layers=1), "prompt_lookup")
    held, step = [], noise.NoiseTape.step

    def watched(self: Any, index: int, vocab_size: int) -> Tensor:
        draw = step(self, index, vocab_size)
        held.append(len(self._draws))
        return draw

    torch.manual_seed(0)
    expected = plain(model, prompt(), max_new_tokens=2000, do_sample=True, temperature=0.6)
    with monkeypatch.context() as patch:
        patch.setattr(noise.NoiseTape, "step", watched)
        torch.manual_seed(0)
        got = model.generate(
            prompt(), max_new_tokens=2000, do_sample=True, temperature=0.6,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert got.sequences.shape == expected.shape == (1, 2009)
    assert torch.equal(got.sequences[:, :200], expected[:, :200])  # float32: later, ties may differ
    assert max(held) <= 16
    for layer in cache_of(got).layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.shape[2] == 2008
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    stats = specdec.last_stats(model)
    assert stats.new_tokens == 2000
    assert not vars(model)["_specdec"].memory
