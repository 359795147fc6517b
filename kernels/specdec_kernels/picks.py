"""The entries for rows of logits: the best token, the best few, and a sampled one."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.reference import picks as reference_picks

MOST = 32
"""Most children that `expand_topk` finds below a node."""

NOT_A_NUMBER = -2
"""Pick of a row whose probabilities are not numbers."""


def row_argmax(logits: Tensor, *, backend: Backend | None = None) -> Tensor:
    """The best token of every row, without a copy of the logits.

    Args:
        logits: [..., V] float32, float16 or bfloat16; views of any strides whose rows are one apart
            in steps of one size are read in place.
        backend: Implementation to run; None for that of the device.

    Returns:
        [...] int64, as `logits.argmax(-1)` of rows in float32: of equal ones the lowest, and the
        first NaN where there is one.

    Raises:
        KernelError: There are no columns.
    """
    if logits.dim() < 1 or not logits.shape[-1]:
        raise KernelError(f"logits must be [..., V] with V > 0, got {tuple(logits.shape)}")
    rows = logits.reshape(-1, logits.shape[-1])
    found: Tensor = _row_argmax(rows, chosen_backend(logits.device, backend))
    return found.view(logits.shape[:-1])


@torch.library.custom_op("specdec::row_argmax", mutates_args=())
def _row_argmax(logits: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from specdec_kernels.fused import picks as fused_picks

        return fused_picks.row_argmax(logits)
    return reference_picks.row_argmax(logits)


@_row_argmax.register_fake
def _(logits: Tensor, backend: str) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.int64)


def expand_topk(
    logits: Tensor,
    scores: Tensor,
    offsets: Tensor | None,
    count: int,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """The likeliest children of every node, with the log-probabilities of their paths.

    Args:
        logits: [N, D] float over the draft vocabulary, one row a node.
        scores: [N] float32 log-probability of the path to each node.
        offsets: [D] int64, target id of draft id i minus i; None where they are the same.
        count: Children of each node, k: at most `MOST` and D.
        backend: Implementation to run; None for that of the device.

    Returns:
        tokens [N, k] int64 target ids, likeliest first, of equal logits the lowest draft id first
        and NaN before all; scores [N, k] float32, the node's plus the child's log-probability.

    Raises:
        KernelError: A shape or `count` is out of the contract.
    """
    if logits.dim() != 2 or scores.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(scores.shape)}"
        raise KernelError(f"logits and scores must be [N, D] and [N], got {shapes}")
    if not 1 <= count <= min(MOST, logits.shape[1]):
        most = min(MOST, logits.shape[1])
        raise KernelError(f"count must be from 1 to {most}, got {count}")
    if offsets is not None and offsets.shape != logits.shape[1:]:
        raise KernelError(f"offsets must be [{logits.shape[1]}], got {tuple(offsets.shape)}")
    chosen = chosen_backend(logits.device, backend)
    found: tuple[Tensor, Tensor] = _expand_topk(logits, scores, offsets, count, chosen)
    return found


@torch.library.custom_op("specdec::expand_topk", mutates_args=())
def _expand_topk(
    logits: Tensor, scores: Tensor, offsets: Tensor | None, count: int, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from specdec_kernels.fused import picks as fused_picks

        return fused_picks.expand_topk(logits, scores, offsets, count)
    return reference_picks.expand_topk(logits, scores, offsets, count)


@_expand_topk.register_fake
def _(
    logits: Tensor, scores: Tensor, offsets: Tensor | None, count: int, backend: str
) -> tuple[Tensor, Tensor]:
    shape = len(logits), count
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.float32),
    )


def sampled_picks(
    scores: Tensor, noise: Tensor, depth: Tensor, *, backend: Backend | None = None
) -> Tensor:
    """What plain sampling would emit at every node: argmax of probability over noise.

    The noise of a node is that of its depth: nothing is gathered into a tensor of all nodes.

    Args:
        scores: [B, T, V] float32 processed logits.
        noise: [B, L, V] float32 exponential noise of the steps from each row's own on.
        depth: [B, T] int32 or int64 distances from the root, below L.
        backend: Implementation to run; None for that of the device.

    Returns:
        [B, T] int64; `NOT_A_NUMBER` where the softmax holds NaN. A softmax is rounded as its
        implementation rounds it, so two tokens whose ratios are that close may change places from
        one implementation to the other.

    Raises:
        KernelError: A shape or dtype is out of the contract.
    """
    batch, size, vocab = scores.shape
    fits = len(noise) == batch and noise.shape[2:] == (vocab,) and depth.shape == (batch, size)
    if not fits or {scores.dtype, noise.dtype} != {torch.float32}:
        raise KernelError(
            f"scores, noise and depth must be [B, T, V] and [B, L, V] float32 and [B, T], got "
            f"{tuple(scores.shape)} {scores.dtype}, {tuple(noise.shape)} {noise.dtype} and "
            f"{tuple(depth.shape)}"
        )
    picks: Tensor = _sampled_picks(scores, noise, depth, chosen_backend(scores.device, backend))
    return picks


@torch.library.custom_op("specdec::sampled_picks", mutates_args=())
def _sampled_picks(scores: Tensor, noise: Tensor, depth: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from specdec_kernels.fused import picks as fused_picks

        return fused_picks.sampled_picks(scores, noise, depth)
    return reference_picks.sampled_picks(scores, noise, depth)


@_sampled_picks.register_fake
def _(scores: Tensor, noise: Tensor, depth: Tensor, backend: str) -> Tensor:
    return scores.new_empty(scores.shape[:2], dtype=torch.int64)
