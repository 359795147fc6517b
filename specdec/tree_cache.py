"""TreeCache: a preallocated, ragged KV cache that a whole token tree can be written into.

Rows of a batch have their own lengths. A forward over T nodes writes slots
`lengths[b] .. lengths[b] + T - 1` of row b; `commit` then moves the accepted ones next to the
prefix. Slot index equals position for committed tokens, in sliding-window layers too, which keep
all tokens in this version and mask by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

View = Literal["live", "capacity"]


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, heads, capacity, dim]; heads and dims may differ by layer."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates both buffers; zeros, because masked slots must not hold NaN."""
        self.dtype, self.device = key_states.dtype, key_states.device
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
        self._grow()
        start, width = self._cache.uniform_length, key_states.shape[-2]
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if start is not None:
                buffer[:, :, start : start + width] = states
            else:
                slots = self._cache.slots(width, buffer.device)[:, None, :, None]
                buffer.scatter_(2, slots.expand(-1, buffer.shape[1], -1, buffer.shape[-1]), states)
        visible = self._cache.visible(width)
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def _grow(self) -> None:
        missing = self._cache.capacity - self.keys.shape[2]
        if missing > 0:
            for name in ("keys", "values"):
                old = getattr(self, name)
                extra = old.new_zeros(*old.shape[:2], missing, old.shape[-1])
                setattr(self, name, torch.cat([old, extra], dim=2))

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
        return self._cache.visible(query_length), 0

    def get_seq_length(self) -> int:
        """Committed slots of the longest row."""
        return max(self._cache.host_lengths)

    def get_max_length(self) -> int:
        """-1: the layer grows."""
        return -1


class TreeCache(Cache):
    """KV cache of one `generate` call.

    Args:
        batch: Rows.
        device: Where the row lengths live.
        capacity: Slots to allocate at first; grows by doubling when exceeded.
        view: "live" shows slots up to the longest row (dense masks); "capacity" always shows the
            whole buffer, with lengths read on the device, so that shapes never change (kernels,
            graph capture).

    Attributes:
        lengths: [B] int64 committed slots, on the device.
        host_lengths: The same numbers on the host.
    """

    def __init__(
        self, batch: int, device: torch.device, capacity: int, view: View = "live"
    ) -> None:
        super().__init__(layer_class_to_replicate=lambda: TreeLayer(self))
        self.capacity, self.view = capacity, view
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.host_lengths = [0] * batch
        self._slots: dict[torch.device, Tensor] = {}

    def layer(self, index: int) -> TreeLayer:
        """The layer of this index, made if the model has not written it yet."""
        while len(self.layers) <= index:
            self.layers.append(TreeLayer(self))
        return self.layers[index]

    @property
    def uniform_length(self) -> int | None:
        """The common length of all rows, or None when they differ or shapes must stay fixed."""
        first = self.host_lengths[0]
        same = self.view == "live" and all(length == first for length in self.host_lengths)
        return first if same else None

    def reserve(self, width: int) -> None:
        """Makes room for `width` more slots in every row, before the layers are written."""
        needed = max(self.host_lengths) + width
        while self.capacity < needed:
            self.capacity *= 2
        self._slots.clear()

    def visible(self, width: int) -> int:
        """Slots that a forward over `width` nodes may look at."""
        return self.capacity if self.view == "capacity" else max(self.host_lengths) + width

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
        self.set_lengths([
            length + (1 + len(nodes) if active else 0)
            for length, nodes, active in zip(self.host_lengths, accepted, rows, strict=True)
        ])

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Declares how many slots of each row are committed."""
        self.host_lengths = list(lengths)
        self.lengths.copy_(torch.tensor(self.host_lengths))
        self._slots.clear()
