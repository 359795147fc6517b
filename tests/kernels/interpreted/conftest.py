"""Only where Triton's interpreter stands in for a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("its interpreter is off: set TRITON_INTERPRET=1, or make test-kernels")

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(autouse=True)
def no_bfloat16_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as bits and computes with the bits, without a word.

    A kernel may load, store, select and convert it; anything else fails here.
    """
    for name in ("binary_op", "unary_op", "create_dot"):
        plain = getattr(InterpreterBuilder, name)

        def checked(self: Any, *operands: Any, plain: Any = plain) -> Any:
            handles = [operand for operand in operands if isinstance(operand, TensorHandle)]
            if any(handle.dtype.scalar == tl.bfloat16 for handle in handles):
                raise TypeError("arithmetic on bfloat16, which the interpreter gets wrong")
            return plain(self, *operands)

        monkeypatch.setattr(InterpreterBuilder, name, checked)
