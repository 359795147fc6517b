"""A linear layer and the loss of its logits against soft targets, a chunk of rows at a time.

The logits of all rows never exist together: each chunk's become their own gradient at once, and
what remains of them are the gradients by states and weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.reference import loss as reference_loss

_CHUNK = 2**25  # elements of logits that exist together, where nobody says


class SoftTarget(Protocol):
    """What the logits are compared with, a few rows at a time.

    Attributes:
        are_logits: Rows are logits; else probabilities, which a zero row makes count for nothing.
    """

    @property
    def are_logits(self) -> bool:
        """As above."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, V] of the rows `start` to `stop`, any float dtype, contiguous in V."""
        ...


@dataclass(frozen=True, slots=True)
class Given:
    """Targets that exist: probabilities or logits [N, V]."""

    values: Tensor
    are_logits: bool = False

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, V]."""
        return self.values[start:stop]


@dataclass(frozen=True, slots=True)
class Projected:
    """Logits that are made where they are needed: `hidden` [N, H] by the rows `head` [V, H].

    For a draft vocabulary, `head` holds the target's rows of the tokens that can be drafted.
    """

    hidden: Tensor
    head: Tensor
    are_logits: bool = True

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, V]."""
        return self.hidden[start:stop] @ self.head.T


def soft_cross_entropy(
    states: Tensor,
    weight: Tensor,
    target: SoftTarget,
    factor: Tensor,
    *,
    chunk: int | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of `softmax(states @ weight.T)` against soft targets, and what is measured beside it.

    The loss is the sum of `factor * -sum_v q log p` over rows and steps, with q of the target and
    p of the draft. Its gradient by states and weight is made in the forward. It can be taken once:
    a gradient of the gradient is refused. Under autocast the products are in its dtype.

    Args:
        states: [N, K, H] float, K steps that are compared with one row of the target.
        weight: [V, H] float.
        target: Of N rows.
        factor: [N, K] float; 0 for what does not count. Rows that do not count must be numbers.
        chunk: Rows whose logits exist together; None for as many as make 2^25 of them.
        backend: Implementation to run; None for that of the device. float64 is the reference's.

    Returns:
        The loss [] and values [4, N, K], float32 or float64 as `weight`: cross-entropies; 1 where
        both sides have the same likeliest token, the lowest of equals; acceptances, which are
        sum_v min(p, q); entropies of q. The values have no gradient.

    Raises:
        KernelError: A shape is out of the contract.
    """
    if states.dim() != 3 or weight.dim() != 2 or states.shape[2] != weight.shape[1]:
        shapes = f"{tuple(states.shape)} and {tuple(weight.shape)}"
        raise KernelError(f"states and weight must be [N, K, H] and [V, H], got {shapes}")
    if factor.shape != states.shape[:2]:
        raise KernelError(f"factor must be {[*states.shape[:2]]}, got {tuple(factor.shape)}")
    if chunk is None:
        chunk = max(_CHUNK // max(states.shape[1] * len(weight), 1), 1)
    elif chunk < 1:
        raise KernelError(f"chunk must be at least 1, got {chunk}")
    double = torch.float64 in (states.dtype, weight.dtype)
    chosen = "reference" if double else chosen_backend(states.device, backend)
    found: tuple[Tensor, Tensor] = _SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states, weight, target, factor, chunk, chosen
    )
    return found


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        target: SoftTarget,
        factor: Tensor,
        chunk: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        device = states.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            values, grads = _in_chunks(
                states, weight.to(low or states.dtype), target, factor, chunk, backend,
                wide=torch.promote_types(torch.float32, weight.dtype),
                learns=any(ctx.needs_input_grad[:2]),
            )  # fmt: skip
        if grads is not None:
            ctx.save_for_backward(grads[0], grads[1].to(weight.dtype))
        ctx.mark_non_differentiable(values)
        return (values[0] * factor).sum(), values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradients are constants here, which nobody would notice
            raise RuntimeError(
                "soft_cross_entropy has no gradient of its gradient; take it without create_graph"
            )
        d_states, d_weight = ctx.saved_tensors
        return d_states * grads[0], d_weight * grads[0], None, None, None, None


def _in_chunks(
    states: Tensor,
    weight: Tensor,
    target: SoftTarget,
    factor: Tensor,
    chunk: int,
    backend: str,
    wide: torch.dtype,
    learns: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Values [4, N, K] and, where they are wanted, gradients by states and by weight, `wide`."""
    count, steps, _ = states.shape
    values = states.new_empty(4, count, steps, dtype=wide)
    d_states = torch.empty_like(states) if learns else None
    d_weight = torch.zeros_like(weight, dtype=wide) if learns else None
    # All chunks use the same memory.
    room = weight.new_empty(min(chunk, count), steps, len(weight))
    for start in range(0, count, chunk):
        at = slice(start, start + chunk)
        part = states[at].flatten(0, 1)
        # 1. Logits of these rows; their values, and their gradient in their place.
        logits = room[: len(part) // steps]
        torch.mm(part.to(weight.dtype), weight.T, out=logits.flatten(0, 1))
        rows = target.rows(start, min(start + chunk, count))
        values[:, at] = _row_losses(logits, rows, target.are_logits, backend)
        if d_states is None or d_weight is None:
            continue
        # 2. Back through the weight. The factors go to the narrow side of both products.
        gradient, scale = logits.flatten(0, 1), factor[at].reshape(-1, 1)
        torch.mul(gradient @ weight, scale, out=d_states[at].flatten(0, 1))
        scaled = (part * scale).to(weight.dtype)
        d_weight += gradient.T @ scaled
    return values, None if d_states is None or d_weight is None else (d_states, d_weight)


@torch.library.custom_op("specdec::row_losses", mutates_args=("logits",))
def _row_losses(logits: Tensor, target: Tensor, are_logits: bool, backend: str) -> Tensor:
    """[4, n, K] float32 or wider, of logits [n, K, V], which become their gradient."""
    if backend == "triton":
        from specdec_kernels.fused import loss as fused_loss

        return fused_loss.row_losses(logits, target, are_logits)
    return reference_loss.row_losses(logits, target, are_logits)


@_row_losses.register_fake
def _(logits: Tensor, target: Tensor, are_logits: bool, backend: str) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(4, *logits.shape[:2], dtype=wide)
