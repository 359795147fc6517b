"""A softmax that is met a block at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grown(largest, total, x):
    """(largest number, sum of exponentials above it), with a block more than before.

    Begins with -inf and 0. Infinities cannot be subtracted from each other, so what is all -inf is
    compared with 0.
    """
    higher = tl.maximum(largest, tl.max(x, 0))
    finite = tl.where(higher > float("-inf"), higher, 0.0)
    return higher, total * tl.exp(largest - finite) + tl.sum(tl.exp(x - finite), 0)
