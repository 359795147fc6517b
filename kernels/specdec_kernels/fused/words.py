"""Ancestor words in Triton: every node climbs its own chain of parents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.tree import WORD

_NODES = 64  # nodes of one program


def tree_words(parents: Tensor) -> tuple[Tensor, Tensor]:
    """As `specdec_kernels.tree_words` says."""
    batch, size = parents.shape
    count = triton.cdiv(size, WORD)
    words = parents.new_empty(batch, size, count, dtype=torch.int64)
    depth = parents.new_empty(batch, size, dtype=torch.int32)
    block = min(_NODES, triton.next_power_of_2(size))
    with torch.cuda.device_of(parents):
        words_kernel[(batch, count, triton.cdiv(size, block))](
            parents, words, depth, size, *parents.stride(), BLOCK=block, num_warps=1
        )
    return words, depth


@triton.jit
def words_kernel(Parents, Words, Depth, size, row_stride, node_stride, BLOCK: tl.constexpr):
    """One program a row, a word and a block of nodes.

    Parents [B, T] int32 or int64; Words [B, T, W] int64 and Depth [B, T] int32, contiguous. The
    program of word 0 climbs to the root and writes the depths; the others stop below their word.
    """
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    node = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    # 1. From each node upwards: ancestors have smaller indices, -1 is above the root.
    first = word * 64
    at = tl.where(node < size, node, -1)
    bits = tl.zeros([BLOCK], tl.int64)
    depth = tl.full([BLOCK], -1, tl.int32)
    one = tl.full([BLOCK], 1, tl.int64)
    while tl.max(at, 0) >= first:
        inside = (at >= first) & (at < first + 64)
        bits |= tl.where(inside, one << tl.where(inside, at - first, 0).to(tl.int64), 0)
        depth += (at >= 0).to(tl.int32)
        parent = Parents + row * row_stride + at.to(tl.int64) * node_stride
        at = tl.load(parent, mask=at >= first, other=-1).to(tl.int32)
    # 2. Words, and once the depths.
    cell = row * size + node
    tl.store(Words + cell * tl.num_programs(1) + word, bits, mask=node < size)
    if word == 0:
        tl.store(Depth + cell, depth, mask=node < size)
