"""Loss of rows of logits in Triton: two passes over a row, and its gradient in its own place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.fused.running import grown

_BLOCK = 4096  # logits of a turn


def row_losses(logits: Tensor, target: Tensor, are_logits: bool) -> Tensor:
    """As `specdec_kernels.loss` says: values [4, n, K]; `logits` become their gradient."""
    count, steps, size = logits.shape
    values = logits.new_empty(4, count, steps, dtype=torch.float32)
    block = min(_BLOCK, triton.next_power_of_2(size))
    with torch.cuda.device_of(logits):
        loss_kernel[(count * steps,)](
            logits, target, values, size, steps, target.stride(0), values.stride(0),
            ARE_LOGITS=are_logits, BLOCK=block, num_warps=max(min(block // 256, 8), 1),
        )  # fmt: skip
    return values


@triton.jit
def loss_kernel(
    Logits, Target, Values, size, steps, target_row, value_stride,
    ARE_LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row of logits.

    Logits [n * K, V] of any float type, contiguous, become their gradient; Target [n, V] serves K
    rows; Values [4, n * K] float32. What is computed is float32.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = Logits + row * size
    target = Target + (row // steps) * target_row
    nothing: tl.constexpr = float("-inf")
    blank: tl.constexpr = float("-inf") if ARE_LOGITS else 0.0
    # 1. Largest logit and sum of exponentials of both sides, and where the largest stand.
    best = nothing
    total = 0.0
    at = 0
    wanted_best = nothing
    wanted_total = 0.0
    wanted_at = 0
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        x = tl.load(logits + place, mask=inside, other=nothing).to(tl.float32)
        y = tl.load(target + place, mask=inside, other=blank).to(tl.float32)
        at = tl.where(tl.max(x, 0) > best, start + tl.argmax(x, 0), at)
        best, total = grown(best, total, x)
        wanted_at = tl.where(tl.max(y, 0) > wanted_best, start + tl.argmax(y, 0), wanted_at)
        if ARE_LOGITS:
            wanted_best, wanted_total = grown(wanted_best, wanted_total, y)
        else:
            wanted_best = tl.maximum(wanted_best, tl.max(y, 0))
            wanted_total += tl.sum(y, 0)
    log_total = best + tl.log(total)
    mass = 1.0 if ARE_LOGITS else wanted_total
    # 2. Sums over the row, and the gradient p * mass - q where the logits were.
    loss = 0.0
    accepted = 0.0
    entropy = 0.0
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        x = tl.load(logits + place, mask=inside, other=nothing).to(tl.float32)
        y = tl.load(target + place, mask=inside, other=blank).to(tl.float32)
        q = tl.exp(y - wanted_best) / wanted_total if ARE_LOGITS else y
        p = tl.exp(x - log_total)
        drawn = q > 0
        loss += tl.sum(tl.where(drawn, q * (log_total - x), 0.0), 0)
        entropy -= tl.sum(tl.where(drawn, q * tl.log(tl.where(drawn, q, 1.0)), 0.0), 0)
        accepted += tl.sum(tl.minimum(p, q), 0)
        gradient = p * mass - q
        tl.store(logits + place, gradient.to(Logits.dtype.element_ty), mask=inside)
    value = Values + row
    tl.store(value, loss)
    tl.store(value + value_stride, tl.where(at == wanted_at, 1.0, 0.0))
    tl.store(value + 2 * value_stride, accepted)
    tl.store(value + 3 * value_stride, entropy)
