"""Keys and values of a cache whose layers differ, with paths to commit in them."""

from __future__ import annotations

import torch
from torch import Tensor


def different_buffers(batch: int, slots: int) -> list[Tensor]:
    """Keys and values of three layers: heads, dims, dtypes and strides of their own."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, torch.float32), (2, 24, torch.float16), (1, 400, torch.bfloat16),
              (3, 6, torch.float16), (4, 8, torch.float32))  # fmt: skip
    found = [
        torch.randn(batch, heads, slots, dim, generator=generator).to(dtype)
        for heads, dim, dtype in shapes
    ]
    # A buffer that is laid out by slots, as some caches are.
    swapped = torch.randn(batch, slots, 2, 16, generator=generator)
    return [*found, swapped.transpose(1, 2)]


def random_paths(seed: int, batch: int, nodes: int, most: int) -> tuple[Tensor, Tensor]:
    """Path [B, P] int32 of ascending nodes of a tree of `nodes`, -1 padded, and length [B].

    Some rows keep less than they accepted, and some are not active.
    """
    generator = torch.Generator().manual_seed(seed)
    path = torch.full((batch, most), -1, dtype=torch.int32)
    length = torch.zeros(batch, dtype=torch.int64)
    for row in range(batch):
        count = int(torch.randint(min(most, nodes - 1) + 1, (1,), generator=generator))
        chosen = 1 + torch.randperm(nodes - 1, generator=generator)[:count].sort().values
        if seed % 3 == 0:  # a chain: nothing moves
            chosen = torch.arange(1, count + 1)
        path[row, :count] = chosen.int()
        length[row] = int(torch.randint(-1, count + 1, (1,), generator=generator))
    return path, length


def committed(
    buffers: list[Tensor], path: Tensor, length: Tensor, prefix: Tensor
) -> tuple[list[Tensor], Tensor]:
    """What the buffers and prefixes must be afterwards, slot by slot."""
    found = [buffer.clone() for buffer in buffers]
    for row, (count, start) in enumerate(zip(length.tolist(), prefix.tolist(), strict=True)):
        for depth in range(1, count + 1):
            node = int(path[row, depth - 1])
            for new, old in zip(found, buffers, strict=True):
                new[row, :, start + depth] = old[row, :, start + node]
    return found, prefix + length.to(prefix.dtype) + 1
