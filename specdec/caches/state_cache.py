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

_GROWING = {"keys": -2, "values": -2, "indexer_keys": -2, "indexer_position_ids": -1}
"""Tensors that grow, and their slot dimension; replaced, not written to, by an update."""

_FOLDED = ("conv_states", "recurrent_states")
"""Dictionaries of tensors without a slot dimension, written in place by an update."""

_FULL_SIZE = {  # what keeps all slots, in place of what forgets those outside its window
    "DynamicSlidingWindowLayer": "DynamicLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer": "LinearAttentionAndFullAttentionLayer",
}
_BY_ROW = (
    "DynamicLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "DummyLayer",
    *_FULL_SIZE,
)


def why_not_revocable(cache: Any, padding: Sequence[int]) -> str | None:
    """Why a cache cannot be put back, or None when it can.

    Args:
        cache: The cache of a prepared call.
        padding: Padding slots in front of each row.
    """
    if cache is None:
        return "generate prepares no cache for it"
    if not isinstance(cache, cache_utils.DynamicCache):
        return f"the call uses a {type(cache).__name__}"
    if cache.offloading:
        return "the call uses an offloaded cache"
    for layer in cache.layers:
        name = type(layer).__name__
        if name in _FULL_SIZE and layer.is_initialized:
            return f"the user's cache holds a {name}, which has forgotten slots"
    if _foreign(cache) and (len(padding) > 1 or any(padding)):
        return f"rows and padding of a {_foreign(cache)} cannot be told apart"
    return None


def rows_held(cache: Any) -> int | None:
    """Rows of a user's cache, dynamic or static; None when nothing in it says how many."""
    for layer in getattr(cache, "layers", ()):
        states = [state for each in _folded(layer).values() for state in each.values()]
        tensors = [layer.keys if _is_filled(layer) else None, *states]
        found = next((tensor for tensor in tensors if tensor is not None), None)
        if found is not None:
            return len(found)
    return None


def _foreign(cache: Any) -> str | None:
    """Name of a kind of cache or layer whose inside is not known, if there is one."""
    kinds = [type(cache).__name__] if type(cache) is not cache_utils.DynamicCache else []
    kinds += [type(layer).__name__ for layer in cache.layers]
    return next((kind for kind in kinds if kind not in (*_BY_ROW, "DynamicCache")), None)


def revocable(cache: Any, padding: Sequence[int]) -> StateCache:
    """The cache of a call, such that rows can be put back.

    Raises:
        UnsupportedModelError: It cannot.
    """
    reason = why_not_revocable(cache, padding)
    if reason is not None:
        raise UnsupportedModelError(reason)
    return WholeCache(cache, padding) if _foreign(cache) else StateCache(cache, padding)


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
        self._own_padding = list(padding)  # plain's layout; what a row lags behind comes on top
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
        lags = zip(self.padding, shift, self._own_padding, strict=True)
        trim = min(pad + more - own for pad, more, own in lags)
        old_width = self.width - new
        for layer, held in zip(self.cache.layers, self._held, strict=True):
            for name in _GROWING:
                if getattr(layer, name, None) is not None and _is_filled(layer):
                    slots, dim = getattr(layer, name), _GROWING[name]
                    if not any(shift) and not trim:
                        slots = slots.narrow(dim, 0, old_width + kept[0])
                    else:
                        slots = _aligned(slots, dim, [old_width + n for n in kept], trim)
                    setattr(layer, name, slots)
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


class WholeCache(StateCache):
    """A cache whose layers are of a kind of their own: one row, put back as a whole.

    The remembered copy is a deep one, which costs as much as the cache is long.
    """

    def __init__(self, cache: Any, padding: Sequence[int]) -> None:
        self.cache = copy.deepcopy(cache)
        self.padding = list(padding)
        self._whole: Any = None

    @property
    def has_state(self) -> bool:
        """True: nobody knows what the layers fold."""
        return True

    @property
    def width(self) -> int:
        """0: without padding there is nothing to mask."""
        return 0

    def hold(self) -> None:
        """Remembers the present state."""
        self._whole = copy.deepcopy(self.cache)

    def put_back(self) -> None:
        """Returns to what `hold` remembered."""
        if self._whole is not None:
            self.cache, self._whole = self._whole, None

    def keep(self, kept: Sequence[int], new: int) -> None:
        """Keeps the whole forward, or nothing of it."""
        if kept[0] == 0:
            return self.put_back()
        if kept[0] != new:
            raise ValueError(f"a state takes all {new} tokens or none, got {kept[0]}")
        self._whole = None
        return None

    def hand_over(self, cache: Any) -> None:
        """Gives everything to the cache of the call."""
        vars(cache).update(vars(self.cache))


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


def _has_states(layer: Any) -> bool:
    return any(s is not None for states in _folded(layer).values() for s in states.values())


def _is_filled(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return keys is not None and keys.ndim > 2


def _aligned(slots: Tensor, dim: int, counts: Sequence[int], trim: int) -> Tensor:
    """The first `counts[b]` slots of every row, aligned on the right, `trim` columns fewer."""
    width, row_dim = max(counts) - trim, 0 if dim == -2 else -2
    shape = list(slots.shape)
    shape[dim] = width
    moved = slots.new_zeros(shape)
    for row, count in enumerate(counts):
        held = min(count, width)
        into = moved.select(row_dim, row).narrow(dim, width - held, held)
        into.copy_(slots.select(row_dim, row).narrow(dim, count - held, held))
    return moved


def check_layers(cache: Any, batch: int) -> None:
    """Raises `UnsupportedModelError` when nothing is held, or something that cannot be put back."""
    if not any(_is_filled(layer) or _has_states(layer) for layer in cache.layers):
        known = all(type(layer).__name__ in _BY_ROW for layer in cache.layers)
        if known and type(cache) is cache_utils.DynamicCache:
            raise UnsupportedModelError("the model leaves its cache empty")
    for layer in cache.layers:
        if type(layer).__name__ not in _BY_ROW:
            continue  # put back as a whole
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.ndim and name not in _GROWING:
                raise UnsupportedModelError(
                    f"a {type(layer).__name__} holds {name!r}, which is not known to be put back"
                )
        for states in _folded(layer).values():
            for state in states.values():
                if state is not None and state.shape[0] != batch:
                    raise UnsupportedModelError(
                        f"a {type(layer).__name__} holds a state of shape {tuple(state.shape)} "
                        f"for {batch} rows"
                    )
