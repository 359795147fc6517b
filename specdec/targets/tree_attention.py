"""Fused tree attention in the place of a model's own, for the length of one forward over trees.

The tree travels beside the call, not through it: what a layer hands on is its queries, the whole
buffers of the cache, and a placeholder in the place of a mask. The placeholder's shape tells which
layer type it was made for, and so the window or the chunk, whatever the layer itself knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from specdec.caches.tree_cache import TreeCache
from specdec.errors import UnsupportedModelError
from specdec.hf.compat import MaskKinds
from specdec_kernels import Backend, Tree, tree_attention


def placeholders(
    kinds: MaskKinds, dtype: torch.dtype, device: torch.device
) -> Tensor | dict[str, Tensor]:
    """Stand-ins for the masks of a forward: [1, 1, 1, n] zeros, n = 1, 2, ... by layer type.

    A shape survives what is done to a mask on its way to a layer: a move to the layer's device, a
    change of dtype, a copy.
    """
    made = {
        kind: torch.zeros(1, 1, 1, index, dtype=dtype, device=device)
        for index, kind in enumerate(kinds.kinds, start=1)
    }
    return made if kinds.as_dict else made[kinds.kinds[0]]


class TreeAttention:
    """Attention of one forward over token trees.

    Args:
        tree: Trees of all rows, and what is committed before them.
        kinds: Layer types of the model.
        cache: Where its layers write and read.
        backend: What runs the kernel.

    Attributes:
        calls: Layers that were attended to so far.
        in_place: Whether each of them handed on the cache's own buffer of keys, not a copy.
    """

    def __init__(self, tree: Tree, kinds: MaskKinds, cache: TreeCache, backend: Backend) -> None:
        self.calls, self.in_place = 0, True
        self._cache, self._backend = cache, backend
        self._spans = [kinds.window_and_chunk(kind) for kind in kinds.kinds]
        self._trees = {tree.words.device: tree}
        self._buffers: set[int] = set()

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """What transformers calls in every layer: output [B, T, Hq, Dv], and no weights.

        Args:
            module: The layer's attention.
            query: [B, Hq, T, Dk].
            key: [B, Hkv, S, Dk] all slots of the cache, those of the tree included.
            value: [B, Hkv, S, Dv].
            attention_mask: The placeholder of the layer's type.
            **more: `scaling`, `softcap` and `s_aux` (sinks) count, where a layer gives them.

        Raises:
            UnsupportedModelError: The mask is none of the placeholders, or a bias comes with it.
        """
        if more.get("position_bias") is not None:
            raise UnsupportedModelError(f"{type(module).__name__} adds a bias to its scores")
        self.calls += 1
        self.in_place = self.in_place and self._is_buffer(key)
        window, chunk = self._span(module, attention_mask)
        scale = more.get("scaling")
        with _as_autocast_has_it(query, key, value) as (query, key, value):
            out = tree_attention(
                query,
                key,
                value,
                self._tree_on(query.device),
                scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
                window=window,
                chunk=chunk,
                softcap=more.get("softcap") or 0.0,
                sinks=more.get("s_aux"),
                backend=self._backend,
            )
        return cast(Tensor, out), None

    def check_calls(self) -> None:
        """After the forward: raises `UnsupportedModelError` when a cached layer did not call."""
        layers = sum(layer.is_initialized for layer in self._cache.layers)
        if self.calls < layers:
            raise UnsupportedModelError(
                f"its layers called transformers' attention interface {self.calls} times, and "
                f"{layers} of them have a cache"
            )

    def _span(self, module: Any, mask: Tensor | None) -> tuple[int, int]:
        """Window and chunk of the layer type that a placeholder was made for."""
        shape = () if mask is None else tuple(mask.shape)
        if len(shape) == 4 and shape[2] == 1 and 1 <= shape[3] <= len(self._spans):
            return self._spans[shape[3] - 1]
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with a mask of its own, of shape {shape}"
        )

    def _is_buffer(self, key: Tensor) -> bool:
        """Whether keys lie in the cache itself; looks its buffers up anew once they have grown."""
        if key.data_ptr() not in self._buffers:
            layers = [layer for layer in self._cache.layers if layer.is_initialized]
            self._buffers = {layer.keys.data_ptr() for layer in layers}
        return key.data_ptr() in self._buffers

    def _tree_on(self, device: torch.device) -> Tree:
        """The trees where a layer computes; copied once a forward to every other device."""
        found = self._trees.get(device)
        if found is None:
            tree = next(iter(self._trees.values()))
            parts = (tree.words, tree.depth, tree.size, tree.prefix)
            found = Tree(*(part.to(device, non_blocking=True) for part in parts))
            self._trees[device] = found
        return found


@contextmanager
def _as_autocast_has_it(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in the dtype in which autocast runs attention; inside, it changes nothing more.

    A rotary embedding leaves queries and keys in float32 there and values in half precision.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        yield tensors
        return
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        yield tuple(tensor.to(dtype) for tensor in tensors)
