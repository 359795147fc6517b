"""The walk in Triton: one program a row, its nodes in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def walk(
    tokens: Tensor, parents: Tensor, size: Tensor, picks: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `specdec_kernels.walk` says."""
    batch, count = tokens.shape
    path = tokens.new_empty(batch, max_depth, dtype=torch.int32)
    length = tokens.new_empty(batch, dtype=torch.int64)
    emitted = tokens.new_empty(batch, max_depth + 1, dtype=torch.int64)
    block = triton.next_power_of_2(count)
    with torch.cuda.device_of(tokens):
        walk_kernel[(batch,)](
            tokens, parents, size, picks, path, length, emitted, max_depth,
            *tokens.stride(), *parents.stride(), *picks.stride(),
            BLOCK=block, STEPS=triton.next_power_of_2(max_depth + 1),
            num_warps=min(max(block // 64, 1), 8),
        )  # fmt: skip
    return path, length, emitted


@triton.jit
def walk_kernel(
    Tokens,
    Parents,
    Size,
    Picks,
    Path,
    Length,
    Emitted,
    max_depth,
    token_row,
    token_node,
    parent_row,
    parent_node,
    pick_row,
    pick_node,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program a row.

    Tokens, Parents and Picks [B, T] with their strides, Size [B]; Path [B, P] int32, Length [B]
    and Emitted [B, P + 1] int64, contiguous. BLOCK holds T nodes, STEPS holds P + 1 steps.
    """
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK)
    picks = Picks + row * pick_row
    # 1. The nodes that carry their parent's pick.
    live = (node > 0) & (node < tl.load(Size + row))
    parent = tl.load(Parents + row * parent_row + node * parent_node, mask=live, other=-1)
    token = tl.load(Tokens + row * token_row + node * token_node, mask=live, other=-1)
    wanted = tl.load(picks + parent * pick_node, mask=live, other=-1)
    carries = live & (wanted >= 0) & (token == wanted)
    # 2. Hop by hop to the first such child; BLOCK is no node's parent, so it ends the walk.
    step = tl.arange(0, STEPS)
    path = tl.where(step == 0, 0, -1)
    here = 0
    depth = 0
    while (here < BLOCK) & (depth < max_depth):
        here = tl.min(tl.where(carries & (parent == here), node, BLOCK), 0)
        depth += 1
        path = tl.where((step == depth) & (here < BLOCK), here, path)
    # 3. The path without its root, its length, and the picks along it.
    deep = (step > 0) & (step <= max_depth)
    tl.store(Path + row * max_depth + step - 1, path, mask=deep)
    tl.store(Length + row, tl.sum((path >= 0).to(tl.int64), 0) - 1)
    along = tl.load(picks + path * pick_node, mask=path >= 0, other=-1)
    tl.store(Emitted + row * (max_depth + 1) + step, along, mask=step <= max_depth)
