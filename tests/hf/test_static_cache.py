"""Static caches: `cache_implementation="static"` and a `StaticCache`, filled as plain does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import specdec
from helpers.families import CHAIN_FAMILIES
from helpers.hf import fallbacks, ids_of, left_padded, oracle, plain, prompt, run_both, tiny_gpt2
from helpers.names import CACHE, cache_of
from specdec.caches.tree_cache import TreeLayer
from specdec.generate import call as hf_call

NEW = 10
TURNS = 3
ROOM = 64
STATIC = {"cache_implementation": "static", "max_new_tokens": NEW}
MODELS = ("llama", "gemma3", "gpt2")


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


every_model = pytest.mark.parametrize("model", MODELS, indirect=True)


def static_cache(model: Any, room: int = ROOM) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=room)


def same_static(ours: Any, theirs: Any, alive: Tensor | None = None) -> None:
    """Same layers, counts and contents; `alive` [B, S] marks slots that hold tokens."""
    assert type(ours) is type(theirs) is StaticCache
    length = int(theirs.get_seq_length())
    assert int(ours.get_seq_length()) == length
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is type(other)
        assert mine.max_cache_len == other.max_cache_len
        assert mine.get_mask_sizes(1) == other.get_mask_sizes(1)
        assert mine.get_mask_sizes(3) == other.get_mask_sizes(3)
        assert int(mine.cumulative_length) == int(other.cumulative_length)
        assert getattr(mine, "cumulative_length_int", 0) == getattr(
            other, "cumulative_length_int", 0
        )
        count = min(length, other.max_cache_len)
        for name in ("keys", "values"):
            got, expected = getattr(mine, name), getattr(other, name)
            assert got.shape == expected.shape
            assert got.dtype == expected.dtype
            difference = (got - expected).abs().amax((1, 3))
            if alive is not None:
                hidden = ~alive[:, length - count : length]
                difference[:, :count] = difference[:, :count].masked_fill(hidden, 0)
            assert float(difference.max()) <= 1e-10


@every_model
@pytest.mark.parametrize("decoding", [{}, {"do_sample": True, "top_k": 0}, {"eos_token_id": 5}])
def test_text(model: Any, decoding: dict[str, Any]) -> None:
    run_both(model, input_ids=prompt(), **STATIC, **decoding)
    run_both(model, input_ids=prompt(20), **STATIC, **decoding)
    run_both(model, **left_padded(), **STATIC, **decoding)


@every_model
@pytest.mark.parametrize("method", ["none", "prompt_lookup", "lookahead"])
def test_methods(model: Any, method: str) -> None:
    config = specdec.SpecConfig(method)
    for inputs in ({"input_ids": prompt(12)}, left_padded()):
        expected = plain(model, **inputs, cache_implementation="static", max_new_tokens=30)
        with fallbacks() as texts:
            got = model.generate(
                **inputs, cache_implementation="static", max_new_tokens=30, specdec=config
            )
        assert torch.equal(got, expected)
        assert not texts
        assert specdec.last_stats(model).mode == "tree"


def test_implementation_set_on_the_model(llama: Any) -> None:
    llama.generation_config.cache_implementation = "static"
    try:
        run_both(llama, input_ids=prompt(), max_new_tokens=NEW)
    finally:
        llama.generation_config.cache_implementation = None


def test_buffers_are_allocated_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the text gets, and while ended rows are run over their padding."""
    grown: list[int] = []
    grow = TreeLayer._grow

    def counted(self: TreeLayer) -> tuple[Tensor, Tensor]:
        grown.append(1)
        return grow(self)

    monkeypatch.setattr(TreeLayer, "_grow", counted)
    monkeypatch.setattr(hf_call, "_FIRST_ROOM", 4)
    batch = {"input_ids": prompt(9, 3), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    free = plain(llama, **batch, max_new_tokens=90)[:, 9:].tolist()
    ends = [free[0][1], free[1][4]]
    call = {"max_new_tokens": 90, "return_dict_in_generate": True}
    run_both(llama, **batch, **call, cache_implementation="static", eos_token_id=ends)
    run_both(llama, input_ids=prompt(), **call, cache_implementation="static")
    assert not grown
    run_both(llama, input_ids=prompt(), **call)
    assert grown, "a dynamic call does not grow either: the test shows nothing"


@every_model
@pytest.mark.parametrize("chunk", [None, 3, 8, 16])
def test_returned_cache(model: Any, chunk: int | None) -> None:
    """Prompts below, at and beyond the window of eight slots, alone and in chunks."""
    wanted = {"return_dict_in_generate": True, "prefill_chunk_size": chunk, **STATIC}
    for length in (1, 4, 7, 8, 9, 20):
        both = run_both(model, input_ids=prompt(length), **wanted)
        same_static(cache_of(both.ours), cache_of(both.plain))
    padded = left_padded()
    both = run_both(model, **padded, **wanted)
    alive = torch.cat([padded["attention_mask"].bool(), torch.ones(4, NEW).bool()], dim=1)
    same_static(cache_of(both.ours), cache_of(both.plain), alive)


@every_model
def test_returned_cache_after_an_eos(model: Any) -> None:
    batch = {"input_ids": prompt(9, 3), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    free = plain(model, **batch, max_new_tokens=NEW)[:, 9:].tolist()
    ends = next(t for row in free for t in row[:-3] if not all(t in other for other in free))
    both = run_both(model, **batch, **STATIC, eos_token_id=ends, return_dict_in_generate=True)
    assert (both.ours.sequences == 0).any(), "no row ended early: the test shows nothing"
    same_static(cache_of(both.ours), cache_of(both.plain))


def converse(model: Any, first: dict[str, Tensor], room: int = ROOM, **kwargs: Any) -> None:
    """Plain and speculative side by side over several turns with one static cache each."""
    theirs, ours = static_cache(model, room), static_cache(model, room)
    ids, mask = first["input_ids"], first.get("attention_mask")
    addresses: set[tuple[int, ...]] = set()
    for turn in range(TURNS):
        call = {"input_ids": ids, "max_new_tokens": NEW, **kwargs}
        if mask is not None:
            call["attention_mask"] = mask
        pair = iter((theirs, ours))
        both = run_both(model, lambda pair=pair: {CACHE: next(pair)}, **call)
        said = ids_of(both.ours)
        assert int(ours.get_seq_length()) == said.shape[1] - 1
        grown = torch.ones_like(said)
        if mask is not None:
            grown[:, : mask.shape[1]] = mask
        same_static(ours, theirs, None if mask is None else grown[:, :-1].bool())
        addresses.add(tuple(layer.keys.data_ptr() for layer in ours.layers))
        more = prompt(3 + turn, len(ids), seed=10 + turn)
        ids = torch.cat([said, more], dim=1)
        if mask is not None:
            mask = torch.cat([grown, torch.ones_like(more)], dim=1)
    assert len(addresses) == 1, "the user's tensors were replaced"


@every_model
@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "top_k": 0}])
def test_turns_with_one_cache(model: Any, sampled: dict[str, Any]) -> None:
    converse(model, {"input_ids": prompt()}, **sampled)
    converse(model, {"input_ids": prompt(2)}, **sampled)


