"""Ancestor words by doubling the reach of every node."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.tree import WORD


def tree_words(parents: Tensor) -> tuple[Tensor, Tensor]:
    """As `specdec_kernels.tree_words` says."""
    batch, size = parents.shape
    # 1. sees[b, i, j]: whether j is i or one of its ancestors, doubling the reach of each step.
    sees = torch.eye(size, dtype=torch.bool, device=parents.device).expand(batch, size, size)
    above, reach = parents.long(), 1
    while reach < size:
        at = above.clamp(min=0)
        sees = sees | (sees.gather(1, at[:, :, None].expand_as(sees)) & (above >= 0)[:, :, None])
        above = torch.where(above >= 0, above.gather(1, at), above)
        reach *= 2
    # 2. 64 nodes a word; the sum wraps into the sign where bit 63 is set.
    count = -(-size // WORD)
    bits = torch.nn.functional.pad(sees.long(), (0, count * WORD - size))
    shift = torch.arange(WORD, device=parents.device)
    words = (bits.view(batch, size, count, WORD) << shift).sum(-1)
    return words, (sees.sum(-1) - 1).int()
