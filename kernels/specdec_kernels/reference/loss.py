"""Loss of rows of logits against soft targets, by its definition."""

from __future__ import annotations

import torch
from torch import Tensor


def row_losses(logits: Tensor, target: Tensor, are_logits: bool) -> Tensor:
    """As `specdec_kernels.loss` says: values [4, n, K]; `logits` become their gradient."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    scores, wanted = logits.to(wide), target.to(wide)[:, None]
    # 1. q of the target, p of the draft.
    q = wanted.softmax(-1) if are_logits else wanted
    log_p = scores.log_softmax(-1)
    p = log_p.exp()
    # 2. What cannot be drawn costs nothing, though the logarithm of its p may be infinite.
    loss = -torch.where(q > 0, q * log_p, 0).sum(-1)
    agreed = (scores.argmax(-1) == wanted.argmax(-1)).to(wide)
    accepted = torch.minimum(p, q).sum(-1)
    entropy = torch.special.entr(q).sum(-1).expand_as(loss)
    logits.copy_(p * q.sum(-1, keepdim=True) - q)
    return torch.stack([loss, agreed, accepted, entropy])
