"""What a drafter is shown of the prompt: every token once, without padding, at its position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from helpers.hf import ids_of, left_padded, plain, prompt
from helpers.names import CACHE
from specdec import RowDrafter, SpecConfig, TokenTree
from specdec.drafters.row import DraftRow
from specdec.registry import methods

METHOD = "watcher_of_prompts"
NEW = 6


class Watcher(RowDrafter):
    """Proposes nothing and remembers what it was shown, by row and position."""

    shown: list[dict[int, int]]

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        assert token_ids.dtype == torch.int64
        assert token_ids.shape[0] == len(rows)
        assert features is None
        for row, tokens in zip(rows, token_ids.tolist(), strict=True):
            for position, token in enumerate(tokens, offset):
                assert position not in Watcher.shown[row], "a token was shown twice"
                Watcher.shown[row][position] = token

    class Row(DraftRow):
        def propose(self, budget: int) -> TokenTree:
            return TokenTree([self.text[-1]], [-1])


@pytest.fixture(autouse=True)
def _watcher() -> Iterator[None]:
    methods.register(METHOD, Watcher)
    yield
    methods.unregister(METHOD)


def shown(model: Any, rows: int, **call: Any) -> tuple[list[dict[int, int]], Tensor]:
    """(position -> token of each row, the text) of one call."""
    Watcher.shown = [{} for _ in range(rows)]
    text = model.generate(**call, max_new_tokens=NEW, do_sample=False, specdec=SpecConfig(METHOD))
    return Watcher.shown, ids_of(text)


def unpadded(inputs: dict[str, Tensor]) -> list[list[int]]:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return ids.tolist()
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("chunk", [None, 1, 4, 50])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_chunks(llama: Any, padded: bool, chunk: int | None) -> None:
    inputs = left_padded((9, 4, 6, 1)) if padded else {"input_ids": prompt(9, 2)}
    rows = unpadded(inputs)
    call = {**inputs, **({} if chunk is None else {"prefill_chunk_size": chunk})}
    found, text = shown(llama, len(rows), **call)
    assert found == [dict(enumerate(row)) for row in rows]
    assert torch.equal(text, plain(llama, **call, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("padded", [False, True])
def test_the_second_turn_shows_what_is_new(llama: Any, padded: bool) -> None:
    """Positions go on behind the adopted cache, row by row."""
    inputs = left_padded((9, 4, 6)) if padded else {"input_ids": prompt(9, 2)}
    rows = unpadded(inputs)
    cache = DynamicCache()
    _, text = shown(llama, len(rows), **inputs, **{CACHE: cache})
    assert cache.get_seq_length() == 9 + NEW - 1
    new = torch.cat([text, prompt(3, len(rows), seed=4)], 1)
    second = {"input_ids": new}
    if padded:
        ones = torch.ones(len(rows), NEW + 3, dtype=torch.long)
        second["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    found, _ = shown(llama, len(rows), **second, **{CACHE: cache})
    for row, before, whole in zip(found, rows, unpadded(second), strict=True):
        held = len(before) + NEW - 1
        assert row == {at: whole[at] for at in range(held, len(whole))}
