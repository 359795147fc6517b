"""Caches in chain mode: returned as plain returns them, and taken over from turn to turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import specdec
from helpers.chains import (
    BATCHES,
    FEW,
    NEW,
    families,
    run_both,
    slowly,
    tolerance,
    truth_of,
)
from helpers.families import VOCAB, WINDOW, Family, model_of
from helpers.hf import plain
from helpers.laws import prompts
from helpers.names import CACHE, RENAMED, cache_of
from helpers.spies import layer_states, same_states
from specdec import SpecConfig
from specdec.api import capability
from specdec.errors import FallbackWarning
from specdec.hf import compat

pytestmark = [
    pytest.mark.usefixtures("throw_away_methods"),
    pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning"),
]

TURNS = 3


# Caches that the call returns


def unequal_end(model: Any, call: Mapping[str, Any]) -> int:
    """The token that, as EOS, ends some row as early as possible and another not at all."""
    tails = plain(model, **call, max_new_tokens=NEW)[:, call["input_ids"].shape[1] :].tolist()
    ends = {
        token: sorted(tail.index(token) if token in tail else NEW for tail in tails)
        for tail in tails
        for token in tail
    }
    return max(ends, key=lambda token: ends[token][-1] - ends[token][0])


@pytest.mark.parametrize("inputs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", families())
def test_the_returned_cache_is_plains(family: str, inputs: dict[str, Tensor]) -> None:
    """Lengths, flags, keys and states, and padding too; rows that ended are run on over it."""
    model = model_of(family)
    call = {**inputs, "max_new_tokens": NEW, "return_dict_in_generate": True}
    ends: list[int | None] = [None]
    if len(inputs["input_ids"]) > 1:
        ends.append(unequal_end(model, inputs))
    for end in ends:
        both = run_both(model, **call, eos_token_id=end)
        pad = (both.ours.sequences[:, inputs["input_ids"].shape[1] :] == 0).any()
        assert end is None or pad, "no row ended early: the test shows nothing"
        error = same_states(cache_of(both.ours), cache_of(both.plain))
        assert error <= tolerance(model)
        assert both.ours.keys() == both.plain.keys()


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("family", FEW)
def test_short_calls(family: str, limit: int) -> None:
    model = model_of(family)
    for inputs in BATCHES.values():
        both = run_both(model, **inputs, max_new_tokens=limit, return_dict_in_generate=True)
        error = same_states(cache_of(both.ours), cache_of(both.plain))
        assert error <= tolerance(model)


@pytest.mark.parametrize("family", [*FEW[1:], slowly(FEW[0])])
def test_every_end_leaves_plains_cache(family: str) -> None:
    """The k-th token of each row as EOS, before and after what a draft says about it."""
    model, inputs = model_of(family), prompts(4)
    free = plain(model, **inputs, max_new_tokens=NEW)[:, inputs["input_ids"].shape[1] :].tolist()
    for depth in range(9):
        ends = [tail[depth] for tail in free[: 1 + depth % 4]]
        both = run_both(
            model, **inputs, max_new_tokens=NEW, eos_token_id=ends, return_dict_in_generate=True
        )
        error = same_states(cache_of(both.ours), cache_of(both.plain))
        assert error <= tolerance(model), f"depth {depth}"


# Caches that the caller brings


def converse(
    model: Any, inputs: Mapping[str, Tensor], end: int | None = None, **kwargs: Any
) -> None:
    """Plain and speculative side by side over several turns, each with a cache of its own.

    Masks never hide what pads ended rows: plain attends to it, and so must we.
    """
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for turn in range(TURNS):
        pair = iter(caches)
        call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, **kwargs}
        both = run_both(
            model, lambda pair=pair: {CACHE: next(pair)}, **call,
            eos_token_id=end, return_dict_in_generate=True,
        )  # fmt: skip
        assert cache_of(both.ours) is caches[1]
        assert same_states(caches[1], caches[0]) <= tolerance(model), f"turn {turn}"
        said = both.ours.sequences
        generator = torch.Generator().manual_seed(turn)
        more = torch.randint(15, VOCAB, (len(ids), 3 + turn), generator=generator)
        ids = torch.cat([said, more], 1)
        mask = torch.cat([mask, torch.ones_like(ids[:, mask.shape[1] :])], 1)


@pytest.mark.parametrize("inputs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", families("mamba2"))  # its cache has another name
def test_turns_with_one_cache(family: str, inputs: dict[str, Tensor]) -> None:
    converse(model_of(family), inputs)


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "bloom"])
@pytest.mark.parametrize("kind", ["sampled", "chunks", "ends"])
def test_turns_of_other_kinds(family: str, kind: str) -> None:
    if kind == "chunks" and not compat.chunks_skip_cached_tokens():
        pytest.skip("plain generate itself runs cached tokens again")
    model, inputs = model_of(family), prompts(4)
    options = {
        "sampled": {"do_sample": True, "top_k": 0},
        "chunks": {"prefill_chunk_size": 3},
        "ends": {"end": unequal_end(model, inputs)},
    }[kind]
    converse(model, inputs, **options)


def test_chunks_that_run_cached_tokens_again_are_left_to_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "chunks_skip_cached_tokens", lambda: False)
    model = model_of("lfm2")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    run = {"max_new_tokens": NEW, "prefill_chunk_size": 3}
    said, _ = (plain(model, **prompts(1), **run, **{CACHE: cache}) for cache in caches)
    more = torch.cat([said, said[:, 5:8]], 1)
    expected = plain(model, more, **run, **{CACHE: caches[0]})
    with pytest.warns(FallbackWarning, match="runs cached tokens again"):
        got = model.generate(more, **run, **{CACHE: caches[1]})
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["qwen3_5", "bloom"])
def test_only_the_new_ids(family: str) -> None:
    """`generate` also takes the new ids alone, with a mask over everything."""
    model, first = model_of(family), prompts(4)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        said = plain(model, **first, max_new_tokens=NEW, **{CACHE: cache})
    new = torch.cat([said[:, -1:], prompts(4)["input_ids"][:, -3:].clamp(min=15)], 1)
    ones = torch.ones(4, NEW + 3, dtype=torch.long)
    pair = iter(caches)
    run_both(
        model, lambda: {CACHE: next(pair)}, input_ids=new, max_new_tokens=NEW,
        attention_mask=torch.cat([first["attention_mask"], ones], 1),
    )  # fmt: skip
    assert same_states(caches[1], caches[0]) <= tolerance(model)


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "bloom"])
def test_a_failure_leaves_the_users_cache_alone(family: str) -> None:
    model, call = model_of(family), {**prompts(1), "max_new_tokens": NEW}
    cache = DynamicCache(config=model.config)
    said = model.generate(**call, **{CACHE: cache}, specdec=False)
    layers, before = list(cache.layers), layer_states(cache)

    def broken(batch: int, ids: Tensor) -> list[int]:
        if len(ids) > said.shape[1] + 6:
            raise RuntimeError("the user's function fails")
        return list(range(3, 60))

    more = torch.cat([said, said[:, 5:8]], 1)
    config = SpecConfig("oracle", {"truth": truth_of(more, {"input_ids": more})})
    with pytest.raises(RuntimeError, match="the user's function"):
        model.generate(
            more, max_new_tokens=NEW, **{CACHE: cache}, prefix_allowed_tokens_fn=broken,
            specdec=config,
        )  # fmt: skip
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True))
    for old, new in zip(before, layer_states(cache), strict=True):
        for name, tensor in {**old.slots, **old.folded}.items():
            assert torch.equal(tensor, {**new.slots, **new.folded}[name])
    both = run_both(model, input_ids=more, max_new_tokens=NEW)
    got = model.generate(more, max_new_tokens=NEW, **{CACHE: cache})
    assert torch.equal(got, both.plain)


@pytest.mark.parametrize("name", ["cache_params", CACHE] if RENAMED else ["cache_params"])
def test_a_cache_of_states_alone_is_left_to_plain(name: str) -> None:
    """Plain `generate` goes on from it with the ids as given; so does a call that was given one."""
    model = model_of("mamba2")
    said, caches = [], []
    for speculates in (False, True):
        first = model.generate(
            **prompts(1), max_new_tokens=NEW, return_dict_in_generate=True,
            specdec=SpecConfig("prompt_lookup") if speculates else False,
        )  # fmt: skip
        assert type(cache_of(first)) is DynamicCache
        caches.append(cache_of(first))
        last = first.sequences[:, -1:]
        call = {name: cache_of(first), "max_new_tokens": NEW}
        if speculates:
            with pytest.warns(FallbackWarning, match="holds states alone"):
                said.append(model.generate(last, **call))
        else:
            said.append(model.generate(last, **call, specdec=False))
    assert torch.equal(*said)
    assert same_states(caches[1], caches[0]) <= tolerance(model)


def test_padding_inside_a_row_is_left_to_plain() -> None:
    """A second turn whose mask hides the padding behind rows that had ended."""
    model, inputs = model_of("qwen3_5"), prompts(4)
    run = {"max_new_tokens": NEW, "eos_token_id": unequal_end(model, inputs)}
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = plain(model, **inputs, **run, **{CACHE: caches[0]})
    said = model.generate(**inputs, **run, **{CACHE: caches[1]})
    assert torch.equal(said, expected)
    ids = torch.cat([said, inputs["input_ids"][:, -3:].clamp(min=15)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, NEW + 3, dtype=torch.long)], 1)
    mask[:, inputs["input_ids"].shape[1] :][ids[:, inputs["input_ids"].shape[1] :] == 0] = 0
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW}
    expected = plain(model, **call, **{CACHE: caches[0]})
    with pytest.warns(FallbackWarning, match="mask has holes"):
        assert torch.equal(model.generate(**call, **{CACHE: caches[1]}), expected)
    assert same_states(caches[1], caches[0]) <= tolerance(model)


class Own(DynamicCache):
    """A cache of the caller's own kind."""


