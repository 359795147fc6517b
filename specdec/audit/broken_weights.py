"""Finds the first parameter of a model that holds NaN or an infinity: no text can come of it.

One reduction a tensor and one copy to the host a device; nothing is made of a tensor's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from specdec.errors import UnsupportedModelError


@torch.no_grad()
def first_broken_parameter(named: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """(name, "NaN" or "inf") of the first tensor that is not finite throughout, or None.

    Quantised and offloaded tensors are passed over, and so is what is no floating-point number. A
    bias that is -inf is none: it rules its tokens out.

    Args:
        named: As `named_parameters()` gives them, or the items of a state dictionary.
    """
    by_device: dict[torch.device, list[tuple[int, str, Tensor]]] = {}
    for order, (name, tensor) in enumerate(named):
        plain = type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided
        if not plain or not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        try:
            ends = torch.stack(tensor.detach().aminmax()).double()
        except (RuntimeError, NotImplementedError):  # float8 on most devices
            continue
        if tensor.ndim == 1 and name.endswith("bias"):
            ends = torch.where(ends == -math.inf, 0, ends)
        by_device.setdefault(tensor.device, []).append((order, name, ends))
    broken = []
    for found in by_device.values():
        sums = torch.stack([ends.sum() + (ends * 0).sum() for _, _, ends in found]).tolist()
        for (order, name, ends), total in zip(found, sums, strict=True):
            if not math.isfinite(total):
                what = "NaN" if bool(ends.isnan().any()) else "inf"
                broken.append((order, name, what))
    return min(broken)[1:] if broken else None


def check_weights(model: nn.Module, name: str) -> None:
    """Raises `UnsupportedModelError` for a model that no text can come of.

    Args:
        name: How the message calls it.
    """
    found = first_broken_parameter(model.named_parameters())
    if found is not None:
        raise UnsupportedModelError(
            f"parameter {found[0]!r} of {name} holds {found[1]}, so that no text can come of it; "
            "load the checkpoint again, in float32 or bfloat16, or take another one"
        )
