"""Which implementation of a kernel a call runs: the one place that decides."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, cast, get_args

import torch

Backend = Literal["triton", "reference"]

VARIABLE = "SPECDEC_KERNELS"
"""Environment variable that overrides the choice by device: "triton" or "reference"."""


class KernelError(ValueError):
    """An argument of a kernel is out of its contract, or the kernel cannot run on this device."""


def chosen_backend(device: torch.device, wanted: Backend | None = None) -> Backend:
    """What runs a kernel on tensors of `device`: Triton on a GPU, the torch reference elsewhere.

    Args:
        device: Of the tensors.
        wanted: What the caller asks for; None leaves it to SPECDEC_KERNELS, then to the device.

    Raises:
        KernelError: Triton is asked for where it cannot run: it is not installed, or the tensors
            are on a CPU and its interpreter is off.
    """
    asked = wanted or os.environ.get(VARIABLE) or None
    if asked is not None and asked not in get_args(Backend):
        raise KernelError(f'{VARIABLE} must be "triton" or "reference", got {asked!r}')
    if asked == "reference":
        return "reference"
    installed = importlib.util.find_spec("triton") is not None
    if asked is None:
        return "triton" if device.type == "cuda" and installed else "reference"
    if not installed:
        raise KernelError("Triton is not installed: pip install triton, or use the reference")
    if device.type == "cpu" and not interpreting():
        raise KernelError(
            "Triton runs on a CPU in its interpreter only: set TRITON_INTERPRET=1 before Python "
            "starts, or use the reference"
        )
    return cast(Backend, asked)


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"
