"""The entry of ancestor words: parents of token trees -> what every node sees, and its depth."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.reference import words as reference_words
from specdec_kernels.tree import WORD


def tree_words(parents: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Ancestor words and depths of trees, in one launch.

    Args:
        parents: [B, T] int32 or int64, any strides; -1 at node 0, each below its own index.
        backend: Implementation to run; None for that of the device.

    Returns:
        words [B, T, ceil(T / 64)] int64 and depth [B, T] int32, as `Tree` has them. Padding nodes
        count as their parents say.

    Raises:
        KernelError: A shape or dtype is out of the contract.
    """
    if parents.dim() != 2 or parents.dtype not in (torch.int32, torch.int64):
        raise KernelError(
            f"parents must be [B, T] int32 or int64, got {tuple(parents.shape)} {parents.dtype}"
        )
    chosen = chosen_backend(parents.device, backend)
    found: tuple[Tensor, Tensor] = _tree_words(parents, chosen)
    return found


@torch.library.custom_op("specdec::tree_words", mutates_args=())
def _tree_words(parents: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from specdec_kernels.fused import words as fused_words

        return fused_words.tree_words(parents)
    return reference_words.tree_words(parents)


@_tree_words.register_fake
def _(parents: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    batch, size = parents.shape
    words = parents.new_empty(batch, size, -(-size // WORD), dtype=torch.int64)
    return words, parents.new_empty(batch, size, dtype=torch.int32)
