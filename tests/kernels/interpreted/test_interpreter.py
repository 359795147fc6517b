"""The interpreter's own traps, and that the tests here notice who steps into one."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _sum(X, Y, Out, WIDE: tl.constexpr):
    at = tl.arange(0, 16)
    x, y = tl.load(X + at), tl.load(Y + at)
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(Out + at, x + y)


def test_arithmetic_on_bfloat16_is_noticed() -> None:
    x, out = torch.ones(16, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.bfloat16)
    _sum[(1,)](x, x, out, WIDE=True)
    assert (out == 2).all()
    with pytest.raises(Exception, match="arithmetic on bfloat16"):
        _sum[(1,)](x, x, out, WIDE=False)
