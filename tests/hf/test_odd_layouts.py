"""Calls whose rows, cache and mask do not belong together: plain's own answer, or its own error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList

from helpers.families import model_of
from helpers.hf import fallbacks, ids_of, letter_tokenizer, plain, prompt
from helpers.names import CACHE
from specdec import SpecConfig

NEW = 8


def answer(generate: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The ids, or kind and text of the error; and where the generator stands."""
    torch.manual_seed(3)
    try:
        found = ids_of(generate(**call)).tolist()
    except Exception as problem:  # noqa: BLE001 - compared
        found = (type(problem), str(problem))
    return found, torch.get_rng_state().tolist()


def check(model: Any, make: Callable[[], dict[str, Any]], reason: str | None = None) -> Any:
    """Plain's answer, after comparing ours with it, and the reason for which ours ran plain."""
    expected = answer(lambda **call: plain(model, **call), make())
    with fallbacks() as texts:
        found = answer(model.generate, {**make(), "specdec": SpecConfig("prompt_lookup")})
    assert found == expected
    assert [reason in text for text in texts] == ([] if reason is None else [True])
    return expected[0]


def filled(model: Any, rows: int, cache: Any = None) -> Any:
    """A cache after a turn of `rows` rows."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    plain(model, prompt(5, rows), max_new_tokens=3, do_sample=False, **{CACHE: cache})
    return cache


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(("held", "rows", "copies"), [(1, 1, 3), (3, 1, 1), (2, 3, 1)])
def test_a_cache_of_other_rows(
    cache: str | None, held: int, rows: int, copies: int, llama: Any
) -> None:
    """`num_return_sequences` multiplies the rows of a call, and not those of its cache."""

    def make() -> dict[str, Any]:
        own = StaticCache(config=llama.config, max_cache_len=40) if cache else None
        return {
            "input_ids": prompt(12, rows), "max_new_tokens": NEW, "do_sample": copies > 1,
            "num_return_sequences": copies, CACHE: filled(llama, held, own),
        }  # fmt: skip

    check(llama, make, f"cache holds {held} rows and the call has {rows * copies}")


@pytest.mark.parametrize("family", ["qwen3_5", "bloom"])
def test_a_cache_of_other_rows_in_chain_mode(family: str) -> None:
    model = model_of(family)

    def make() -> dict[str, Any]:
        return {"input_ids": prompt(12), "num_return_sequences": 2, "do_sample": True,
                CACHE: filled(model, 1), "max_new_tokens": NEW}  # fmt: skip

    check(model, make, "cache holds 1 rows and the call has 2")


@pytest.mark.parametrize("width", [4, 9, 12])
@pytest.mark.parametrize("turn", ["first", "second"])
def test_a_mask_of_ones_of_another_width(width: int, turn: str, llama: Any) -> None:
    """`generate` drops such a mask, and leaves its length behind."""

    def make() -> dict[str, Any]:
        held = {} if turn == "first" else {CACHE: filled(llama, 1)}
        return {"input_ids": prompt(6), "attention_mask": torch.ones(1, width, dtype=torch.long),
                "max_new_tokens": NEW, "do_sample": False, **held}  # fmt: skip

    check(llama, make, f"mask is {width} wide for 6 tokens")


def masked(rows: list[list[int]]) -> dict[str, Tensor]:
    mask = torch.tensor(rows)
    return {"input_ids": prompt(mask.shape[1], len(mask)), "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "lfm2", "bloom", "qwen3_5"])
@pytest.mark.parametrize("rows", [[[0, 0, 0], [0, 1, 1]], [[0, 0, 0]]])
def test_a_row_without_a_token(family: str, rows: list[list[int]]) -> None:
    model, call = model_of(family), {**masked(rows), "max_new_tokens": NEW, "do_sample": False}
    check(model, lambda: dict(call), "padded on the right")


@pytest.mark.parametrize("sampled", [False, True])
def test_a_batch_without_rows(sampled: bool, llama: Any) -> None:
    call = {"input_ids": torch.zeros(0, 4, dtype=torch.long), "do_sample": sampled}
    check(llama, lambda: {**call, "max_new_tokens": NEW}, "no rows")


@pytest.mark.parametrize("strings", [[], "", [""], "b", ["c", "dd"]])
def test_odd_stop_strings(strings: Any, llama: Any) -> None:
    """An empty list is a mistake of the user's, of which plain says which."""
    call = {"stop_strings": strings, "tokenizer": letter_tokenizer(), "input_ids": prompt(6)}
    check(llama, lambda: {**call, "max_new_tokens": NEW, "do_sample": False})


@pytest.mark.parametrize("size", [0, -4, 2.5])
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_odd_chunks(family: str, size: Any) -> None:
    call = {"input_ids": prompt(6), "prefill_chunk_size": size, "max_new_tokens": NEW}
    check(model_of(family), lambda: {**call, "do_sample": False}, f"prefill_chunk_size is {size}")


@pytest.mark.parametrize("ids", [{}, {"input_ids": prompt(6)}], ids=["alone", "with ids"])
def test_chunks_of_embeddings(ids: dict[str, Tensor], llama: Any) -> None:
    embeds = llama.get_input_embeddings()(prompt(6)).detach()
    call = {**ids, "inputs_embeds": embeds, "prefill_chunk_size": 2, "max_new_tokens": NEW}
    check(llama, lambda: {**call, "do_sample": False}, "splits ids and inputs_embeds")


@pytest.mark.parametrize("limit", [
    {"max_new_tokens": 2.5}, {"max_length": 8.5},
    {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(9.5)])},
])  # fmt: skip
def test_half_a_token(limit: dict[str, Any], llama: Any) -> None:
    """Plain goes on until the limit is reached."""
    found = check(llama, lambda: {"input_ids": prompt(6), "do_sample": False, **limit})
    assert len(found[0]) in (9, 10)


@pytest.mark.parametrize("sampled", [False, True])
def test_an_argument_that_plain_gives_itself(sampled: bool) -> None:
    model = model_of("falcon_rope")  # others refuse it before the loop
    call = {"input_ids": prompt(6), "return_dict": True, "do_sample": sampled}
    check(model, lambda: dict(call), "model input 'return_dict'")


def test_hidden_states_of_several_streams() -> None:
    """Gemma 3n hands on four streams of a state, before the rows."""
    model = model_of("gemma3n")
    call = {**masked([[0, 1, 1, 1], [1, 1, 1, 1]]), "max_new_tokens": NEW, "do_sample": False,
            "output_hidden_states": True, "return_dict_in_generate": True}  # fmt: skip
    expected = plain(model, **call).hidden_states
    with fallbacks() as texts:
        found = model.generate(**call, specdec=SpecConfig("prompt_lookup")).hidden_states
    assert "4 streams of a state" in texts[0]
    for wanted, got in zip(expected, found, strict=True):
        for a, b in zip(wanted, got, strict=True):
            assert torch.equal(a, b)
