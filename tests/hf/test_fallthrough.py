"""Calls that run as plain `generate`: one warning that says why, and plain's own text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

import specdec
from helpers.hf import (
    STORIES,
    fallbacks,
    ids_of,
    left_padded,
    needs_stories,
    plain,
    prompt,
    tiny_gpt2,
    tiny_llama,
)
from helpers.names import CACHE

NEW = 10


class Bias(LogitsProcessor):
    """Unknown to the library: it might hold state for the whole batch."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 2 * torch.sin(torch.arange(scores.shape[1]) * input_ids.shape[1])


class Never(StoppingCriteria):
    """Unknown as well: it might look at all rows."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] > 14)


class OddCache(DynamicCache):
    """A cache class of the user's own."""


def check(model: Any, reason: str, fresh: Callable[[], dict[str, Any]] = dict, **call: Any) -> None:
    """Exactly one warning that names the reason; the ids and the generator are plain's."""
    torch.manual_seed(2)
    expected = plain(model, **call, **fresh())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    with fallbacks() as texts:
        got = model.generate(**call, **fresh())
    assert len(texts) == 1, texts
    assert "runs as plain generate, because" in texts[0]
    assert reason in texts[0]
    assert torch.equal(ids_of(got), ids_of(expected))
    assert torch.equal(torch.get_rng_state(), state)
    stats = specdec.last_stats(model)
    assert stats.mode == "plain"
    assert stats.mode_reason in texts[0]


def right_padded() -> dict[str, Tensor]:
    ids, mask = prompt(9, 2), torch.ones(2, 9, dtype=torch.long)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_right_padded_batch(llama: Any) -> None:
    check(llama, "padded on the right", **right_padded(), max_new_tokens=NEW)
    ids = right_padded()["input_ids"]
    check(llama, "padded on the right", input_ids=ids, max_new_tokens=NEW, pad_token_id=0)


def test_stop_criteria_reach_a_call_that_fell_through(llama: Any) -> None:
    ends = {"eos_token_id": [7, 20, 31, 44], "max_time": 60.0, "no_repeat_ngram_size": 2}
    check(llama, "padded on the right", **right_padded(), max_new_tokens=NEW, **ends)


@pytest.mark.parametrize(("reason", "call"), [
    ("num_beams is 2", {"num_beams": 2}),
    ("num_beams is 3", {"num_beams": 3, "num_return_sequences": 2}),
    ("num_beams is 2", {"generation_config": GenerationConfig(num_beams=2, pad_token_id=0,
                                                               max_new_tokens=NEW)}),
    ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
    ("assistant_early_exit", {"assistant_early_exit": 1}),
    ("assistant_early_exit", {"generation_config": GenerationConfig(
        assistant_early_exit=1, pad_token_id=0, max_new_tokens=NEW)}),
    ("guidance_scale is 1.5", {"guidance_scale": 1.5}),
    ("guidance_scale is 2", {"guidance_scale": 2, "negative_prompt_ids": prompt(4, seed=9)}),
    ("cache_implementation is 'offloaded'", {"cache_implementation": "offloaded"}),
    ("use_cache is False", {"use_cache": False}),
    ("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}),
])  # fmt: skip
def test_options(reason: str, call: dict[str, Any]) -> None:
    model = tiny_llama()
    if "output_attentions" in call:
        model.set_attn_implementation("eager")
    if call.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("plain generate itself needs an accelerator for an offloaded cache")
    specdec.augment(model, "prompt_lookup")
    length = {} if "generation_config" in call else {"max_new_tokens": NEW}
    check(model, reason, input_ids=prompt(), **length, **call)


def test_options_set_on_the_model(llama: Any) -> None:
    llama.generation_config.num_beams = 2
    try:
        check(llama, "num_beams is 2", input_ids=prompt(), max_new_tokens=NEW)
        with fallbacks() as texts:
            llama.generate(prompt(), max_new_tokens=NEW, num_beams=1)
        assert not texts
    finally:
        llama.generation_config.num_beams = None


def test_output_attentions_are_returned(llama: Any) -> None:
    model = tiny_llama()
    model.set_attn_implementation("eager")
    specdec.augment(model, "prompt_lookup")
    call = {"max_new_tokens": 4, "output_attentions": True, "return_dict_in_generate": True}
    expected = plain(model, prompt(), **call)
    with pytest.warns(specdec.errors.FallbackWarning):
        got = model.generate(prompt(), **call)
    assert len(got.attentions) == 4
    for mine, other in zip(got.attentions, expected.attentions, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_assistant_model(llama: Any) -> None:
    assistant = tiny_llama(num_hidden_layers=1)
    check(
        llama, "assistant_model", lambda: {"assistant_model": assistant}, input_ids=prompt(),
        max_new_tokens=NEW,
    )  # fmt: skip


def test_augmented_assistant(llama: Any) -> None:
    """Hugging Face's assisted generation drives an augmented assistant as it drives any other."""
    assistant = specdec.augment(tiny_llama(num_hidden_layers=1), "prompt_lookup")
    call = {"max_new_tokens": NEW, "assistant_model": assistant}
    expected = plain(llama, prompt(), max_new_tokens=NEW)
    with fallbacks() as texts:
        got = plain(llama, prompt(), **call)
    assert torch.equal(got, expected)
    assert not texts
    check(llama, "assistant_model", input_ids=prompt(), **call)


def test_quantized_cache(llama: Any) -> None:
    """Where no quantisation backend is installed, plain `generate` raises, and so do we."""
    call = {"input_ids": prompt(), "max_new_tokens": NEW, "cache_implementation": "quantized"}
    try:
        plain(llama, **call)
    except (ImportError, ValueError) as problem:
        with fallbacks() as texts, pytest.raises(type(problem)):
            llama.generate(**call)
        assert len(texts) == 1
    else:
        check(llama, "cache_implementation is 'quantized'", **call)


def test_cache_class_of_the_users_own(llama: Any) -> None:
    check(
        llama, "the call uses a OddCache", lambda: {CACHE: OddCache()},
        input_ids=prompt(), max_new_tokens=NEW,
    )  # fmt: skip


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "top_k": 0}])
def test_unknown_processor_in_a_batch(llama: Any, sampled: dict[str, Any]) -> None:
    check(
        llama, "Bias may hold state for the whole batch", lambda: {"logits_processor": [Bias()]},
        **left_padded(), max_new_tokens=NEW, **sampled,
    )  # fmt: skip


