"""StateCache: a Hugging Face cache that can be put back after a forward, row by row.

Convolutional and recurrent layers fold every token into one state, so a rejected token cannot be
cut out of it again: the state of a row either takes a whole forward or stays what it was before.
Attention layers keep as many of the new slots as a row accepted. Rows stay aligned on the right, as
in a left-padded batch, so that Hugging Face's own masks and windows hold for rows of any length.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from specdec.errors import UnsupportedModelError

_GROWING = ("keys", "values", "indexer_keys")
"""Tensors with a slot dimension (the last but one); replaced, not written to, by an update."""

_FOLDED = ("conv_states", "recurrent_states")
"""Dictionaries of tensors without a slot dimension, written in place by an update."""

_FULL_SIZE = {  # what keeps all slots, in place of what forgets those outside its window
    "DynamicSlidingWindowLayer": "DynamicLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer": "LinearAttentionAndFullAttentionLayer",
}
_KNOWN = (
    "DynamicLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "DummyLayer",
    *_FULL_SIZE,
)


def why_not_revocable(cache: Any) -> str | None:
    """Why a cache cannot be put back, or None when it can."""
    if cache is None:
        return "the call uses no cache"
    if type(cache) is not cache_utils.DynamicCache:
        return f"the call uses a {type(cache).__name__}"
    if cache.offloading:
        return "the call uses an offloaded cache"
    for layer in cache.layers:
        name = type(layer).__name__
        if name not in _KNOWN:
            return f"the cache holds a {name}"
        if name in _FULL_SIZE and layer.is_initialized:
            return f"the user's cache holds a {name}, which has forgotten slots"
    return None


class StateCache:
    """The cache of one call in chain mode.

    Works on layers of its own, so that the cache it is made from is untouched until `hand_over`.

    Args:
        cache: A `DynamicCache`, empty or holding the prompt of earlier turns.
        padding: Padding slots in front of each row, the prompt that is still to come included.

    Attributes:
        cache: What the model is given.
        padding: Slots in front of each row that hold nothing.
        has_state: Whether some layer folds its tokens into a state.
    """

    def __init__(self, cache: Any, padding: Sequence[int]) -> None:
        self.cache = copy.copy(cache)
        self.cache.layers = [_own(layer) for layer in cache.layers]
        self.padding = list(padding)
        self._held: list[dict[str, Any]] = []

    @property
    def has_state(self) -> bool:
        """Whether some layer folds its tokens into a state, known after the prefill."""
        return any(_folded(layer) for layer in self.cache.layers)

    @property
    def width(self) -> int:
        """Slots of the attention layers, padding included; 0 when there are none."""
        sizes = (layer.keys.shape[-2] for layer in self.cache.layers if _is_filled(layer))
        return next(sizes, 0)

    def mask(self, new: int, device: torch.device) -> Tensor | None:
        """[B, width + new] int64 attention mask, or None when no row is padded."""
        width = self.width
        if not width or not any(self.padding):
            return None
        slots = torch.arange(width + new, device=device)
        return (slots >= torch.tensor(self.padding, device=device)[:, None]).long()

    def hold(self) -> None:
        """Remembers the present state, to which `keep` and `put_back` return."""
        self._held = [
            {name: getattr(layer, name, None) for name in _GROWING}
            | {name: _cloned(getattr(layer, name, {})) for name in _FOLDED}
            for layer in self.cache.layers
        ]

    def put_back(self) -> None:
        """Returns all rows to what `hold` remembered; harmless when nothing is held."""
        for layer, held in zip(self.cache.layers, self._held, strict=False):
            for name in _GROWING:
                if hasattr(layer, name):
                    setattr(layer, name, held[name])
            for name, states in _folded(layer).items():
                for index, state in states.items():
                    if state is not None:
                        state.copy_(held[name][index])
        self._held = []

    def keep(self, kept: Sequence[int], new: int) -> None:
        """Ends a forward over `new` tokens a row: row b keeps the first `kept[b]` of them.

        Raises:
            ValueError: A row of a model with states keeps a part of its tokens.
        """
        if self.has_state and any(count not in (0, new) for count in kept):
            raise ValueError(f"a state takes all {new} tokens of a row or none, got {list(kept)}")
        if not any(kept):
            return self.put_back()
        back = [row for row, count in enumerate(kept) if count == 0]
        shift = [max(kept) - count for count in kept]
        trim = min(pad + more for pad, more in zip(self.padding, shift, strict=True))
        old_width = self.width - new
        for layer, held in zip(self.cache.layers, self._held, strict=True):
            for name in _GROWING:
                if getattr(layer, name, None) is not None and _is_filled(layer):
                    tensor = getattr(layer, name)
                    if not any(shift) and not trim:
                        tensor = tensor[..., : old_width + kept[0], :]
                    else:
                        tensor = _aligned(tensor, [old_width + count for count in kept], trim)
                    setattr(layer, name, tensor)
            for name, tensors in _folded(layer).items():
                for index, tensor in tensors.items():
                    if back and tensor is not None:
                        tensor[back] = held[name][index][back]
        self.padding = [pad + more - trim for pad, more in zip(self.padding, shift, strict=True)]
        self._held = []
        return None

    def hand_over(self, cache: Any) -> None:
        """Gives the layers to the cache of the call, with its own window sizes."""
        layers = []
        for index, layer in enumerate(self.cache.layers):
            wanted = cache.layers[index] if index < len(cache.layers) else layer
            if type(wanted).__name__ in _FULL_SIZE:
                layer = _windowed(layer, wanted)
            layers.append(layer)
        cache.layers = layers


def _own(layer: Any) -> Any:
    """A layer with tensors of its own, that keeps all slots."""
    full_size = _FULL_SIZE.get(type(layer).__name__)
    if full_size is not None:
        states = {"number_of_states": n} if (n := getattr(layer, "number_of_states", 0)) else {}
        return getattr(cache_utils, full_size)(**states)
    own = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(own, name, _cloned(value))
    return own


def _windowed(layer: Any, wanted: Any) -> Any:
    """`wanted`, filled with the newest slots of `layer` that its window reaches."""
    for name, value in vars(layer).items():
        setattr(wanted, name, value)
    if _is_filled(layer):
        wanted.cumulative_length = layer.keys.shape[-2]
        for name in ("keys", "values"):
            slots = getattr(layer, name)
            first = max(slots.shape[-2] - (wanted.sliding_window - 1), 0)
            setattr(wanted, name, slots[..., first:, :].contiguous())
    return wanted


def _cloned(states: dict[int, Any]) -> dict[int, Any]:
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in states.items()}


def _folded(layer: Any) -> dict[str, dict[int, Tensor | None]]:
    """The layer's states by name; empty for attention."""
    return {name: states for name in _FOLDED if (states := getattr(layer, name, None))}


def _is_filled(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return keys is not None and keys.ndim > 2


def _aligned(slots: Tensor, counts: Sequence[int], trim: int) -> Tensor:
    """The first `counts[b]` slots of every row, aligned on the right, `trim` columns fewer."""
    width = max(counts) - trim
    moved = slots.new_zeros(*slots.shape[:-2], width, slots.shape[-1])
    for row, count in enumerate(counts):
        held = min(count, width)
        moved[row, ..., width - held :, :] = slots[row, ..., count - held : count, :]
    return moved


def check_rows(cache: Any, batch: int) -> None:
    """Raises `UnsupportedModelError` when some state has no row dimension in front."""
    for layer in cache.layers:
        for states in _folded(layer).values():
            for state in states.values():
                if state is not None and state.shape[0] != batch:
                    raise UnsupportedModelError(
                        f"a {type(layer).__name__} holds a state of shape {tuple(state.shape)} "
                        f"for {batch} rows"
                    )
