"""The entry of the walk: the target's picks at the nodes -> the accepted path of every tree."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.reference import walk as reference_walk


def walk(
    tokens: Tensor,
    parents: Tensor,
    size: Tensor,
    picks: Tensor,
    max_depth: int,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walks every tree from its root along the picks, in one launch.

    From a node the walk goes on to the child that carries the node's pick, of equal ones to the
    first, and ends where there is none or `max_depth` is reached. Picks may be the best tokens or
    sampled ones: what decides is the same. It needs no ancestor words: the nodes that carry their
    parent's pick are found all at once, and each hop is one look at these.

    Args:
        tokens: [B, T] int64 tokens of the nodes, none below zero.
        parents: [B, T] int32 or int64, -1 at node 0, each below its own index.
        size: [B] int32 or int64 live nodes; what comes after them is never accepted.
        picks: [B, T] int64 the target's token after each node; below zero where it has none, which
            no token matches.
        max_depth: Longest path, P.
        backend: Implementation to run; None for that of the device.

    Returns:
        path [B, P] int32 accepted nodes from depth 1 down, padded with -1; length [B] int64 of it;
        emitted [B, P + 1] int64 the picks at the root and along the path, padded with -1.

    Raises:
        KernelError: A shape is out of the contract.
    """
    shape = tokens.shape
    if len(shape) != 2 or parents.shape != shape or picks.shape != shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (tokens, parents, picks))
        raise KernelError(f"tokens, parents and picks must be [B, T] alike, got {shapes}")
    if size.shape != shape[:1] or max_depth < 0:
        raise KernelError(
            f"size must be [{shape[0]}] and max_depth not below 0, got {tuple(size.shape)} and "
            f"{max_depth}"
        )
    chosen = chosen_backend(tokens.device, backend)
    found: tuple[Tensor, Tensor, Tensor] = _walk(tokens, parents, size, picks, max_depth, chosen)
    return found


@torch.library.custom_op("specdec::walk", mutates_args=())
def _walk(
    tokens: Tensor, parents: Tensor, size: Tensor, picks: Tensor, max_depth: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from specdec_kernels.fused import walk as fused_walk

        return fused_walk.walk(tokens, parents, size, picks, max_depth)
    return reference_walk.walk(tokens, parents, size, picks, max_depth)


@_walk.register_fake
def _(
    tokens: Tensor, parents: Tensor, size: Tensor, picks: Tensor, max_depth: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch = tokens.shape[0]
    return (
        tokens.new_empty(batch, max_depth, dtype=torch.int32),
        tokens.new_empty(batch, dtype=torch.int64),
        tokens.new_empty(batch, max_depth + 1, dtype=torch.int64),
    )
