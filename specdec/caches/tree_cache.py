"""TreeCache: a preallocated, ragged KV cache that a whole token tree can be written into.

Rows of a batch have their own lengths. A forward over T nodes writes slots
`lengths[b] .. lengths[b] + T - 1` of row b; `commit` then moves the accepted ones next to the
prefix. Slot index equals position for committed tokens, in sliding-window layers too, which keep
all tokens in this version and mask by position.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

View = Literal["live", "capacity"]


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, heads, capacity, dim]; sizes may differ by layer."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()
        self._cache = cast(TreeCache, weakref.proxy(cache))  # no cycle: freed with the call

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates both buffers; zeros, because masked slots must not hold NaN."""
        self.device = key_states.device
        room = self._cache.capacity
        self.keys = key_states.new_zeros(*key_states.shape[:2], room, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], room, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes T new slots of every row in place and returns views of the visible slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, keys, values = self._cache, self.keys, self.values
        if keys.shape[2] < cache.capacity:
            keys, values = self._grow()
        if cache.start is not None:
            keys[:, :, cache.start : cache.stop] = key_states
            values[:, :, cache.start : cache.stop] = value_states
        else:
            slots = cache.slots(key_states.shape[-2], keys.device)[:, None, :, None]
            keys.scatter_(2, slots.expand(key_states.shape), key_states)
            values.scatter_(2, slots.expand(value_states.shape), value_states)
        return keys[:, :, : cache.stop], values[:, :, : cache.stop]

    def _grow(self) -> tuple[Tensor, Tensor]:
        for name in ("keys", "values"):
            old = getattr(self, name)
            room = self._cache.capacity - old.shape[2]
            extra = old.new_zeros(*old.shape[:2], room, old.shape[-1])
            setattr(self, name, torch.cat([old, extra], dim=2))
        return self.keys, self.values

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies slots `source` [B, P] to slots `target` [B, P], row by row."""
        source, target = source.to(self.keys.device), target.to(self.keys.device)
        for buffer in (self.keys, self.values):
            if len(source) == 1:
                buffer.index_copy_(2, target[0], buffer.index_select(2, source[0]))
            else:
                shape = (-1, buffer.shape[1], -1, buffer.shape[-1])
                picked = buffer.gather(2, source[:, None, :, None].expand(shape))
                buffer.scatter_(2, target[:, None, :, None].expand(shape), picked)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width of the visible slots and their offset, for masks that Hugging Face builds."""
        return self._cache.stop, 0

    def get_seq_length(self) -> int:
        """Committed slots of the longest row."""
        return max(self._cache.host_lengths)

    def get_max_length(self) -> int:
        """-1: the layer grows."""
        return -1


class TreeCache(Cache):
    """KV cache of one `generate` call.

    Args:
        batch: Rows that are decoded together, B.
        device: Where the row lengths live.
        capacity: Slots to allocate at first; grows by half when exceeded.
        view: "live" shows slots up to the longest row (dense masks); "capacity" always shows the
            whole buffer, with lengths read on the device, so that shapes never change (kernels,
            graph capture). A forward may ask for the other one.

    Attributes:
        lengths: [B] int64 committed slots, on the device.
        host_lengths: The same numbers on the host.
        start: First slot that the coming forward writes, when it is the same in all rows of a live
            view; else None, and the slots come from `lengths`.
        stop: Number of slots that the coming forward may look at.
    """

    def __init__(
        self, batch: int, device: torch.device, capacity: int, view: View = "live"
    ) -> None:
        own = weakref.ref(self)
        super().__init__(layer_class_to_replicate=lambda: TreeLayer(cast(TreeCache, own())))
        self.capacity, self.view = capacity, view
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.host_lengths = [0] * batch
        self.start: int | None = 0
        self.stop = 0
        self._slots: dict[torch.device, Tensor] = {}

    def layer(self, index: int) -> TreeLayer:
        """The layer of this index, made if the model has not written it yet."""
        while len(self.layers) <= index:
            self.layers.append(TreeLayer(self))
        layer: TreeLayer = self.layers[index]
        return layer

    def reserve(self, width: int, view: View | None = None) -> None:
        """Prepares a forward over `width` nodes: makes room, and settles where they are written.

        Args:
            width: Slots that the forward writes in every row.
            view: What this forward looks at; None for the cache's own view.
        """
        longest = max(self.host_lengths)
        if self.capacity < longest + width:
            self.capacity = max(longest + width, self.capacity * 3 // 2)
        live = (view or self.view) == "live"
        self.start = longest if live and min(self.host_lengths) == longest else None
        self.stop = longest + width if live else self.capacity
        self._slots.clear()

    def slots(self, width: int, device: torch.device) -> Tensor:
        """[B, width] slots that the next forward writes; computed once a forward and device."""
        slots = self._slots.get(device)
        if slots is None or slots.shape[1] != width:
            slots = (self.lengths[:, None] + torch.arange(width, device=self.lengths.device)).to(
                device
            )
            self._slots[device] = slots
        return slots

    def commit(self, path: Tensor, accepted: Sequence[Sequence[int]], rows: Sequence[bool]) -> None:
        """Keeps the root and the accepted nodes of every active row; drops the rest.

        Args:
            path: [B, P] accepted nodes, -1 padded, on the device.
            accepted: The same nodes on the host, as far as the stop rules let them stand.
            rows: Which rows were active; the others keep their length.
        """
        depth = max((len(nodes) for nodes in accepted), default=0)
        if any(list(nodes) != list(range(1, len(nodes) + 1)) for nodes in accepted):
            order = torch.arange(1, depth + 1, device=path.device)
            node = torch.where(path[:, :depth] >= 0, path[:, :depth].long(), order)
            base = self.lengths[:, None]
            for layer in self.layers:
                if layer.is_initialized:
                    layer.move(base + node, base + order)
        self.set_lengths(
            [
                length + (1 + len(nodes) if active else 0)
                for length, nodes, active in zip(self.host_lengths, accepted, rows, strict=True)
            ]
        )

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Declares how many slots of each row are committed."""
        steps = {new - old for new, old in zip(lengths, self.host_lengths, strict=True)}
        self.host_lengths = list(lengths)
        if len(steps) == 1:  # no upload where all rows advance alike
            self.lengths.add_(steps.pop())
        else:
            self.lengths.copy_(torch.tensor(self.host_lengths))
        self._slots.clear()
