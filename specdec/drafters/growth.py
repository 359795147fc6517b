"""Grows drafts level by level over `DraftSteps.expand`: chains, and the dynamic trees of EAGLE-2.

Every level of a dynamic tree (Li et al., arXiv 2406.16858) continues the likeliest nodes of the
level above, and of all candidates the likeliest are verified. Nothing is sampled, so the walk of
every drafter verifies them, and the text is plain decoding's. Built on the device for all rows at
once; nothing is read from it. Knows no method.

In names: B rows, K candidates below a node, W nodes of a level that are continued, N candidates of
all levels, D ids that can be drafted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.heads.draft_head import DraftSteps
from specdec.round.tree import TreeBatch, padded_size


@dataclass(frozen=True, slots=True)
class Growth:
    """How far a draft may grow.

    Attributes:
        depth: Levels below the root.
        top_k: Candidates below each continued node; 1 makes a chain.
        beam: Nodes continued at every level; None for `top_k` of them.
        nodes: Candidates that are kept, the likeliest; a chain has one a level.
        confidence_threshold: Goes no deeper where no path of a row that drafts is as likely as
            this. Only on a CPU: elsewhere the host would have to wait for the numbers.
    """

    depth: int
    top_k: int = 1
    beam: int | None = None
    nodes: int = 1
    confidence_threshold: float = 0.0

    def is_over(self, scores_BW: Tensor, drafting: Sequence[bool]) -> bool:
        """Whether no path of these log-probabilities is worth going on."""
        if not self.confidence_threshold or scores_BW.device.type != "cpu":
            return False
        if not all(drafting):
            scores_BW = scores_BW[torch.tensor(drafting)]
        likely = scores_BW >= math.log(self.confidence_threshold)
        return not bool(likely.any())  # nor is what is not a number


def grow(
    head: DraftSteps,
    state: Any,
    first_BD: Tensor,
    pending_B: Tensor,
    growth: Growth,
    drafting: Sequence[bool],
) -> TreeBatch:
    """The draft of every row, with the scores of its paths; `state` stands where it stood.

    Args:
        head: Drafts.
        state: Its state for the batch.
        first_BD: Log-probabilities of what follows each row's pending token.
        pending_B: Roots.
        growth: How far.
        drafting: Rows that get a draft; the others get bare roots.
    """
    if growth.top_k == 1:
        trees, scores = _chain(head, state, first_BD, pending_B, growth, drafting)
    else:
        trees, scores = _tree(head, state, first_BD, pending_B, growth, drafting)
    head.rewind(state)
    sizes = trees.sizes
    if not all(drafting):
        sizes = torch.where(torch.tensor(drafting, device=sizes.device), sizes, 1)
    return trees.with_tokens(trees.tokens, sizes=sizes, scores=scores)


def _chain(
    head: DraftSteps,
    state: Any,
    first_BD: Tensor,
    pending_B: Tensor,
    growth: Growth,
    drafting: Sequence[bool],
) -> tuple[TreeBatch, Tensor]:
    """The likeliest token of every level, below the likeliest of the level above."""
    tokens, scores = [pending_B[:, None]], [first_BD.new_zeros(len(first_BD), 1)]
    root, below_BD = torch.zeros_like(tokens[0]), first_BD
    for level in range(growth.depth):
        best, index = below_BD.max(-1, keepdim=True)
        tokens.append(head.target_ids(index))
        scores.append(scores[-1] + best)
        if level + 1 == growth.depth or growth.is_over(scores[-1], drafting):
            break
        below_BD = head.expand(state, tokens[-1], root)[:, 0]
    return TreeBatch.chains(torch.cat(tokens, 1)), torch.cat(scores, 1)


def _tree(
    head: DraftSteps,
    state: Any,
    first_BD: Tensor,
    pending_B: Tensor,
    growth: Growth,
    drafting: Sequence[bool],
) -> tuple[TreeBatch, Tensor]:
    width = min(growth.top_k, first_BD.shape[-1])
    beam = min(growth.beam or width, width)

    # 1. The first level: K candidates below the root, likeliest first. A parent is counted over
    #    all candidates so far; -1 is the root.
    every, index = first_BD.topk(width)
    ids = head.target_ids(index)
    levels = [(every, ids, torch.full_like(index, -1))]
    scores, tokens, parents = every[:, :beam], ids[:, :beam], torch.zeros_like(index[:, :beam])
    frontier, count = torch.arange(beam, device=index.device).expand_as(parents), width

    for level in range(1, growth.depth):
        if growth.is_over(scores, drafting):
            break
        # 2. K candidates below each of the W continued nodes, scored by their whole paths.
        below, index = head.expand(state, tokens, parents).topk(width)
        every = (scores[:, :, None] + below).flatten(1)
        ids = head.target_ids(index).flatten(1)
        levels.append((every, ids, frontier[:, :, None].expand_as(index).flatten(1)))
        # 3. The likeliest W of them are continued.
        if level + 1 < growth.depth:
            scores, best = every.topk(beam)
            tokens, parents, frontier = ids.gather(1, best), best // width, count + best
            count += every.shape[1]

    # 4. Of all candidates the likeliest are verified.
    return _likeliest(levels, pending_B, growth.nodes)


def _likeliest(
    levels: Sequence[tuple[Tensor, Tensor, Tensor]], pending_B: Tensor, nodes: int
) -> tuple[TreeBatch, Tensor]:
    """The likeliest candidates as trees, and their scores.

    No child is likelier than its parent, and candidates come level by level, so a stable order puts
    a parent before its children: of equals the shallower one is first (EAGLE-2 reranks without such
    a rule, and ties can tear its trees).

    Args:
        levels: Scores, target ids and parents of every level's candidates.
        pending_B: Roots.
        nodes: Candidates to keep.
    """
    scores_BN, tokens_BN, parents_BN = (torch.cat(part, 1) for part in zip(*levels, strict=True))
    # A head that overflows must not change where a child stands: nothing below NaN is a number.
    scores_BN = scores_BN.nan_to_num(nan=float("-inf"))
    scores_BN, order = scores_BN.sort(dim=1, descending=True, stable=True)
    nodes = min(nodes, order.shape[1])
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    kept = order[:, :nodes]
    above = parents_BN.gather(1, kept)
    above = torch.where(above < 0, 0, rank.gather(1, above.clamp(min=0)) + 1)
    padding = padded_size(nodes + 1, order.device) - nodes - 1
    fill = (1, padding)
    trees = TreeBatch(
        tokens=pad(torch.cat([pending_B[:, None], tokens_BN.gather(1, kept)], 1), (0, padding)),
        parents=pad(above, fill).index_fill_(1, above.new_zeros(1), -1).to(torch.int32),
        sizes=torch.full_like(pending_B, nodes + 1, dtype=torch.int32),
        max_depth=len(levels),
    )
    return trees, pad(scores_BN[:, :nodes], fill)