def test_a_cache_of_an_unknown_kind_is_put_back_as_a_whole() -> None:
    """One row without padding goes through; rows and padding inside it cannot be told apart."""
    model, inputs = model_of("qwen3_5"), prompts(1)
    caches = Own(config=model.config), Own(config=model.config)
    ids = inputs["input_ids"]
    for turn in range(TURNS):
        pair = iter(caches)
        both = run_both(
            model, lambda pair=pair: {CACHE: next(pair)}, input_ids=ids,
            attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
        )  # fmt: skip
        assert same_states(caches[1], caches[0]) <= tolerance(model), f"turn {turn}"
        ids = torch.cat([both.ours, both.ours[:, 4:7]], 1)
    call = {**prompts(4), "max_new_tokens": NEW}
    with pytest.warns(FallbackWarning, match="of a Own cannot be told apart"):
        got = model.generate(**call, **{CACHE: Own(config=model.config)})
    assert torch.equal(got, plain(model, **call))


# Layers with an attention window beside states


LFM3 = Family(
    "Lfm3",
    {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
    },
)


@pytest.fixture(scope="module")
def lfm3() -> Any:
    if not hasattr(transformers, "Lfm3Config"):
        pytest.skip("this transformers has no Lfm3")
    return specdec.augment(LFM3.build(torch.float64), "none")


