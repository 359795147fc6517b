"""Vision-language models: the text behind an image is plain's, in tree and in chain mode."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import specdec
from helpers.hf import fallbacks, ids_of, oracle, plain
from helpers.names import CACHE, cache_of
from helpers.vision import IMAGE_ID, ONE, TREES, TWO, VISION, batched, image_prompt, vision_model
from specdec import RowDrafter, TokenTree
from specdec.api import capability
from specdec.contracts import Needs
from specdec.drafters.row import DraftRow
from specdec.generate import fallback
from specdec.hf.attention import BORROWED, dense_attention
from specdec.targets.prompts import PaddedPrompt

NEW = 24
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
SAMPLED: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0}
every_family = pytest.mark.parametrize("name", VISION)
every_tree = pytest.mark.parametrize("name", TREES)


def augmented_model(name: str) -> Any:
    """The family's model, which speculates by prompt lookup."""
    model = vision_model(name)
    if "_specdec" not in "".join(vars(model)):
        specdec.augment(model, "prompt_lookup")
    return model


def same_text(model: Any, settings: Any, **call: Any) -> specdec.GenerationStats:
    """Plain and one method from the same seed; the text, the generator and the mode."""
    torch.manual_seed(3)
    expected = plain(model, **call)
    state = torch.get_rng_state()
    if settings == "oracle":
        width = call["input_ids"].shape[1]
        beyond = torch.cat([ids_of(expected), ids_of(expected)[:, -1:].expand(-1, 4)], dim=1)
        settings = oracle(beyond, width, chain=capability(model).mode == "chain")
    torch.manual_seed(3)
    with fallbacks() as texts:
        got = model.generate(**call, specdec=settings)
    assert not texts, texts
    assert ids_of(got).tolist() == ids_of(expected).tolist()
    assert torch.equal(torch.get_rng_state(), state)
    stats = specdec.last_stats(model)
    assert stats.mode == capability(model).mode
    return stats


@every_family
def test_self_test(name: str) -> None:
    found = capability(augmented_model(name))
    assert found.mode == VISION[name].mode, found.reason


@every_family
@pytest.mark.parametrize(
    ("sizes", "decoding"),
    [(ONE, SAMPLED), (TWO, GREEDY), (((8, 8),), SAMPLED)],
    ids=["one", "two", "large"],
)
def test_text(name: str, sizes: Sequence[tuple[int, int]], decoding: dict[str, Any]) -> None:
    model, inputs = augmented_model(name), image_prompt(name, sizes)
    for method in ("none", "prompt_lookup", "lookahead"):
        same_text(model, specdec.SpecConfig(method), **inputs, **decoding)
    stats = same_text(model, "oracle", **inputs, **decoding)
    assert stats.rounds <= NEW // 2, "nothing was accepted"


@every_family
@pytest.mark.parametrize("method", ["recycling", "suffix", "jacobi"])
def test_other_methods(name: str, method: str) -> None:
    """Ids of images, some beyond the vocabulary, are in the prompts that drafters learn from."""
    model, settings = augmented_model(name), specdec.SpecConfig(method)
    same_text(model, settings, **image_prompt(name, TWO), **GREEDY)
    same_text(model, settings, **image_prompt(name, TWO), **SAMPLED)


