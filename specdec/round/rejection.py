"""Verifies drafts that were sampled: what is emitted has the target's law, whatever the draft's.

A token x that was drawn from the law q stands with probability min(1, p(x) / q(x)); otherwise it is
replaced by a draw from max(p - q, 0), normalised. The result has the target's law p (Leviathan et
al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Here the outcome is a *pick*: the drafted
token where it stands, else the replacement. A token that may be rejected has p(x) < q(x), so the
replacement never is that token, and the walk of `verify` goes on exactly where the draft stands.

Exact in distribution only: the text is not the one that the same seed gives without a draft. Knows
nothing about models, processors or stop rules.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.round.tree import TreeBatch


def law_of(scores: Tensor) -> Tensor:
    """The softmax of scores [..., V], in float64 where the device has it, else float32."""
    dtype = torch.float32 if scores.device.type == "mps" else torch.float64
    return scores.to(dtype).softmax(-1)


def children(trees: TreeBatch) -> tuple[Tensor, Tensor]:
    """What was drafted after every node of a batch of chains, and the law that it was drawn from.

    Args:
        trees: Chains with a `draft_law` [B, T, V]: `draft_law[b, i]` is the law that the token of
            node i was drawn from, given the nodes above it. Row 0 is unused. Below node i comes
            node i + 1.

    Returns:
        Tokens [B, T] int64, -1 where nothing was drafted, and laws [B, T, V], aligned with them.

    Raises:
        ValueError: The trees carry no law.
    """
    if trees.draft_law is None:
        raise ValueError("these trees were not sampled: they carry no draft_law")
    below = torch.arange(1, trees.size + 1, device=trees.tokens.device)
    drafted = torch.where(below < trees.sizes[:, None], trees.tokens.roll(-1, 1), -1)
    return drafted, trees.draft_law.roll(-1, 1)


def acceptance(target_law: Tensor, draft_law: Tensor, drafted: Tensor) -> Tensor:
    """[...] probability with which each drafted token stands: min(1, p(x) / q(x)).

    Args:
        target_law: [..., V] probabilities p of the target.
        draft_law: [..., V] q, of the same dtype.
        drafted: [...] int64 x; -1 where nothing was drafted, which never stands.
    """
    index = drafted.clamp(min=0)[..., None]
    wanted, proposed = target_law.gather(-1, index)[..., 0], draft_law.gather(-1, index)[..., 0]
    ratio = (wanted / torch.where(proposed > 0, proposed, 1)).clamp(max=1)
    return torch.where((drafted >= 0) & (proposed > 0), ratio, 0)


def replacement(target_law: Tensor, draft_law: Tensor) -> Tensor:
    """[..., V] weights that a rejected token's replacement is drawn with: max(p - q, 0).

    Where nothing is left of p (the laws are equal, up to rounding), the weights are p itself.
    """
    left = (target_law - draft_law).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, target_law)


def picks(
    target_law: Tensor, draft_law: Tensor, drafted: Tensor, uniforms: Tensor, noise: Tensor
) -> Tensor:
    """[...] int64 picks: the drafted tokens that stand, and replacements for the others.

    Pure; where nothing was drafted, the pick is a draw from p.

    Args:
        target_law: [..., V] p: the target's law after its processors, at nodes.
        draft_law: [..., V] q: the law that each node's child was drawn from.
        drafted: [...] int64 token of each node's child, -1 where it has none.
        uniforms: [...] numbers drawn uniformly from [0, 1).
        noise: [..., V] exponential noise; argmax(w / noise) is a draw with weights w.
    """
    stands = uniforms < acceptance(target_law, draft_law, drafted)
    # Without a child q plays no part, and neither does what a padding row holds.
    proposed = torch.where((drafted >= 0)[..., None], draft_law, 0)
    replaced = (replacement(target_law, proposed) / noise).argmax(-1)
    return torch.where(stands, drafted, replaced)


def draw(target_law: Tensor, draft_law: Tensor, drafted: Tensor) -> Tensor:
    """[...] int64 picks with randomness from torch's generator of the device.

    A draft whose law cannot be one (negative, not finite, empty, or without the drafted token) does
    not take part: the pick is then a draw from p, which is exact whatever was drafted.

    Args:
        target_law: [..., V] p, of the dtype to compute in.
        draft_law: [..., W] what q is proportional to; tokens beyond its width have no mass.
        drafted: [...] int64 drafted tokens, -1 where there is none.
    """
    target, draft = _aligned(target_law, draft_law.to(target_law))
    mass = draft.sum(-1, keepdim=True)
    is_law = (draft >= 0).all(-1) & (mass[..., 0] > 0) & mass[..., 0].isfinite()
    known = drafted.clamp(0, draft.shape[-1] - 1)
    drawn = (known == drafted) & (draft.gather(-1, known[..., None])[..., 0] > 0)
    drafted = torch.where(is_law & drawn, drafted, -1)
    uniforms = torch.rand(drafted.shape, dtype=target.dtype, device=target.device)
    noise = torch.empty_like(target).exponential_(1)
    return picks(target, draft / mass, drafted, uniforms, noise)


def _aligned(target_law: Tensor, draft_law: Tensor) -> tuple[Tensor, Tensor]:
    """Both laws over the wider of their vocabularies."""
    wider = max(target_law.shape[-1], draft_law.shape[-1])
    return (
        pad(target_law, (0, wider - target_law.shape[-1])),
        pad(draft_law, (0, wider - draft_law.shape[-1])),
    )
