"""A call's cache, taken into a `TreeCache` and filled again as plain `generate` would.

Dynamic caches and static ones; of the latter also their fixed size and the counts that they keep.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from specdec.caches.tree_cache import TreeCache

_DYNAMIC_LAYERS = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DummyLayer",  # holds nothing: the layer reads the keys and values of another one
)
_STATIC_LAYERS = ("StaticLayer", "StaticSlidingWindowLayer", "DummyLayer")


Laid = tuple[int, int, int, torch.dtype]
"""Heads, size of a key, size of a value, and their dtype."""


def laid_out(layer: Any) -> Laid | None:
    """How a layer of a cache lies in memory; None while it holds nothing."""
    if not layer.is_initialized or layer.keys is None:
        return None
    keys, values = layer.keys, layer.values
    return keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype


def is_static(cache: Any) -> bool:
    """Whether a cache is a `StaticCache`."""
    return type(cache) is cache_utils.StaticCache


def unsupported_cache(
    cache: Any, slots: int, config: Any, laid: Sequence[Laid | None]
) -> str | None:
    """Why a cache cannot be adopted into a `TreeCache`, or None when it can.

    Args:
        cache: The cache of the call.
        slots: Slots that plain `generate` may fill, those that are filled already included.
        laid: How the model lays out its layers; a static cache may be laid out before its first
            token, and otherwise.
    """
    if cache is None:
        return "the call uses no KV cache"
    if type(cache) is not cache_utils.DynamicCache and not is_static(cache):
        return f"the call uses a {type(cache).__name__}"
    if cache.offloading:
        return "the call uses an offloaded cache"
    adoptable = _STATIC_LAYERS if is_static(cache) else _DYNAMIC_LAYERS
    text = config.get_text_config()
    spans = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    for layer in cache.layers:
        name = type(layer).__name__
        if name not in adoptable:
            return f"the cache holds a {name}"
        room = getattr(layer, "max_cache_len", slots)
        if room < slots and (name == "StaticLayer" or room not in spans):
            return f"the static cache has {room} slots and the call may need {slots}"
    for index, (layer, own) in enumerate(zip(cache.layers, laid, strict=False)):
        given = laid_out(layer) if is_static(cache) else None
        if given is not None and given != own:
            return f"layer {index} of the static cache is laid out for another model's keys"
    return None


def own_copy(cache: Any) -> Any:
    """A cache of the same content that the model may write to without changing the first one."""
    if is_static(cache):
        return copy.deepcopy(cache)  # its tensors are written in place
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def adopt_cache(
    cache: Any, target: TreeCache, slots: Sequence[Tensor], *, release: bool = False
) -> None:
    """Copies a cache into `target`.

    Args:
        cache: The cache of the call.
        target: Empty tree cache with enough capacity.
        slots: Per row, the cache slots that hold tokens (not padding), in order.
        release: Let each layer of `cache` go as soon as it is copied.
    """
    length = int(cache.get_seq_length())
    for index, layer in enumerate(cache.layers):
        keys, values = _held(layer, length)
        if keys is None or values is None:
            continue
        offset = length - keys.shape[2]  # a sliding layer holds only the newest slots
        tree_layer = target.layer(index)
        tree_layer.lazy_initialization(keys, values)
        for row, kept in enumerate(slots):
            held = kept.to(keys.device)
            there = (held >= offset).nonzero()[:, 0]
            tree_layer.keys[row, :, there] = keys[row, :, held[there] - offset]
            tree_layer.values[row, :, there] = values[row, :, held[there] - offset]
        if release:
            layer.keys = layer.values = None
    target.set_lengths([len(kept) for kept in slots])


def _held(layer: Any, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values [B, heads, n, dim] of the newest slots that a layer holds, in order."""
    if not layer.is_initialized or layer.keys is None or layer.keys.numel() == 0 or not length:
        return None, None
    count = min(layer.keys.shape[2], length)  # a static layer has room to spare behind them
    return layer.keys[:, :, :count], layer.values[:, :, :count]


def write_back(
    source: TreeCache, cache: Any, slots: Sequence[Tensor], length: int, prompt: Sequence[int]
) -> None:
    """Fills the call's cache with the tree cache's tokens, laid out as plain `generate` would.

    Slots that were there and hold no token (masked out) keep what they held.

    Args:
        source: Tree cache after the call.
        cache: The cache of the call; overwritten.
        slots: Per row, the slot of each committed token in the padded layout.
        length: Slots of the padded layout.
        prompt: Slots that each of plain's forwards over the prompt adds; one a forward after them.
    """
    past = int(cache.get_seq_length())
    for index, tree_layer in enumerate(source.layers):
        while len(cache.layers) <= index:
            cache.layers.append(cache_utils.DynamicLayer())
        layer = cache.layers[index]
        if not tree_layer.is_initialized:
            continue
        old = _held(layer, past)
        filled = []
        for buffer, before in zip((tree_layer.keys, tree_layer.values), old, strict=True):
            padded = buffer.new_zeros(*buffer.shape[:2], length, buffer.shape[-1])
            if before is not None:
                padded[:, :, past - before.shape[2] : past] = before
            for row, kept in enumerate(slots):
                padded[row, :, kept.to(buffer.device)] = buffer[row, :, : len(kept)]
            filled.append(padded)
        if is_static(cache):
            _fill_static(layer, filled[0], filled[1], past, prompt)
        else:
            _fill_dynamic(layer, filled[0], filled[1])


def _fill_dynamic(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Replaces what a dynamic layer holds; a sliding one keeps what its window reaches."""
    layer.lazy_initialization(keys, values)
    length = keys.shape[2]
    window = getattr(layer, "sliding_window", None)
    first = 0 if window is None else max(length - (window - 1), 0)
    layer.keys, layer.values = keys[:, :, first:].contiguous(), values[:, :, first:].contiguous()
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


def _fill_static(
    layer: Any, keys: Tensor, values: Tensor, past: int, prompt: Sequence[int]
) -> None:
    """Writes into the tensors of a static layer; compiled models hold their addresses."""
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    length = keys.shape[2]
    count = min(length, layer.max_cache_len)
    layer.keys[:, :, :count] = keys[:, :, length - count :]
    layer.values[:, :, :count] = values[:, :, length - count :]
    if not hasattr(layer, "cumulative_length_int"):
        layer.cumulative_length.fill_(length)
        return
    # A sliding layer counts on the device only the forwards that did not overflow it.
    counted, size, at = int(layer.cumulative_length), layer.max_cache_len, past
    for added in prompt:
        counted += added if at + added <= size else 0
        at += added
    layer.cumulative_length.fill_(counted + max(min(length, size) - at, 0))
    layer.cumulative_length_int = length