@every_model
def test_turns_of_a_left_padded_batch(model: Any) -> None:
    converse(model, left_padded())


def test_turns_of_plain_and_speculative_calls_mix(gemma3: Any) -> None:
    cache, reference, ids = static_cache(gemma3, 96), static_cache(gemma3, 96), prompt(4)
    for turn in range(5):
        expected = plain(gemma3, ids, max_new_tokens=NEW, **{CACHE: reference})
        got = gemma3.generate(
            ids, max_new_tokens=NEW, **{CACHE: cache},
            specdec=False if turn % 2 else oracle(expected, ids.shape[1]),
        )  # fmt: skip
        assert torch.equal(got, expected)
        same_static(cache, reference)
        ids = torch.cat([got, prompt(3, seed=turn)], dim=1)


@every_model
def test_a_cache_that_is_reset_and_used_again(model: Any) -> None:
    caches = static_cache(model), static_cache(model)
    for seed in range(3):
        for cache in caches:
            cache.reset()
        pair = iter(caches)
        run_both(
            model, lambda pair=pair: {CACHE: next(pair)},
            input_ids=prompt(9 + seed, seed=seed), max_new_tokens=NEW,
        )  # fmt: skip
        same_static(caches[1], caches[0])


def test_a_cache_that_fits_exactly(llama: Any) -> None:
    converse(llama, {"input_ids": prompt()}, room=9 + TURNS * NEW + 3 + 4 - 1)


def test_a_cache_that_is_too_small(llama: Any) -> None:
    """An EOS may come in time; where it does not, plain `generate` fails, and so do we."""
    free = plain(llama, prompt(), max_new_tokens=NEW)[0, 9:].tolist()
    last = next(token for token in free if free.count(token) == 1)
    call = {"max_new_tokens": NEW, "eos_token_id": last}
    expected = plain(llama, prompt(), **call, **{CACHE: static_cache(llama, 9 + NEW - 2)})
    with fallbacks() as texts:
        got = llama.generate(prompt(), **call, **{CACHE: static_cache(llama, 9 + NEW - 2)})
    assert torch.equal(got, expected)
    assert "the static cache has 17 slots and the call may need 18" in texts[0]


