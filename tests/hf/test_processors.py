"""Greedy decoding, sampling and logits processors, stateful ones included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from helpers.hf import VOCAB, left_padded, prompt, run_both
from specdec.generate import call
from specdec.hf import compat
from specdec.round import verify
from specdec.round.pickers import picker_of

NEW = 20
SAMPLED = {"do_sample": True, "top_k": 0}


class Grammar(LogitsProcessor):
    """A state machine that moves once per call, so that one call too many changes the text."""

    def __init__(self) -> None:
        self.state = 0
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids[0].tolist())
        self.state = (3 * self.state + int(input_ids[0, -1])) % 4
        allowed = torch.arange(scores.shape[1]) % 4 == self.state
        return scores.masked_fill(~allowed, float("-inf"))


@pytest.mark.parametrize("chain", [False, True])
def test_greedy(llama: Any, chain: bool) -> None:
    both = run_both(llama, options={"chain": chain}, input_ids=prompt(), max_new_tokens=NEW)
    assert both.stats.rounds == 4  # one token from the prefill, then five a round
    assert both.stats.histogram == {5: 3, 4: 1}


@pytest.mark.parametrize("settings", [
    {},
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"typical_p": 0.8},
    {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "min_new_tokens": 9},
    {"renormalize_logits": True, "remove_invalid_values": True},
])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 4])
def test_sampling_with_the_same_seed(llama: Any, settings: dict[str, Any], batch: int) -> None:
    inputs = left_padded() if batch == 4 else {"input_ids": prompt()}
    run_both(llama, **inputs, **{**SAMPLED, **settings}, max_new_tokens=NEW, eos_token_id=[11, 12])


@pytest.mark.parametrize("settings", [
    {"bad_words_ids": [[5], [7, 8]]},
    {"suppress_tokens": [3, 4, 5], "begin_suppress_tokens": [9, 10]},
    {"forced_eos_token_id": 12, "eos_token_id": 12},
    {"forced_bos_token_id": 3},
    {"sequence_bias": {(5,): 3.0, (6, 7): 2.0}},
    {"min_length": 25, "eos_token_id": list(range(3, 40))},
    {"min_new_tokens": 7, "eos_token_id": list(range(3, 40))},
    {"exponential_decay_length_penalty": (4, 1.2), "eos_token_id": 13},
])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 4])
def test_prefix_dependent_processors(llama: Any, settings: dict[str, Any], batch: int) -> None:
    inputs = left_padded() if batch == 4 else {"input_ids": prompt()}
    run_both(llama, **inputs, **settings, max_new_tokens=NEW)


@pytest.mark.parametrize("sampled", [{}, SAMPLED])
def test_stateful_processor_sees_each_emitted_prefix_once(
    llama: Any, sampled: dict[str, Any]
) -> None:
    made: list[Grammar] = []

    def fresh() -> dict[str, Any]:
        made.append(Grammar())
        return {"logits_processor": LogitsProcessorList([made[-1]])}

    both = run_both(llama, fresh, input_ids=prompt(), max_new_tokens=NEW, **sampled)
    theirs, ours = made
    ids = both.ours[0].tolist()
    assert ours.seen == [ids[:length] for length in range(9, 9 + NEW)]
    assert ours.seen == theirs.seen
    assert ours.state == theirs.state


def test_stateful_processor_stops_with_the_text(llama: Any) -> None:
    """No call beyond an EOS in the middle of an accepted path."""
    made: list[Grammar] = []

    def fresh() -> dict[str, Any]:
        made.append(Grammar())
        return {"logits_processor": LogitsProcessorList([made[-1]])}

    free = run_both(llama, fresh, input_ids=prompt(), max_new_tokens=NEW)
    end = int(free.ours[0, 9 + 7])
    both = run_both(llama, fresh, input_ids=prompt(), max_new_tokens=NEW, eos_token_id=end)
    assert len(made[-1].seen) == both.ours.shape[1] - 9
    assert made[-1].seen == made[-2].seen


def test_prefix_allowed_tokens_fn(llama: Any) -> None:
    calls: list[tuple[int, list[int]]] = []

    def allowed(batch: int, ids: Tensor) -> list[int]:
        calls.append((batch, ids.tolist()))
        return [token for token in range(3, VOCAB) if (token + len(ids)) % 3]

    both = run_both(llama, input_ids=prompt(), max_new_tokens=NEW, prefix_allowed_tokens_fn=allowed)
    ids = both.ours[0].tolist()
    assert calls[NEW:] == [(0, ids[:length]) for length in range(9, 9 + NEW)]


def test_processor_that_writes_in_place(llama: Any) -> None:
    class InPlace(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, int(input_ids[0, -1])] += 5
            return scores

    both = run_both(
        llama, lambda: {"logits_processor": LogitsProcessorList([InPlace()])},
        input_ids=prompt(), max_new_tokens=NEW, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for ours, theirs in zip(both.ours.scores, both.plain.scores, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_list_of_processors_that_is_not_a_processor_list(llama: Any) -> None:
    run_both(
        llama, lambda: {"logits_processor": [Grammar()]}, input_ids=prompt(), max_new_tokens=NEW
    )


@pytest.mark.parametrize("sampled", [{}, SAMPLED])
@pytest.mark.parametrize("padded", [False, True])
def test_num_return_sequences(llama: Any, sampled: dict[str, Any], padded: bool) -> None:
    if not sampled:
        with pytest.raises(ValueError, match="num_return_sequences"):
            llama.generate(prompt(), max_new_tokens=NEW, num_return_sequences=3)
        return
    inputs = left_padded((9, 4)) if padded else {"input_ids": prompt()}
    both = run_both(
        llama, **inputs, **sampled, max_new_tokens=NEW, num_return_sequences=3, eos_token_id=[5, 6]
    )
    assert both.ours.shape[0] == 6 if padded else 3


@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("sampled", [{}, SAMPLED])
def test_left_padded_batches(llama: Any, pad: int, sampled: dict[str, Any]) -> None:
    """Padding that equals EOS too."""
    inputs = left_padded((9, 4, 6, 1, 9))
    inputs["input_ids"][inputs["attention_mask"] == 0] = pad
    ends = {"pad_token_id": pad, "eos_token_id": [5, 23, 40, 41]}
    run_both(llama, **inputs, **sampled, **ends, max_new_tokens=30)


def test_left_padding_found_by_generate_itself(llama: Any) -> None:
    """Without a mask, `generate` reads it off the padding id."""
    ids = left_padded()["input_ids"]
    run_both(llama, input_ids=ids, max_new_tokens=NEW, pad_token_id=0, eos_token_id=5)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Picks at all nodes at once and walks without host loops, as where launches are dear."""

    def picker(processors: Any, *args: Any, needs_prefix: bool, **kwargs: Any) -> Any:
        kwargs["along_path"] = not compat.all_stateless(processors or [])
        return picker_of(processors, *args, needs_prefix=needs_prefix, **kwargs)

    monkeypatch.setattr(call, "picker_of", picker)
    monkeypatch.setattr(verify, "walk_on_host", verify.walk_on_device)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("settings", [
    {},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 9, "top_p": 0.8, "temperature": 1.7},
    {"do_sample": True, "top_k": 0, "no_repeat_ngram_size": 2},
    {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "output_scores": True},
])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 4])
def test_all_nodes_at_once(llama: Any, settings: dict[str, Any], batch: int) -> None:
    """Noise drawn too far goes back: the generator ends where plain generate leaves it."""
    inputs = left_padded() if batch == 4 else {"input_ids": prompt()}
    for length in (1, 2, 6, NEW):
        run_both(llama, **inputs, **settings, max_new_tokens=length, eos_token_id=[11, 12, 30])


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
@pytest.mark.parametrize("sampled", [{}, SAMPLED])
def test_windows_and_learned_positions(
    request: pytest.FixtureRequest, name: str, sampled: dict[str, Any]
) -> None:
    model = request.getfixturevalue(name)
    run_both(model, input_ids=prompt(20), **sampled, max_new_tokens=40)
    run_both(model, **left_padded((20, 3)), **sampled, max_new_tokens=40, eos_token_id=5)


def test_learned_positions_up_to_the_last_row(gpt2: Any) -> None:
    """Drafts beyond the position table must not be looked up."""
    run_both(gpt2, input_ids=prompt(60), max_new_tokens=4)
    both = run_both(gpt2, input_ids=prompt(30), max_new_tokens=34)
    assert both.ours.shape[1] == 64


def test_train_mode_without_dropout(llama: Any) -> None:
    llama.train()
    try:
        run_both(llama, input_ids=prompt(), max_new_tokens=NEW)
        assert llama.training
    finally:
        llama.eval()
