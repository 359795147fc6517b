"""Random token trees and picks, as tensors: twins, padding, any size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SIZES = (1, 2, 5, 16, 33, 63, 64, 65, 127, 128, 130, 200)  # about the borders of words and blocks


class RandomTrees(NamedTuple):
    """What `walk` is given, and `TreeBatch` but for the picks."""

    tokens: Tensor
    parents: Tensor
    sizes: Tensor
    picks: Tensor
    max_depth: int


def random_trees(seed: int, batch: int, size: int) -> RandomTrees:
    """Trees over two or three tokens, so that many siblings are equal, and picks [B, T].

    Most picks are a child's token, so that paths get long; some are -1. The depth limit is the
    trees' own, a loose one, or one that cuts.
    """
    generator = torch.Generator().manual_seed(seed)

    def below(*high: int) -> Tensor:
        return torch.stack([torch.randint(n, (batch,), generator=generator) for n in high], 1)

    # 1. Nodes hang among the last `reach` before them: chains, bushes and all between.
    kind = torch.randint(12, (3,), generator=generator).tolist()
    reach = (1, 2, 9, size)[kind[0] % 4]
    nodes = range(1, size)
    back = below(*(min(node, reach) for node in nodes)) if size > 1 else torch.empty(batch, 0)
    parents = torch.cat([torch.full((batch, 1), -1), torch.arange(size - 1) - back], 1)
    tokens = torch.randint(2 + kind[0] // 4 % 2, (batch, size), generator=generator)
    sizes = torch.randint(1, size + 1, (batch,), generator=generator)
    if kind[1] % 3:
        sizes.fill_(size)
    # 2. Padding hangs below the root and carries a token that may well be picked.
    parents = torch.where(torch.arange(size) < sizes[:, None], parents, 0)
    parents[:, 0] = -1
    # 3. Picks: any token, then for most nodes that of a child.
    picks = torch.randint(-1, 3, (batch, size), generator=generator)
    chosen = torch.rand(batch, size, generator=generator) < 0.95
    chosen[:, 0] = False
    rows, children = chosen.nonzero(as_tuple=True)
    picks[rows, parents[rows, children].long()] = tokens[rows, children]
    depth = (size - 1, 4, size + 2, 0)[kind[2] % 4]
    return RandomTrees(tokens, parents.int(), sizes.int(), picks, depth)