def test_a_cache_smaller_than_the_window(gemma3: Any) -> None:
    """A static sliding layer keeps `max_cache_len` slots at most: a narrower window than told."""
    with fallbacks() as texts:
        gemma3.generate(prompt(2), max_new_tokens=3, **{CACHE: static_cache(gemma3, 6)})
        with pytest.raises((IndexError, RuntimeError)):
            gemma3.generate(prompt(), max_new_tokens=NEW, **{CACHE: static_cache(gemma3, 6)})
    assert len(texts) == 1
    assert "the static cache has 6 slots" in texts[0]


def laid_ahead(model: Any, dtype: torch.dtype = torch.float64, **other: int) -> StaticCache:
    """A static cache with its memory laid out before a forward, as for an export."""
    config = model.config
    sizes = {"num_heads": config.num_key_value_heads, "head_dim": config.head_dim, **other}
    cache = static_cache(model)
    cache.early_initialization(1, **sizes, dtype=dtype, device=torch.device("cpu"))
    return cache


@pytest.mark.parametrize("model", ["llama", "gemma3"], indirect=True)
def test_a_cache_that_is_laid_out_ahead(model: Any) -> None:
    caches = laid_ahead(model), laid_ahead(model)
    pair = iter(caches)
    run_both(model, lambda: {CACHE: next(pair)}, input_ids=prompt(), max_new_tokens=NEW)
    same_static(caches[1], caches[0])


@pytest.mark.parametrize("other", [{"num_heads": 3}, {"head_dim": 7}, {"dtype": torch.float16}])
def test_a_cache_that_is_laid_out_for_another_model(llama: Any, other: dict[str, Any]) -> None:
    """Plain `generate` cannot write to it, and says so in torch's words."""
    errors = []
    for call in (plain, llama.generate):
        given = {CACHE: laid_ahead(llama, **other)}
        before = (llama,) if call is plain else ()
        with fallbacks() as texts, pytest.raises(RuntimeError) as failed:
            call(*before, prompt(), max_new_tokens=NEW, **given)
        errors.append(str(failed.value))
    assert errors[0] == errors[1]
    assert "is laid out for another model's keys" in texts[0]


def test_offloaded_static_cache_runs_plain(llama: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("plain generate itself needs an accelerator for an offloaded cache")
    with fallbacks() as texts:
        llama.generate(prompt(), max_new_tokens=NEW, cache_implementation="offloaded_static")
    assert "offloaded_static" in texts[0]


def test_chain_models_run_plain() -> None:
    model = specdec.augment(CHAIN_FAMILIES["lfm2"].build(torch.float64), "prompt_lookup")
    ids = prompt()
    with fallbacks() as texts:
        got = model.generate(ids, **STATIC)
    assert torch.equal(got, plain(model, ids, **STATIC))
    assert "StaticCache" in texts[0]


def test_exception_leaves_the_users_cache_alone(gemma3: Any) -> None:
    cache = static_cache(gemma3)
    said = gemma3.generate(prompt(), max_new_tokens=NEW, **{CACHE: cache})
    before = [(layer.keys.clone(), int(layer.cumulative_length)) for layer in cache.layers]

    def broken(batch: int, ids: Tensor) -> list[int]:
        if len(ids) > said.shape[1] + 6:
            raise RuntimeError("the user's function fails")
        return list(range(3, 60))

    ids = torch.cat([said, prompt(3)], dim=1)
    with pytest.raises(RuntimeError, match="the user's function"):
        gemma3.generate(ids, max_new_tokens=NEW, **{CACHE: cache}, prefix_allowed_tokens_fn=broken)
    assert cache.get_seq_length() == said.shape[1] - 1
    for (keys, count), layer in zip(before, cache.layers, strict=True):
        assert torch.equal(keys, layer.keys)
        assert int(layer.cumulative_length) == count


def test_embeddings_and_outputs(llama: Any) -> None:
    embeds = llama.get_input_embeddings()(prompt()) * 1.1
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True}
    both = run_both(llama, inputs_embeds=embeds, **STATIC, **wanted)
    same_static(cache_of(both.ours), cache_of(both.plain))
    for mine, other in zip(both.ours.hidden_states, both.plain.hidden_states, strict=True):
        for layer, reference in zip(mine, other, strict=True):
            torch.testing.assert_close(layer, reference, atol=1e-10, rtol=0)


def test_learned_positions_over_turns() -> None:
    model = specdec.augment(tiny_gpt2(), "prompt_lookup")
    converse(model, left_padded())
