"""User-supplied caches over several turns, chunked prefill and embeddings as the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import specdec
from helpers.hf import ids_of, left_padded, oracle, plain, prompt, run_both, tiny_gpt2
from helpers.names import CACHE, cache_of

NEW = 10
TURNS = 3


def same_cache(ours: Any, theirs: Any, alive: Tensor | None = None) -> None:
    """Same layers, lengths and contents; `alive` [B, S] marks slots that hold tokens."""
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert len(ours.layers) == len(theirs.layers)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is type(other)
        assert mine.get_seq_length() == other.get_seq_length()
        assert mine.get_mask_sizes(1) == other.get_mask_sizes(1)
        for name in ("keys", "values"):
            got, expected = getattr(mine, name), getattr(other, name)
            assert got.shape == expected.shape
            assert got.dtype == expected.dtype
            difference = (got - expected).abs().amax((1, 3))
            if alive is not None:
                difference = difference.masked_fill(~alive[:, -difference.shape[1] :], 0)
            assert float(difference.max()) <= 1e-10


def converse(
    model: Any,
    first: dict[str, Tensor],
    make_cache: Any,
    ends: list[int] | None = None,
    **kwargs: Any,
) -> None:
    """Plain and speculative side by side over several turns, full ids each turn."""
    caches = make_cache(), make_cache()
    ids = first["input_ids"]
    mask = first.get("attention_mask")
    for turn in range(TURNS):
        call = {"input_ids": ids, "max_new_tokens": NEW, "eos_token_id": ends, **kwargs}
        if mask is not None:
            call["attention_mask"] = mask
        pair = iter(caches)
        both = run_both(model, lambda pair=pair: {CACHE: next(pair)}, **call)
        said = ids_of(both.ours)
        theirs, ours = caches
        assert ours.get_seq_length() == said.shape[1] - 1
        grown = torch.ones_like(said)
        if mask is not None:
            grown[:, : mask.shape[1]] = mask
        if ends is not None:
            emitted = said[:, ids.shape[1] :]
            ended = torch.isin(emitted, torch.tensor(ends)).cumsum(1)
            grown[:, ids.shape[1] + 1 :] = (ended[:, :-1] == 0).long()
        same_cache(ours, theirs, grown[:, :-1].bool() if mask is not None else None)
        more = prompt(3 + turn, len(ids), seed=10 + turn)
        ids = torch.cat([said, more], dim=1)
        if mask is not None:
            mask = torch.cat([grown, torch.ones_like(more)], dim=1)


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "top_k": 0}])
def test_turns_with_one_cache(llama: Any, sampled: dict[str, Any]) -> None:
    converse(llama, {"input_ids": prompt()}, DynamicCache, **sampled)
    converse(llama, {"input_ids": prompt()}, lambda: DynamicCache(config=llama.config), **sampled)


def test_turns_of_a_left_padded_batch(llama: Any) -> None:
    converse(llama, left_padded(), DynamicCache)


def test_turns_of_a_batch_whose_rows_end_apart(llama: Any) -> None:
    """Rows that ended are padded; the next turn's mask hides the padding."""
    converse(llama, left_padded((9, 9, 4, 2)), DynamicCache, ends=[5, 17, 40, 11])


def test_padding_that_the_next_turn_does_not_hide(llama: Any) -> None:
    """A mask of ones over the padding behind ended rows: plain attends to it, so must we."""
    first = {"input_ids": prompt(9, 4), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    free = plain(llama, **first, max_new_tokens=NEW)[:, 9:].tolist()
    ends = [free[0][2], free[1][6]]
    caches, said = [], []
    for speculates in (False, True):
        cache = DynamicCache()
        one = plain(llama, **first, max_new_tokens=NEW, eos_token_id=ends)
        settings = oracle(one, 9) if speculates else False
        call = {CACHE: cache, "max_new_tokens": NEW, "specdec": settings}
        one = llama.generate(**first, **call, eos_token_id=ends)
        assert (one == 0).any(), "no row ended early: the test shows nothing"
        ids = torch.cat([one, prompt(4, 4, seed=5)], dim=1)
        call["specdec"] = False
        said.append(llama.generate(ids, attention_mask=torch.ones_like(ids), **call))
        caches.append(cache)
    assert torch.equal(*said)
    same_cache(*caches)


@pytest.mark.parametrize("with_config", [False, True])
def test_sliding_window_past_its_window(gemma3: Any, with_config: bool) -> None:
    def make() -> DynamicCache:
        return DynamicCache(config=gemma3.config) if with_config else DynamicCache()

    converse(gemma3, {"input_ids": prompt(5)}, make)
    converse(gemma3, {"input_ids": prompt(20)}, make)


def test_learned_positions_over_turns() -> None:
    model = specdec.augment(tiny_gpt2(), "prompt_lookup")
    converse(model, {"input_ids": prompt()}, DynamicCache)
    converse(model, left_padded(), DynamicCache)


def test_only_the_new_ids(llama: Any) -> None:
    """`generate` also takes the new ids alone, with a mask over everything."""
    caches = DynamicCache(), DynamicCache()
    said = plain(llama, prompt(), max_new_tokens=NEW, **{CACHE: caches[0]})
    llama.generate(prompt(), max_new_tokens=NEW, **{CACHE: caches[1]})
    new = torch.cat([said[:, -1:], prompt(4, seed=2)], dim=1)
    mask = torch.ones(1, said.shape[1] + 4, dtype=torch.long)
    pair = iter(caches)
    run_both(
        llama, lambda: {CACHE: next(pair)}, input_ids=new, attention_mask=mask,
        max_new_tokens=NEW,
    )  # fmt: skip
    same_cache(caches[1], caches[0])


def test_turns_of_plain_and_speculative_calls_mix(llama: Any) -> None:
    cache, reference, ids = DynamicCache(), DynamicCache(), prompt()
    for turn in range(4):
        expected = plain(llama, ids, max_new_tokens=NEW, **{CACHE: reference})
        got = llama.generate(
            ids, max_new_tokens=NEW, **{CACHE: cache},
            specdec=False if turn % 2 else oracle(expected, ids.shape[1]),
        )  # fmt: skip
        assert torch.equal(got, expected)
        same_cache(cache, reference)
        ids = torch.cat([got, prompt(3, seed=turn)], dim=1)


def test_cache_after_an_eos(llama: Any) -> None:
    free = plain(llama, prompt(), max_new_tokens=NEW)[0, 9:].tolist()
    for end in free[:6]:
        caches = DynamicCache(), DynamicCache()
        pair = iter(caches)
        run_both(
            llama, lambda pair=pair: {CACHE: next(pair)}, input_ids=prompt(),
            max_new_tokens=NEW, eos_token_id=end,
        )  # fmt: skip
        same_cache(caches[1], caches[0])


def test_user_cache_with_outputs(llama: Any) -> None:
    caches = DynamicCache(), DynamicCache()
    ids = prompt()
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True}
    for turn in range(2):
        pair = iter(caches)
        both = run_both(
            llama, lambda pair=pair: {CACHE: next(pair)}, input_ids=ids,
            max_new_tokens=NEW, **wanted,
        )  # fmt: skip
        assert cache_of(both.ours) is caches[1]
        for mine, other in zip(both.ours.hidden_states, both.plain.hidden_states, strict=True):
            for layer, reference in zip(mine, other, strict=True):
                torch.testing.assert_close(layer, reference, atol=1e-10, rtol=0)
        ids = torch.cat([both.ours.sequences, prompt(4, seed=turn)], dim=1)


