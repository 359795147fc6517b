"""Only where Triton compiles: its interpreter replaces the compiler in a whole process."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("its interpreter is on: unset TRITON_INTERPRET, or make test-kernels")
