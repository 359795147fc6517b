"""`StateCache` against lists: whatever rows keep, every row is what was kept of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, cache_utils
from transformers.cache_utils import DynamicCache, StaticCache

from specdec.caches.state_cache import StateCache, check_layers, revocable, why_not_revocable
from specdec.errors import UnsupportedModelError

KERNEL, WINDOW = 3, 4


def layers(*kinds: str) -> DynamicCache:
    """A cache of the given layers, empty."""
    cache = DynamicCache()
    cache.layers = [getattr(cache_utils, kind)(**_sizes(kind)) for kind in kinds]
    cache.layer_class_to_replicate = None
    return cache


def _sizes(kind: str) -> dict[str, int]:
    return {"sliding_window": WINDOW} if "Sliding" in kind else {}


def run(cache: Any, tokens: Tensor) -> None:
    """A model's forward: every layer takes `tokens` [B, q], each in its own way.

    Slots hold the tokens. Convolutions hold the newest ones, a recurrence a number made of all.
    """
    for layer in cache.layers:
        slots = tokens[:, None, :, None].double()
        if hasattr(layer, "keys"):
            layer.update(slots, -slots)
        if hasattr(layer, "conv_states"):
            held = layer.recurrent_states[0]
            folded = torch.zeros(len(tokens), 1).double() if held is None else held.clone()
            for column in tokens.T:
                folded = (folded * 31 + column[:, None]) % 1000003
            layer.update_conv_state(tokens[:, None].double(), conv_kernel_size=KERNEL)
            layer.update_recurrent_state(folded)


def fold(tokens: Sequence[int]) -> int:
    """What the recurrence holds after `tokens`."""
    folded = 0
    for token in tokens:
        folded = (folded * 31 + token) % 1000003
    return folded


def check_rows_hold(cache: StateCache, texts: Sequence[Sequence[int]]) -> None:
    """Every row is aligned on the right and holds its text, in all layers."""
    for layer in cache.cache.layers:
        for row, text in enumerate(texts):
            if hasattr(layer, "keys"):
                keys, values = layer.keys[row, 0, :, 0], layer.values[row, 0, :, 0]
                shown = keys[len(keys) - len(text) :]
                assert shown.tolist() == list(text)
                assert torch.equal(values, -keys)
            if hasattr(layer, "conv_states"):
                newest = ([0] * KERNEL + list(text))[-KERNEL:]
                assert layer.conv_states[0][row, 0].tolist() == newest
                assert layer.recurrent_states[0][row].tolist() == [fold(text)]


HYBRID = ("LinearAttentionLayer", "DynamicLayer", "LinearAttentionAndFullAttentionLayer")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_rows_hold_what_they_kept(padding: list[int], prompt: int, folds: bool, seed: int) -> None:
    """Any sequence of forwards that rows keep, keep in part, or give back."""
    draw, rows = random.Random(seed), len(padding)
    original = layers(*(HYBRID if folds else ("DynamicLayer", "DynamicLayer")))
    cache = StateCache(original, padding)
    width = max(padding) + prompt
    columns = torch.tensor([[draw.randint(1, 90) for _ in range(width)] for _ in range(rows)])
    run(cache.cache, columns)
    texts = columns.tolist()  # padding too: what the model made of it stays
    for _ in range(12):
        new = draw.randint(1, 4)
        fed = torch.tensor([[draw.randint(1, 90) for _ in range(new)] for _ in range(rows)])
        cache.hold()
        run(cache.cache, fed)
        if draw.random() < 0.2:
            cache.put_back()
        else:
            choices = (0, new) if folds else range(new + 1)
            kept = [draw.choice(choices) for _ in range(rows)]
            cache.keep(kept, new)
            texts = [
                text + row[:count]
                for text, row, count in zip(texts, fed.tolist(), kept, strict=True)
            ]
        check_rows_hold(cache, texts)
        assert cache.width == max(map(len, texts))
        held = [cache.width - pad for pad in cache.padding]
        assert held == [len(text) - pad for text, pad in zip(texts, padding, strict=True)]
        mask = cache.mask(2, torch.device("cpu"))
        if mask is None:
            assert not any(cache.padding)
        else:
            assert mask.sum(1).tolist() == [count + 2 for count in held]
            assert mask[:, -1].all()
    assert not any(layer.is_initialized for layer in original.layers if hasattr(layer, "keys"))


def test_a_state_takes_all_or_nothing() -> None:
    cache = StateCache(layers(*HYBRID), [0, 0])
    run(cache.cache, torch.tensor([[1, 2], [3, 4]]))
    cache.hold()
    run(cache.cache, torch.tensor([[5, 6, 7], [8, 9, 10]]))
    with pytest.raises(ValueError, match="takes all 3 tokens of a row or none"):
        cache.keep([3, 2], 3)
    cache.put_back()
    check_rows_hold(cache, [[1, 2], [3, 4]])


def test_putting_back_twice_is_harmless() -> None:
    cache = StateCache(layers(*HYBRID), [0])
    cache.put_back()
    run(cache.cache, torch.tensor([[1, 2]]))
    cache.put_back()
    check_rows_hold(cache, [[1, 2]])
    cache.hold()
    run(cache.cache, torch.tensor([[3]]))
    cache.put_back()
    cache.put_back()
    check_rows_hold(cache, [[1, 2]])


def test_the_users_layers_are_not_written_to() -> None:
    """Not even in place, where states are updated so."""
    user = layers(*HYBRID)
    run(user, torch.tensor([[1, 2, 3]]))
    cache = StateCache(user, [0])
    cache.hold()
    run(cache.cache, torch.tensor([[4, 5]]))
    cache.keep([2], 2)
    check_rows_hold(StateCache(user, [0]), [[1, 2, 3]])
    check_rows_hold(cache, [[1, 2, 3, 4, 5]])
    cache.hand_over(user)
    check_rows_hold(StateCache(user, [0]), [[1, 2, 3, 4, 5]])


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("folds", [False, True])
def test_a_window_is_full_size_until_it_is_handed_over(folds: bool, tokens: int) -> None:
    """Afterwards it is the layer that the same tokens would have filled one by one."""
    kind = (
        "LinearAttentionAndSlidingWindowAttention" if folds else "DynamicSlidingWindow"
    ) + "Layer"
    wanted, user = layers(kind), layers(kind)
    text = torch.arange(1, tokens + 1)[None]
    for column in text.T:
        run(wanted, column[:, None])
    cache = StateCache(user, [0])
    run(cache.cache, text[:, :1])
    if tokens > 1:
        cache.hold()
        run(cache.cache, text[:, 1:])
        cache.keep([tokens - 1], tokens - 1)
    check_rows_hold(cache, text.tolist())
    cache.hand_over(user)
    got, layer = user.layers[0], wanted.layers[0]
    assert type(got) is type(layer)
    assert got.keys.tolist() == layer.keys.tolist()
    assert got.values.tolist() == layer.values.tolist()
    assert got.get_seq_length() == layer.get_seq_length() == tokens
    assert got.get_mask_sizes(2) == layer.get_mask_sizes(2)
    if folds:
        assert got.recurrent_states[0].tolist() == layer.recurrent_states[0].tolist()


class Own(DynamicCache):
    """A cache of a kind that nobody knows."""


def test_reasons() -> None:
    window = layers("DynamicSlidingWindowLayer")
    run(window, torch.tensor([[1]]))
    static = StaticCache(config=_config(), max_cache_len=8)
    for cache, padding, reason in [
        (None, [0], "no cache"),
        (static, [0], "a StaticCache"),
        (DynamicCache(config=_config(), offloading=True), [0], "offloaded"),
        (window, [0], "has forgotten slots"),
        (Own(), [0, 0], "rows and padding of a Own"),
        (Own(), [1], "rows and padding of a Own"),
    ]:
        assert reason in (why_not_revocable(cache, padding) or "")
        with pytest.raises(UnsupportedModelError, match=reason):
            revocable(cache, padding)
    for cache in (DynamicCache(), layers(*HYBRID), layers("DynamicSlidingWindowLayer"), Own()):
        assert why_not_revocable(cache, [0]) is None


def _config() -> Any:
    return LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)


def test_an_unknown_kind_is_put_back_as_a_whole() -> None:
    user = Own()
    user.layers = layers(*HYBRID).layers
    cache = revocable(user, [0])
    run(cache.cache, torch.tensor([[1, 2]]))
    cache.hold()
    run(cache.cache, torch.tensor([[3, 4]]))
    cache.keep([0], 2)
    check_rows_hold(cache, [[1, 2]])
    cache.hold()
    run(cache.cache, torch.tensor([[5]]))
    cache.keep([1], 1)
    check_rows_hold(cache, [[1, 2, 5]])
    cache.hold()
    run(cache.cache, torch.tensor([[6, 7]]))
    with pytest.raises(ValueError, match="all 2 tokens or none, got 1"):
        cache.keep([1], 2)
    cache.put_back()
    check_rows_hold(cache, [[1, 2, 5]])
    assert user.layers[1].keys is None or not user.layers[1].is_initialized
    cache.hand_over(user)
    check_rows_hold(StateCache(user, [0]), [[1, 2, 5]])


def test_what_cannot_be_put_back_is_refused() -> None:
    cache = layers("LinearAttentionLayer")
    run(cache, torch.tensor([[1, 2]]))
    check_layers(cache, 1)
    with pytest.raises(UnsupportedModelError, match="for 2 rows"):
        check_layers(cache, 2)
    cache.layers[0].memory = torch.zeros(1, 3)
    with pytest.raises(UnsupportedModelError, match="'memory'"):
        check_layers(cache, 1)