def test_a_video() -> None:
    """Several frames, and seconds between them that only positions know of."""
    model, inputs = augmented_model("qwen2_5_vl"), image_prompt("qwen2_5_vl", ((8, 4),))
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    video = {
        "input_ids": ids.masked_fill(ids == IMAGE_ID, 91),
        "attention_mask": inputs["attention_mask"],
        "mm_token_type_ids": types * 2,
        "pixel_values_videos": inputs["pixel_values"],
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    for seconds in ({}, {"second_per_grid_ts": torch.tensor([2.0])}):
        same_text(model, "oracle", **video, **seconds, **GREEDY)
        same_text(model, "oracle", **video, **seconds, **SAMPLED)


@every_tree
def test_the_image_is_seen(name: str) -> None:
    """Other pixels, another text: or the tests above would show nothing."""
    model = augmented_model(name)
    first, second = image_prompt(name), image_prompt(name)
    second["pixel_values"] = second["pixel_values"].flip(0) * -1.5
    assert not torch.equal(model.generate(**first, **GREEDY), model.generate(**second, **GREEDY))


@every_family
def test_text_alone_before_and_after_an_image(name: str) -> None:
    """Some models keep the position offset of their last image."""
    model = VISION[name].build(torch.float64)
    specdec.augment(model, "prompt_lookup")
    text = {"input_ids": image_prompt(name, ())["input_ids"].repeat(1, 2)}
    before = model.generate(**text, **GREEDY)
    same_text(model, "oracle", **image_prompt(name, TWO), **GREEDY)
    specdec.augment(model, "prompt_lookup")
    assert capability(model).mode == VISION[name].mode
    assert capability(model).noise < 1e-4
    same_text(model, "oracle", **image_prompt(name, TWO), **GREEDY)
    same_text(model, "oracle", **text, **GREEDY)
    assert torch.equal(model.generate(**text, **GREEDY), before)
    same_text(model, "oracle", **text, **SAMPLED)


@every_tree
def test_batches(name: str) -> None:
    """Rows of one length, and left-padded ones with images of different sizes or none."""
    model = augmented_model(name)
    same = [image_prompt(name, ONE, seed) for seed in (1, 2)]
    same_text(model, "oracle", **batched(same), **GREEDY)
    rows = [image_prompt(name, ONE, 1), image_prompt(name, ONE, 2, words=3)]
    if name not in ("idefics3", "smolvlm"):  # these want as many images in every row
        rows += [image_prompt(name, TWO, 3), image_prompt(name, (), 4)]
    for decoding in (GREEDY, SAMPLED):
        same_text(model, "oracle", **batched(rows), **decoding)
        same_text(model, specdec.SpecConfig("prompt_lookup"), **batched(rows), **decoding)


def test_batches_in_chain_mode() -> None:
    model = augmented_model("qwen3_5")
    rows = [image_prompt("qwen3_5", ONE, 1), image_prompt("qwen3_5", TWO, 2, words=3)]
    same_text(model, "oracle", **batched(rows), **GREEDY)


@every_tree
def test_return_sequences_and_outputs(name: str) -> None:
    """Scores, logits, hidden states and the cache are those of plain `generate`."""
    model, inputs = augmented_model(name), image_prompt(name, TWO)
    same_text(model, "oracle", **inputs, **SAMPLED, num_return_sequences=2)
    wanted = {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
        "output_hidden_states": True,
    }  # fmt: skip
    expected = plain(model, **inputs, **GREEDY, **wanted)
    settings = oracle(expected, inputs["input_ids"].shape[1])
    got = model.generate(**inputs, **GREEDY, **wanted, specdec=settings)
    assert specdec.last_stats(model).mode == "tree"
    assert torch.equal(got.sequences, expected.sequences)
    for field in ("scores", "logits"):
        for mine, other in zip(got[field], expected[field], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    for step, reference in zip(got.hidden_states, expected.hidden_states, strict=True):
        for mine, other in zip(step, reference, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-9, rtol=0)
    same_cache(cache_of(got), cache_of(expected))


def same_cache(ours: Any, theirs: Any) -> None:
    """Same layers, lengths and contents."""
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert mine.get_mask_sizes(1) == other.get_mask_sizes(1)
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-9, rtol=0)
        torch.testing.assert_close(mine.values, other.values, atol=1e-9, rtol=0)


def plain_or_skip(model: Any, **call: Any) -> Any:
    """What plain `generate` returns; older releases fail with some caches and images."""
    try:
        return plain(model, **call)
    except (ValueError, RuntimeError, IndexError) as problem:
        pytest.skip(f"plain generate cannot: {str(problem)[:60]}")


def next_turn(name: str, said: Tensor, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """All ids so far and a new prompt, of which only the images are given."""
    more = image_prompt(name, sizes, seed=7)
    ids = torch.cat([said, more["input_ids"]], dim=1)
    inputs = {**more, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = VISION[name].types
    if types:
        inputs[types] = torch.cat([torch.zeros_like(said), more[types]], dim=1)
    return inputs


@pytest.mark.parametrize("kind", ["dynamic", "with_config", "static"])
@every_tree
def test_turns_with_one_cache(name: str, kind: str) -> None:
    """An image, then text, then another image, all in one cache of the user's own."""
    model = augmented_model(name)

    def fresh() -> Any:
        if kind == "static":
            return StaticCache(config=model.config, max_cache_len=256)
        return DynamicCache(config=model.config if kind == "with_config" else None)

    theirs, ours = fresh(), fresh()
    inputs = image_prompt(name)
    for sizes in ((), ONE, ()):
        call = {**inputs, "max_new_tokens": 8, "do_sample": False}
        expected = plain_or_skip(model, **call, **{CACHE: theirs})
        settings = oracle(expected, inputs["input_ids"].shape[1])
        with fallbacks() as texts:
            got = model.generate(**call, **{CACHE: ours}, specdec=settings)
        assert not texts
        assert torch.equal(got, expected)
        same_cache(ours, theirs)
        inputs = next_turn(name, got, sizes)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_exception_leaves_the_users_cache_alone(name: str, kind: str) -> None:
    model, inputs = augmented_model(name), image_prompt(name)
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=256)
    plain_or_skip(model, **inputs, max_new_tokens=6, **{CACHE: copy.deepcopy(cache)})
    said = model.generate(**inputs, max_new_tokens=6, **{CACHE: cache})
    before = [(layer.keys.clone(), int(layer.get_seq_length())) for layer in cache.layers]
    inputs = next_turn(name, said, ONE)
    plain_or_skip(model, **inputs, **GREEDY, **{CACHE: copy.deepcopy(cache)})

    def broken(batch: int, ids: Tensor) -> list[int]:
        if len(ids) > inputs["input_ids"].shape[1] + 3:
            raise RuntimeError("the user's function fails")
        return list(range(3, 80))

    with pytest.raises(RuntimeError, match="the user's function"):
        model.generate(**inputs, **GREEDY, **{CACHE: cache}, prefix_allowed_tokens_fn=broken)
    for (keys, count), layer in zip(before, cache.layers, strict=True):
        assert torch.equal(keys, layer.keys)
        assert layer.get_seq_length() == count


@every_tree
def test_static_cache(name: str) -> None:
    model, inputs = augmented_model(name), image_prompt(name)
    call = {**inputs, **GREEDY, "cache_implementation": "static"}
    plain_or_skip(model, **call)
    same_text(model, "oracle", **call)


@every_tree
def test_chunked_prompt(name: str) -> None:
    """Where plain `generate` can split a prompt with an image, so can we."""
    model, inputs = augmented_model(name), image_prompt(name, TWO)
    call = {**GREEDY, "prefill_chunk_size": 6}
    plain_or_skip(model, **inputs, **call)
    same_text(model, "oracle", **inputs, **call)
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    expected = plain(model, **inputs, **call, **wanted)
    got = model.generate(**inputs, **call, **wanted)
    for mine, other in zip(got.hidden_states[0], expected.hidden_states[0], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=0)


class Placeholders(RowDrafter):
    """Drafts nothing but ids that stand for images."""

    class Row(DraftRow):
        def propose(self, budget: int) -> TokenTree:
            return TokenTree([self.text[-1], IMAGE_ID, 91, IMAGE_ID, 5], [-1, 0, 0, 1, 3])


@every_family
def test_placeholders_as_drafts(name: str) -> None:
    """An image's id is text behind the prompt, in plain decoding as in a draft."""
    if VISION[name].image_id != IMAGE_ID:
        pytest.skip("no draft may hold an id without an embedding")
    specdec.register_drafter("placeholders", Placeholders)
    model, inputs = augmented_model(name), image_prompt(name)
    settings = specdec.SpecConfig("placeholders")
    same_text(model, settings, **inputs, **GREEDY)
    if capability(model).batched:
        same_text(model, settings, **batched([inputs, image_prompt(name, ONE, 2)]), **GREEDY)
    often = {"sequence_bias": [[[IMAGE_ID], 4.0]]}
    expected = plain(model, **inputs, **GREEDY, **often)[0, inputs["input_ids"].shape[1] :]
    assert IMAGE_ID in expected, "the model never emits the id: the test shows nothing"
    stats = same_text(model, settings, **inputs, **GREEDY, **often)
    assert stats.rounds < NEW - 1, "no placeholder was accepted"
    same_text(model, "oracle", **inputs, **GREEDY, **often)


class Listener(RowDrafter):
    """Keeps what it is shown of the prompt."""

    needs = Needs(taps=(0, 1))
    seen: list[tuple[list[int], Tensor, Tensor, int]] = []  # noqa: RUF012 - read by the test

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        assert features is not None
        self.seen.append((list(rows), token_ids, features, offset))

    class Row(DraftRow):
        def propose(self, budget: int) -> TokenTree:
            return TokenTree([self.text[-1]], [-1])


@every_tree
@pytest.mark.parametrize("chunk", [None, 6])
def test_what_a_drafter_is_shown(name: str, chunk: int | None) -> None:
    """Ids and tapped hidden states of every row, without its padding."""
    specdec.register_drafter("listener", Listener)
    model = augmented_model(name)
    rows = [image_prompt(name, ONE, 1), image_prompt(name, ONE, 2, words=3)]
    inputs = batched(rows)
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    plain_or_skip(model, **inputs, **GREEDY, prefill_chunk_size=chunk)
    expected = plain(model, **inputs, **GREEDY, **wanted).hidden_states[0]
    Listener.seen.clear()
    with fallbacks() as texts:
        settings = specdec.SpecConfig("listener")
        model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk, specdec=settings)
    assert not texts
    assert sorted(row for seen in Listener.seen for row in seen[0]) == [0, 1]
    for some, ids, features, offset in Listener.seen:
        assert offset == 0
        for index, row in enumerate(some):
            count = rows[row]["input_ids"].shape[1]
            assert torch.equal(ids[index], rows[row]["input_ids"][0])
            states = torch.cat([expected[1][row], expected[2][row]], dim=-1)[-count:]
            torch.testing.assert_close(features[index], states, atol=1e-9, rtol=0)


def test_a_prompt_that_trees_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test on the prompt itself notices, says so every call, and is not run again."""
    runs, test = [], fallback.why_not_trees
    monkeypatch.setattr(fallback, "why_not_trees", lambda *a: (runs.append(1), test(*a))[1])
    model = VISION["qwen2_vl"].build(torch.float64)
    specdec.augment(model, "prompt_lookup")
    right = PaddedPrompt.offsets
    monkeypatch.setattr(PaddedPrompt, "offsets", lambda self: right(self) + 1)
    inputs = image_prompt("qwen2_vl")
    for _ in range(2):
        with fallbacks() as texts:
            got = model.generate(**inputs, **GREEDY)
        assert len(texts) == 1
        assert "a token tree behind such inputs changes its logits" in texts[0]
        assert torch.equal(got, plain(model, **inputs, **GREEDY))
    assert len(runs) == 1
    with fallbacks() as texts:
        model.generate(inputs["input_ids"], **GREEDY)
    assert not texts, "text alone still speculates"


def test_a_prompt_that_fails_in_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PaddedPrompt, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such thing\nas this")

    model = VISION["llava"].build(torch.float64)
    specdec.augment(model, "prompt_lookup")
    monkeypatch.setattr(PaddedPrompt, "continued", broken)
    with fallbacks() as texts:
        model.generate(**image_prompt("llava"), **GREEDY)
    assert "its self-test with such inputs failed: RuntimeError: no such thing." in texts[0]


def test_the_self_test_leaves_no_trace() -> None:
    """The first call with an image tests the prompt; generator and text are not disturbed."""
    model = VISION["qwen2_vl"].build(torch.float64)
    inputs = image_prompt("qwen2_vl")
    cache, reference = DynamicCache(), DynamicCache()
    torch.manual_seed(5)
    expected = plain(model, **inputs, **SAMPLED, **{CACHE: reference})
    state = torch.get_rng_state()
    specdec.augment(model, "prompt_lookup")
    assert not capability(model).prompts
    torch.manual_seed(5)
    got = model.generate(**inputs, **SAMPLED, **{CACHE: cache})
    assert list(capability(model).prompts.values()) == [None]
    assert torch.equal(got, expected)
    assert torch.equal(torch.get_rng_state(), state)
    same_cache(cache, reference)


def test_the_detour_round_flash_attention_spares_the_vision_part() -> None:
    config = vision_model("llava").config
    before = config._attn_implementation, config.vision_config._attn_implementation
    config.text_config._attn_implementation = "flash_attention_2"
    try:
        with dense_attention(vision_model("llava")):
            assert config.text_config._attn_implementation == BORROWED
            assert (
                config._attn_implementation, config.vision_config._attn_implementation
            ) == before  # fmt: skip
        assert config.text_config._attn_implementation == "flash_attention_2"
    finally:
        config.text_config._attn_implementation = before[0]
