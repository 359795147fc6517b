"""RMSNorm, and rotary embedding into a cache, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `specdec_kernels.rms_norm` says."""
    size = states.shape[-1]
    rows = states.reshape(-1, size)
    dtype = torch.promote_types(states.dtype, weight.dtype)
    found = states.new_empty(states.shape, dtype=dtype)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(states):
        norm_kernel[(len(rows),)](
            rows, weight.contiguous(), found, size, rows.stride(0), rows.stride(1),
            weight.numel() // size, eps, BLOCK=block, num_warps=max(min(block // 256, 8), 1),
        )  # fmt: skip
    return found


def rotate_into_cache(
    joined: Tensor,
    turn: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    cache: tuple[Tensor, Tensor],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """As `specdec_kernels.rotate_into_cache` says."""
    keys, values = cache
    batch, width, heads, dim = joined.shape
    kv_heads = keys.shape[1]
    query = joined.new_empty(batch, heads - 2 * kv_heads, width, dim)
    with torch.cuda.device_of(joined):
        rotate_kernel[(batch, width, heads)](
            joined, *turn, positions, slots, keys, values, query, q_norm, k_norm, eps, dim,
            heads - 2 * kv_heads, kv_heads, *joined.stride()[:3], *positions.stride(),
            slots.stride(0), *keys.stride()[:3], *values.stride()[:3],
            NORM=q_norm is not None, BLOCK=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return query


@triton.jit
def norm_kernel(
    States, Weight, Found, size, row_stride, column_stride, weights, eps, BLOCK: tl.constexpr
):
    """One program a vector.

    States [N, n] with its strides; Weight [m, n], the vectors taking turns; Found [N, n],
    contiguous. What is computed is float32.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < size
    states = States + row * row_stride + place * column_stride
    x = tl.load(states, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(Weight + (row % weights) * size + place, mask=inside, other=0.0)
    found = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps) * weight.to(tl.float32)
    tl.store(Found + row * size + place, found.to(Found.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    Joined, Cos, Sin, Positions, Slots, Keys, Values, Query, QNorm, KNorm, eps, dim,
    heads, kv_heads, joined_row, joined_token, joined_head, position_row, position_token,
    slot_stride, key_row, key_head, key_slot, value_row, value_head, value_slot,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a head of a token: turned, or for values just written.

    Joined [B, n, Hq + 2 Hkv, d]; Cos and Sin [P, d], contiguous; Positions [B, n]; Slots [B]; Keys
    and Values [B, Hkv, S, d]; Query [B, Hq, n, d], contiguous; QNorm and KNorm [d] or None. What
    is computed is float32.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1)
    head = tl.program_id(2)
    place = tl.arange(0, BLOCK)
    inside = place < dim
    other_half = tl.where(place < dim // 2, place + dim // 2, place - dim // 2)
    start = Joined + row * joined_row + token.to(tl.int64) * joined_token + head * joined_head
    slot = tl.load(Slots + row * slot_stride).to(tl.int64) + token
    x = tl.load(start + place, mask=inside, other=0.0).to(tl.float32)
    if head >= heads + kv_heads:
        at = Values + row * value_row + (head - heads - kv_heads) * value_head + slot * value_slot
        tl.store(at + place, x.to(Values.dtype.element_ty), mask=inside)
    else:
        # 1. Its norm, and the half that it is turned with.
        y = tl.load(start + other_half, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            norm = KNorm if head >= heads else QNorm
            inverse = tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
            x *= inverse * tl.load(norm + place, mask=inside, other=0.0).to(tl.float32)
            y *= inverse * tl.load(norm + other_half, mask=inside, other=0.0).to(tl.float32)
        # 2. The turn of its position.
        position = Positions + row * position_row + token * position_token
        angle = tl.load(position).to(tl.int64) * dim + place
        cos = tl.load(Cos + angle, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(Sin + angle, mask=inside, other=0.0).to(tl.float32)
        turned = x * cos + y * sin
        # 3. Where it belongs.
        if head >= heads:
            at = Keys + row * key_row + (head - heads) * key_head + slot * key_slot
            tl.store(at + place, turned.to(Keys.dtype.element_ty), mask=inside)
        else:
            cell = (row * heads + head) * tl.num_programs(1) + token
            tl.store(Query + cell * dim + place, turned.to(Query.dtype.element_ty), mask=inside)
