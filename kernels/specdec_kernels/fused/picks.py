"""Best, best few and sampled tokens of rows of logits, in Triton.

Numbers are compared as integer keys: the order of the floats above, below it the index turned
round. So the largest key is the best of a row, of equals the lowest index, and NaN before all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.fused.running import grown

_BLOCK = 2048  # logits of one program; of `sampled_picks`, of a turn


def row_argmax(logits: Tensor) -> Tensor:
    """As `specdec_kernels.row_argmax` says, of [N, V]."""
    return _best(logits, 1)[0][:, 0]


def expand_topk(
    logits: Tensor, scores: Tensor, offsets: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """As `specdec_kernels.expand_topk` says."""
    return _best(logits, count, scores, offsets)


def _best(
    logits: Tensor, count: int, scores: Tensor | None = None, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens and scores [N, count]; the scores only where those of the rows are given.

    A row is looked at by several programs, and what they found by one.
    """
    rows, size = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(size))
    parts = triton.cdiv(size, block)
    keys = logits.new_empty(rows, parts, count, dtype=torch.int64)
    sums = logits.new_empty(rows, parts, 2, dtype=torch.float32)
    tokens = logits.new_empty(rows, count, dtype=torch.int64)
    found = logits.new_empty(rows, count, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        part_kernel[(rows, parts)](
            logits, keys, sums, size, logits.stride(0), logits.stride(1),
            COUNT=count, SUMS=scores is not None, BLOCK=block,
        )  # fmt: skip
        merge_kernel[(rows,)](
            keys, sums, scores, offsets, tokens, found, parts, 0 if scores is None else
            scores.stride(0), COUNT=count, SCORES=scores is not None, MAP=offsets is not None,
            PARTS=triton.next_power_of_2(parts), KEYS=triton.next_power_of_2(parts * count),
        )  # fmt: skip
    return tokens, found


def sampled_picks(scores: Tensor, noise: Tensor, depth: Tensor) -> Tensor:
    """As `specdec_kernels.sampled_picks` says."""
    batch, size, vocab = scores.shape
    picks = scores.new_empty(batch, size, dtype=torch.int64)
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    with torch.cuda.device_of(scores):
        sample_kernel[(batch, size)](
            scores, noise, depth, picks, vocab, *scores.stride(), *noise.stride(),
            *depth.stride(), BLOCK=block, num_warps=max(min(block // 256, 8), 1),
        )  # fmt: skip
    return picks


@triton.jit
def _key(value, index):
    """int64 of a float32 and its index below 2^31 - 1; zeros of both signs are equal."""
    value = tl.where(value == 0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(value == value, order, 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _index(key):
    """int64 index of a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """float32 of a key; a NaN comes back as one."""
    order = (key >> 32).to(tl.int32)
    bits = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def part_kernel(
    Logits,
    Keys,
    Sums,
    size,
    row_stride,
    column_stride,
    COUNT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and a part of its columns: its COUNT best keys, in order.

    Logits [N, V]; Keys [N, parts, COUNT] int64 and Sums [N, parts, 2] float32, contiguous: largest
    logit of the part and sum of exponentials above it.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cell = row * tl.num_programs(1) + part
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    start = Logits + row * row_stride
    x = tl.load(start + place.to(tl.int64) * column_stride, mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    # 1. Keys are all different, so the best is taken out, and then the next.
    least: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    keys = tl.where(inside, _key(x, place), least)
    for number in tl.static_range(COUNT):
        best = tl.max(keys, 0)
        tl.store(Keys + cell * COUNT + number, best)
        keys = tl.where(keys == best, least, keys)
    # 2. Numbers for the softmax; infinities cannot be subtracted.
    if SUMS:
        top = tl.max(x, 0)
        finite = tl.where(top > float("-inf"), top, 0.0)
        tl.store(Sums + cell * 2, top)
        tl.store(Sums + cell * 2 + 1, tl.sum(tl.exp(x - finite), 0))


@triton.jit
def merge_kernel(
    Keys,
    Sums,
    Scores,
    Offsets,
    Tokens,
    Found,
    parts,
    score_stride,
    COUNT: tl.constexpr,
    SCORES: tl.constexpr,
    MAP: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program a row: the best of its parts' keys, as tokens and scores.

    Keys and Sums as `part_kernel` leaves them, Scores [N], Offsets [V] int64 or None; Tokens
    [N, COUNT] int64, Found [N, COUNT] float32, contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    # 1. Log-sum-exp of the row, and what its path has.
    base = 0.0
    if SCORES:
        part = tl.arange(0, PARTS)
        sums = Sums + (row * parts + part) * 2
        tops = tl.load(sums, mask=part < parts, other=float("-inf"))
        totals = tl.load(sums + 1, mask=part < parts, other=0.0)
        top = tl.max(tops, 0)
        finite = tl.where(top > float("-inf"), top, 0.0)
        base = tl.load(Scores + row * score_stride)
        base -= top + tl.log(tl.sum(totals * tl.exp(tops - finite), 0))
    # 2. The best keys of all parts, in order.
    place = tl.arange(0, KEYS)
    least: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    many = parts * COUNT
    keys = tl.load(Keys + row * many + place, mask=place < many, other=least)
    for number in tl.static_range(COUNT):
        best = tl.max(keys, 0)
        keys = tl.where(keys == best, least, keys)
        token = _index(best)
        if SCORES:
            tl.store(Found + row * COUNT + number, _value(best) + base)
        if MAP:
            token += tl.load(Offsets + token)
        tl.store(Tokens + row * COUNT + number, token)


@triton.jit
def sample_kernel(
    Scores,
    Noise,
    Depth,
    Picks,
    size,
    score_batch,
    score_node,
    score_column,
    noise_batch,
    noise_level,
    noise_column,
    depth_batch,
    depth_node,
    BLOCK: tl.constexpr,
):
    """One program a node: softmax in one pass, the race in another.

    Scores [B, T, V] and Noise [B, L, V] float32, Depth [B, T]; Picks [B, T] int64, contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1).to(tl.int64)
    scores = Scores + row * score_batch + node * score_node
    level = tl.load(Depth + row * depth_batch + node * depth_node).to(tl.int64)
    noise = Noise + row * noise_batch + level * noise_level
    # 1. Largest score and sum of exponentials. NaN and infinities end as a sum that is no number.
    top = float("-inf")
    total = 0.0
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(scores + place * score_column, mask=place < size, other=float("-inf"))
        top, total = grown(top, total, x)
    # 2. The best ratio.
    best = tl.full([], -0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        x = tl.load(scores + place * score_column, mask=inside, other=float("-inf"))
        e = tl.load(noise + place * noise_column, mask=inside, other=1.0)
        ratio = tl.exp(x - top) / total / e
        best = tl.maximum(best, tl.max(tl.where(inside, _key(ratio, place), best), 0))
    is_number = (total > 0) & (top < float("inf"))
    tl.store(Picks + row * tl.num_programs(1) + node, tl.where(is_number, _index(best), -2))
