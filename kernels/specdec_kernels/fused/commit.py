"""The commit in Triton: all keys and values of a cache in one launch, through their addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLOTS = 16  # that a program holds at a time
_UNITS = 128  # of each
_TYPES = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


def move(table: Tensor, sizes: Sequence[int], path: Tensor, length: Tensor, prefix: Tensor) -> None:
    """Moves the slots as `specdec_kernels.commit_kv` says; the prefixes stay as they are.

    Args:
        table: As `KVBuffers` says.
        sizes: Its unit, heads and dim.
        path: [B, P].
        length: [B].
        prefix: [B].
    """
    unit, heads, dim = sizes
    batch, most = path.shape
    with torch.cuda.device_of(table):
        commit_kernel[(len(table), batch * heads)](
            table, path, length, prefix, most, heads, path.stride(0), path.stride(1),
            TYPE=_TYPES[unit], SLOTS=min(triton.next_power_of_2(most), _SLOTS),
            UNITS=min(triton.next_power_of_2(dim), _UNITS),
        )  # fmt: skip


@triton.jit
def commit_kernel(
    Table,
    Path,
    Length,
    Prefix,
    most,
    heads,
    path_row,
    path_step,
    TYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """One program a buffer and a head of a row.

    Table [N, 6] int64 as `KVBuffers` says; Path [B, P], Length and Prefix [B]. Slots are moved
    SLOTS at a time, from the root on: node d of a path is d or more, so what one turn writes lies
    below all that later turns read.
    """
    entry = Table + tl.program_id(0) * 6
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    dim = tl.load(entry + 5)
    length = tl.load(Length + row)
    prefix = tl.load(Prefix + row).to(tl.int64)
    slot_stride = tl.load(entry + 3)
    start = tl.load(entry).to(tl.pointer_type(TYPE))
    start += row * tl.load(entry + 1) + head * tl.load(entry + 2) + prefix * slot_stride
    if head < tl.load(entry + 4):
        for first in range(0, most, SLOTS):
            # 1. What moves in this turn, and from where.
            depth = first + 1 + tl.arange(0, SLOTS)
            kept = depth <= length
            node = tl.load(Path + row * path_row + (depth - 1) * path_step, mask=kept, other=0)
            moves = kept & (node != depth)
            if tl.max(moves.to(tl.int32), 0) > 0:
                source = start + node.to(tl.int64)[:, None] * slot_stride
                target = start + depth.to(tl.int64)[:, None] * slot_stride
                for left in range(0, dim, UNITS):
                    # 2. All slots of the turn are read before any is written.
                    unit = left + tl.arange(0, UNITS)[None, :]
                    mask = moves[:, None] & (unit < dim)
                    states = tl.load(source + unit, mask=mask)
                    tl.debug_barrier()
                    tl.store(target + unit, states, mask=mask)
