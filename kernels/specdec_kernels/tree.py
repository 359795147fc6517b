"""What the kernels know about a batch of token trees: ancestor words, depths, sizes, prefixes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 64
"""Nodes that one int64 word of a mask holds."""


@dataclass(frozen=True, slots=True)
class Tree:
    """One token tree a row, as a forward over T nodes sees them.

    Node 0 is the root, and parents come before their children. Node i stands at position
    `prefix + depth[i]`, and its key is in cache slot `prefix + i`. No kernel reads these on the
    host.

    Attributes:
        words: [B or 1, T, ceil(T / 64)] int64; bit j % 64 of word j // 64 of row i says whether
            node i sees node j: itself and its ancestors.
        depth: [B or 1, T] int32 distance of a node from its root.
        size: [B] int32 live nodes; what comes after them is padding.
        prefix: [B] int32 or int64 committed slots.
    """

    words: Tensor
    depth: Tensor
    size: Tensor
    prefix: Tensor


def tree_words(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Ancestor words and depths of trees.

    Args:
        parents: [B, T] int32 or int64, -1 at node 0, each below its own index.

    Returns:
        words [B, T, ceil(T / 64)] int64 and depth [B, T] int32, as `Tree` has them.
    """
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


def tree_ancestors(words: Tensor, depth: Tensor, width: int) -> Tensor:
    """The path to every node: what attention in the order of positions looks keys up by.

    Args:
        words: [B, T, ceil(T / 64)] int64 ancestor words.
        depth: [B, T] int32 depths; those of live nodes are below `width`.
        width: The largest depth that a tree may have, and one.

    Returns:
        [B, T, width] int32: at [b, i, d] the ancestor of node i at depth d, up to its own depth and
        0 beyond.
    """
    batch, size = depth.shape
    sees = unpacked(words, size)
    node = torch.arange(size, device=depth.device, dtype=torch.int32).expand(batch, size, size)
    at = depth.long().clamp(0, width - 1)[:, None, :].expand(batch, size, size)
    path = torch.zeros(batch, size, width, dtype=torch.int32, device=depth.device)
    # One ancestor a depth: the largest of them and zeros is itself.
    return path.scatter_reduce(2, at, torch.where(sees, node, 0).int(), "amax")


def unpacked(words: Tensor, size: int) -> Tensor:
    """[.., T, size] bool: the bits of `words` [.., T, W]."""
    shift = torch.arange(WORD, device=words.device)
    bits = (words[..., None] >> shift) & 1
    return bits.flatten(-2)[..., :size].bool()
