"""The commit, one buffer after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def move(tensors: Sequence[Tensor], path: Tensor, length: Tensor, prefix: Tensor) -> None:
    """Moves the slots as `specdec_kernels.commit_kv` says; the prefixes stay as they are."""
    # 1. Offsets [B, P] from the prefix. What does not move copies the root onto itself: slots
    #    further on may lie outside the cache.
    depth = torch.arange(1, path.shape[1] + 1, device=path.device)
    moves = depth <= length[:, None]
    source = torch.where(moves, path, 0) + prefix[:, None]
    target = torch.where(moves, depth, 0) + prefix[:, None]
    # 2. All slots are read before any is written: the path of one may be the place of another.
    for tensor in tensors:
        shape = (-1, tensor.shape[1], -1, tensor.shape[3])
        picked = tensor.gather(2, source[:, None, :, None].expand(shape).long())
        tensor.scatter_(2, target[:, None, :, None].expand(shape).long(), picked)
