"""RMSNorm (arXiv 1910.07467) whose gradient on a CPU takes few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import specdec_kernels

_WIDE = torch.float32, torch.float64


def dots(one: Tensor, other: Tensor) -> Tensor:
    """[...] inner products of [..., n], in the dtype of both: autocast would narrow them."""
    if not torch.is_autocast_enabled(one.device.type):  # entering the context costs more
        found: Tensor = torch.linalg.vecdot(one, other)
        return found
    with torch.autocast(one.device.type, enabled=False):
        return dots(one, other)


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., n] to [..., n]; of vectors with weights of their own, where `weight` is [m, n]."""
    if states.device.type == "cpu" and states.dtype in _WIDE:  # where torch's is many operations
        return states * _inverse(dots(states, states), states.shape[-1], eps) * weight
    if states.device.type == "cuda" and not torch.is_grad_enabled():
        return specdec_kernels.rms_norm(states, weight, eps)
    if weight.ndim > 1:
        return functional.rms_norm(states, states.shape[-1:], None, eps) * weight
    return functional.rms_norm(states, states.shape[-1:], weight, eps)


def _inverse(squares: Tensor, size: int, eps: float) -> Tensor:
    """[..., 1] 1 / sqrt(squares / size + eps), in place of [...] sums of squares."""
    return squares.mul_(1 / size).add_(eps).rsqrt_().unsqueeze(-1)


class RmsNorm(nn.RMSNorm):
    """As its parent; with a gradient on a CPU, where the parent is a dozen single operations."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., n] to [..., n]."""
        weight = self.weight
        if (
            not torch.is_grad_enabled()
            or states.device.type != "cpu"
            or states.dtype != weight.dtype
            or weight.dtype not in _WIDE
        ):
            return super().forward(states)
        found: Tensor = _Normed.apply(states, weight, self.eps)  # type: ignore[no-untyped-call]
        return found


class _Normed(torch.autograd.Function):
    """weight * states / sqrt(mean(states^2) + eps)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse(dots(states, states), states.shape[-1], eps)
        ctx.save_for_backward(states, weight, inverse)
        found: Tensor = (states * inverse).mul_(weight)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        states, weight, inverse = ctx.saved_tensors
        normed = states * inverse
        d_weight = (grads[0] * normed).flatten(0, -2).sum(0)
        inner = grads[0] * weight
        along = dots(inner, normed)[..., None].div_(states.shape[-1])
        return inner.addcmul_(normed, along, value=-1).mul_(inverse), d_weight, None