def test_exception_leaves_the_users_cache_alone(llama: Any) -> None:
    cache = DynamicCache()
    said = llama.generate(prompt(), max_new_tokens=NEW, **{CACHE: cache})
    before = [layer.keys.clone() for layer in cache.layers]

    def broken(batch: int, ids: Tensor) -> list[int]:
        if len(ids) > said.shape[1] + 6:
            raise RuntimeError("the user's function fails")
        return list(range(3, 60))

    ids = torch.cat([said, prompt(3)], dim=1)
    with pytest.raises(RuntimeError, match="the user's function"):
        llama.generate(ids, max_new_tokens=NEW, **{CACHE: cache}, prefix_allowed_tokens_fn=broken)
    assert cache.get_seq_length() == said.shape[1] - 1
    assert all(torch.equal(a, b.keys) for a, b in zip(before, cache.layers, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_chunked_prefill(request: pytest.FixtureRequest, name: str, chunk: int) -> None:
    model = request.getfixturevalue(name)
    call = {"max_new_tokens": 8, "prefill_chunk_size": chunk}
    run_both(model, input_ids=prompt(20), **call)
    run_both(model, **left_padded((20, 3, 8)), **call)


def chunks_start_after_the_cache(model: Any) -> bool:
    """Older releases chunk the whole prompt again on top of a filled cache: another text."""
    texts = []
    for chunk in (None, 3):
        cache = DynamicCache()
        first = plain(model, prompt(), **{CACHE: cache}, max_new_tokens=NEW)
        texts.append(
            plain(
                model, ids_of(first), **{CACHE: cache}, max_new_tokens=NEW,
                prefill_chunk_size=chunk,
            )
        )  # fmt: skip
    return torch.equal(*texts)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_prefill_over_turns(llama: Any, chunk: int) -> None:
    if not chunks_start_after_the_cache(llama):
        pytest.skip("plain generate of this transformers re-feeds the prompt in chunks")
    converse(llama, {"input_ids": prompt()}, DynamicCache, prefill_chunk_size=chunk)
    converse(llama, left_padded(), DynamicCache, prefill_chunk_size=chunk)


def test_embeddings_alone(llama: Any) -> None:
    embeds = llama.get_input_embeddings()(prompt())
    for settings in ({}, {"do_sample": True, "top_k": 0}, {"repetition_penalty": 1.3}):
        both = run_both(llama, inputs_embeds=embeds, max_new_tokens=NEW, **settings)
        assert both.ours.shape == (1, NEW)
    run_both(llama, inputs_embeds=embeds, max_length=15)
    inputs = left_padded()
    embeds = llama.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    run_both(llama, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, eos_token_id=5)


def test_embeddings_beside_ids(llama: Any) -> None:
    embeds = llama.get_input_embeddings()(prompt()) * 1.1
    both = run_both(llama, input_ids=prompt(), inputs_embeds=embeds, max_new_tokens=NEW)
    assert both.ours.shape == (1, 9 + NEW)
    run_both(llama, input_ids=prompt(), inputs_embeds=embeds, max_new_tokens=NEW,
             no_repeat_ngram_size=2)  # fmt: skip
    inputs = left_padded()
    embeds = llama.get_input_embeddings()(inputs["input_ids"]) * 1.1
    run_both(llama, **inputs, inputs_embeds=embeds, max_new_tokens=NEW)


def test_embeddings_with_outputs(llama: Any) -> None:
    embeds = llama.get_input_embeddings()(prompt()) * 1.1
    both = run_both(
        llama, inputs_embeds=embeds, max_new_tokens=NEW, return_dict_in_generate=True,
        output_hidden_states=True,
    )  # fmt: skip
    for mine, other in zip(both.ours.hidden_states, both.plain.hidden_states, strict=True):
        for layer, reference in zip(mine, other, strict=True):
            torch.testing.assert_close(layer, reference, atol=1e-10, rtol=0)
    same_cache(cache_of(both.ours), cache_of(both.plain))