@pytest.mark.parametrize("length", [1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_a_window_beside_states(lfm3: Any, length: int) -> None:
    """Prompts within the window and beyond it, rows of several lengths; the text leaves it."""
    assert capability(lfm3).mode == "chain"
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(15, VOCAB, (3, length + 4), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, 3):
        mask[row, : 2 * row], ids[row, : 2 * row] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    for call in (inputs, {name: tensor[:1] for name, tensor in inputs.items()}):
        for more in ({}, {"do_sample": True, "top_k": 0}):
            both = run_both(
                lfm3, **call, **more, max_new_tokens=2 * WINDOW, return_dict_in_generate=True
            )
            error = same_states(cache_of(both.ours), cache_of(both.plain))
            assert error <= tolerance(lfm3)


def test_a_cache_that_has_forgotten_slots_is_left_to_plain(lfm3: Any) -> None:
    cache = DynamicCache(config=lfm3.config)
    run = {"max_new_tokens": NEW, CACHE: cache}
    said = lfm3.generate(**prompts(1), **run)
    assert specdec.last_stats(lfm3).mode == "chain"
    more = torch.cat([said, said[:, 5:8]], 1)
    expected = plain(lfm3, more, max_new_tokens=NEW)
    with pytest.warns(FallbackWarning, match="has forgotten slots"):
        assert torch.equal(lfm3.generate(more, **run), expected)
