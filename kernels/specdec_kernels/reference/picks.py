"""Best, best few and sampled tokens of rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor


def row_argmax(logits: Tensor) -> Tensor:
    """As `specdec_kernels.row_argmax` says, of [N, V]."""
    return logits.float().argmax(-1)


def expand_topk(
    logits: Tensor, scores: Tensor, offsets: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """As `specdec_kernels.expand_topk` says."""
    # 1. `topk` promises no order of equals; a stable sort does.
    wide = logits.float()
    index = wide.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    below = wide.log_softmax(-1).gather(1, index)
    # 2. Ids of the target, scores of whole paths.
    tokens = index if offsets is None else index + offsets[index]
    return tokens, scores[:, None] + below


def sampled_picks(scores: Tensor, noise: Tensor, depth: Tensor) -> Tensor:
    """As `specdec_kernels.sampled_picks` says."""
    probabilities = scores.softmax(-1)
    own = noise.gather(1, depth.long()[:, :, None].expand_as(scores))
    picks = (probabilities / own).argmax(-1)
    return torch.where(probabilities.sum(-1) > 0, picks, -2)