def test_prefix_allowed_tokens_fn_in_a_batch(llama: Any) -> None:
    def allowed(batch: int, ids: Tensor) -> list[int]:
        return list(range(3 + batch, 60, 2))

    check(
        llama, "PrefixConstrainedLogitsProcessor", input_ids=prompt(9, 2), max_new_tokens=NEW,
        prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip


def test_unknown_criterion_in_a_batch(llama: Any) -> None:
    check(
        llama, "the stopping criterion Never may look at the whole batch",
        lambda: {"stopping_criteria": [Never()]}, **left_padded(), max_new_tokens=NEW,
        eos_token_id=63,
    )  # fmt: skip


def test_batch_that_ends_by_time_without_an_eos(llama: Any) -> None:
    check(llama, "without an EOS", **left_padded(), max_new_tokens=NEW, max_time=60.0)


def test_unknown_model_input() -> None:
    model = specdec.augment(tiny_gpt2(), "prompt_lookup")
    check(
        model, "'encoder_attention_mask'", input_ids=prompt(), max_new_tokens=NEW,
        encoder_attention_mask=torch.ones(1, 3),
    )  # fmt: skip


def test_holes_in_the_mask_of_a_windowed_model(gemma3: Any) -> None:
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 4:6] = 0
    check(gemma3, "holes", input_ids=prompt(12), attention_mask=mask, max_new_tokens=NEW)


def test_holes_that_a_cache_of_the_users_own_would_keep(llama: Any) -> None:
    """Plain `generate` fills masked slots as well, and a later mask may show them."""
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 4:6] = 0
    check(
        llama, "has holes", lambda: {CACHE: DynamicCache()}, input_ids=prompt(12),
        attention_mask=mask, max_new_tokens=NEW,
    )  # fmt: skip


def test_holes_in_the_mask_of_a_full_model_still_speculate(llama: Any) -> None:
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 4:6] = 0
    call = {"attention_mask": mask, "max_new_tokens": NEW}
    with fallbacks() as texts:
        got = llama.generate(prompt(12), **call)
    assert torch.equal(got, plain(llama, prompt(12), **call))
    assert not texts


def test_custom_generate_of_the_users_own(llama: Any) -> None:
    def shout(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return torch.cat([input_ids, input_ids.new_full((len(input_ids), 3), 42)], dim=1)

    check(llama, "custom_generate", input_ids=prompt(), max_new_tokens=NEW, custom_generate=shout)


@needs_stories
def test_token_healing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    specdec.augment(model, "prompt_lookup")
    ids = tokenizer("Once upon a time there wa", return_tensors="pt").input_ids
    call = {"input_ids": ids, "max_new_tokens": 8, "token_healing": True, "tokenizer": tokenizer}
    check(model, "token_healing", **call)


def test_streamer_reaches_a_call_that_fell_through(llama: Any) -> None:
    class Chunks:
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ended += 1

    for call in ({"use_cache": False}, {CACHE: OddCache()}):
        streamer = Chunks()
        with pytest.warns(specdec.errors.FallbackWarning):
            got = llama.generate(prompt(), max_new_tokens=NEW, streamer=streamer, **call)
        assert streamer.ids == got[0].tolist()
        assert streamer.ended == 1


def test_warnings_are_not_swallowed_on_repetition(llama: Any) -> None:
    """Each call warns once; Python's own filter decides what the user sees."""
    with fallbacks() as texts:
        for _ in range(3):
            llama.generate(prompt(), max_new_tokens=2, use_cache=False)
    assert len(texts) == 3


def test_calls_that_must_not_warn(llama: Any) -> None:
    with fallbacks() as texts:
        llama.generate(prompt(), max_new_tokens=2, num_beams=1, guidance_scale=1.0, use_cache=True)
        llama.generate(prompt(), max_new_tokens=2, cache_implementation="dynamic")
        llama.generate(prompt(), max_new_tokens=2, output_attentions=False, synced_gpus=False)
        llama.generate(prompt(), max_new_tokens=2, custom_generate=None, assistant_model=None)
        llama.generate(prompt(), max_new_tokens=2, logits_processor=[Bias()])
    assert not texts
