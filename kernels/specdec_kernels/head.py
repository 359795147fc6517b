"""The entries for a draft head: RMSNorm, and what stands between projection and attention."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.reference import head as reference_head


def rms_norm(
    states: Tensor, weight: Tensor, eps: float, *, backend: Backend | None = None
) -> Tensor:
    """RMSNorm (arXiv 1910.07467): `weight * states / sqrt(mean(states^2) + eps)`, in one launch.

    Computed in float32 or wider and rounded once. Has no gradient.

    Args:
        states: [..., n] float, or [..., m, n] where vectors have weights of their own.
        weight: [n] or [m, n] float.
        eps: Added to the mean of the squares.
        backend: Implementation to run; None for that of the device.

    Returns:
        Shaped like `states`, in the wider dtype of states and weight.

    Raises:
        KernelError: A shape is out of the contract.
    """
    if weight.dim() not in (1, 2) or states.shape[states.dim() - weight.dim() :] != weight.shape:
        raise KernelError(
            f"states must end in the shape of weight, [n] or [m, n], got {tuple(states.shape)} and "
            f"{tuple(weight.shape)}"
        )
    found: Tensor = _rms_norm(states, weight, eps, chosen_backend(states.device, backend))
    return found


@torch.library.custom_op("specdec::rms_norm", mutates_args=())
def _rms_norm(states: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    if backend == "triton":
        from specdec_kernels.fused import head as fused_head

        return fused_head.rms_norm(states, weight, eps)
    return reference_head.rms_norm(states, weight, eps)


@_rms_norm.register_fake
def _(states: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return states.new_empty(states.shape, dtype=torch.promote_types(states.dtype, weight.dtype))


def rotate_into_cache(
    joined: Tensor,
    turn: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    cache: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of queries and keys, and the cache written: one launch.

    The first half of a head's numbers is turned with the second. Token t of row b is written to
    slot `slots[b] + t`. Computed in float32 or wider and rounded once. Has no gradient.

    Args:
        joined: [B, n, Hq + 2 Hkv, d] float projections: queries, keys, values; d even, contiguous.
        turn: Cosines and sines [P, d] by position, contiguous; the sines of the first half are
            negated.
        positions: [B, n] int64, below P.
        slots: [B] int64.
        cache: Keys and values [B, Hkv, S, d], written in place; any strides but a contiguous last
            dimension.
        norms: Weights [d] of an RMSNorm of every head of queries and of keys, or None.
        eps: Of these norms.
        backend: Implementation to run; None for that of the device.

    Returns:
        Turned queries [B, Hq, n, d], in the dtype of `joined`.

    Raises:
        KernelError: A shape is out of the contract.
    """
    (cos, sin), (keys, values) = turn, cache
    if joined.dim() != 4 or joined.shape[3] % 2 or cos.shape[1:] != joined.shape[3:]:
        raise KernelError(
            f"joined must be [B, n, heads, d] with even d and cosines [P, d], got "
            f"{tuple(joined.shape)} and {tuple(cos.shape)}"
        )
    batch, width, heads, dim = joined.shape
    same = keys.shape == values.shape and keys.shape[0] == batch and keys.shape[3] == dim
    if not same or heads <= 2 * keys.shape[1]:
        raise KernelError(
            f"keys and values must be [{batch}, Hkv, S, {dim}] with 2 Hkv below {heads}, got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if positions.shape != (batch, width) or slots.shape != (batch,) or cos.shape != sin.shape:
        raise KernelError(
            f"positions and slots must be [{batch}, {width}] and [{batch}], and cosines shaped "
            f"like sines, got {tuple(positions.shape)}, {tuple(slots.shape)}, {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}"
        )
    q_norm, k_norm = norms if norms is not None else (None, None)
    chosen = chosen_backend(joined.device, backend)
    query: Tensor = _rotate_into_cache(
        joined, cos, sin, positions, slots, keys, values, q_norm, k_norm, eps, chosen
    )
    return query


@torch.library.custom_op("specdec::rotate_into_cache", mutates_args=("keys", "values"))
def _rotate_into_cache(
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    inputs = joined, (cos, sin), positions, slots, (keys, values), q_norm, k_norm, eps
    if backend == "triton":
        from specdec_kernels.fused import head as fused_head

        return fused_head.rotate_into_cache(*inputs)
    return reference_head.rotate_into_cache(*inputs)


@_rotate_into_cache.register_fake
def _(
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    batch, width, heads, dim = joined.shape
    return joined.new_empty(batch, heads - 2 * keys.shape[1], width, dim)
