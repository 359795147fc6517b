"""A user's `DynamicCache`, taken into a `TreeCache` and filled again as plain `generate` would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import cache_utils

from specdec.tree_cache import TreeCache

_ADOPTABLE_LAYERS = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DummyLayer",  # holds nothing: the layer reads the keys and values of another one
)


def _adoptable_layers() -> set[type]:
    return {getattr(cache_utils, n) for n in _ADOPTABLE_LAYERS if hasattr(cache_utils, n)}


def unsupported_cache(cache: Any) -> str | None:
    """Why a cache cannot be adopted into a `TreeCache`, or None when it can."""
    if cache is None:
        return "the call uses no KV cache"
    if type(cache) is not cache_utils.DynamicCache:
        return f"the call uses a {type(cache).__name__}"
    if cache.offloading:
        return "the call uses an offloaded cache"
    for layer in cache.layers:
        if type(layer) not in _adoptable_layers():
            return f"the cache holds a {type(layer).__name__}"
    return None


def adopt_cache(cache: Any, target: TreeCache, slots: Sequence[Tensor]) -> None:
    """Copies a `DynamicCache` into `target`.

    Args:
        cache: The user's cache.
        target: Empty tree cache with enough capacity.
        slots: Per row, the cache slots that hold tokens (not padding), in order.
    """
    length = cache.get_seq_length()
    for index, layer in enumerate(cache.layers):
        if not layer.is_initialized or layer.keys is None or layer.keys.numel() == 0:
            continue
        offset = length - layer.keys.shape[2]  # a sliding layer holds only the newest slots
        tree_layer = target.layer(index)
        tree_layer.lazy_initialization(layer.keys, layer.values)
        for row, kept in enumerate(slots):
            held = kept.to(layer.keys.device)
            there = (held >= offset).nonzero()[:, 0]
            tree_layer.keys[row, :, there] = layer.keys[row, :, held[there] - offset]
            tree_layer.values[row, :, there] = layer.values[row, :, held[there] - offset]
    target.set_lengths([len(kept) for kept in slots])


def write_back(source: TreeCache, cache: Any, slots: Sequence[Tensor], length: int) -> None:
    """Fills a `DynamicCache` with the tree cache's tokens, laid out as plain `generate` would.

    Slots that were there and hold no token (masked out) keep what they held.

    Args:
        source: Tree cache after the call.
        cache: The cache of the call; overwritten.
        slots: Per row, the slot of each committed token in the padded layout.
        length: Slots of the padded layout.
    """
    past = cache.get_seq_length()
    for index, tree_layer in enumerate(source.layers):
        while len(cache.layers) <= index:
            cache.layers.append(cache_utils.DynamicLayer())
        layer = cache.layers[index]
        if not tree_layer.is_initialized:
            continue
        held = layer.keys.shape[2] if layer.is_initialized and layer.keys.numel() else 0
        old = {"keys": layer.keys, "values": layer.values}
        layer.lazy_initialization(tree_layer.keys, tree_layer.values)
        window = getattr(layer, "sliding_window", None)
        for name in ("keys", "values"):
            buffer = getattr(tree_layer, name)
            padded = buffer.new_zeros(*buffer.shape[:2], length, buffer.shape[-1])
            if held:
                padded[:, :, past - held : past] = old[name]
            for row, kept in enumerate(slots):
                padded[row, :, kept.to(buffer.device)] = buffer[row, :, : len(kept)]
            kept_slots = length if window is None else min(length, window - 1)
            setattr(layer, name, padded[:, :, length - kept_slots :].contiguous())
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
