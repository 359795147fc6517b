"""Compares what a draft head promised with what came true, over its first rounds.

A head that is run with a wrong flag or wrong layers raises nothing and drafts badly; but it does
not know that it does. The chance that it gave to its likeliest token below each node of an accepted
path is set against how often the target's own best token was that one: the target's best and not
the one that was drawn, so that hot sampling and processors do not look like a bad head. The sums
stay on the device; nothing is read from it before a call ends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.contracts import RoundResult

ROUNDS = 200
"""Rounds that are looked at."""

_LEAST_ROUNDS, _LEAST_TOKENS = 64, 40  # before which nothing is said
_MOST_ROWS = 4  # of a batch
_FAR_BELOW = 0.6  # of what was promised
_CLEAR = 5.0  # standard deviations below it
_PLACES = ("first tokens", "tokens after the first")


class Promise:
    """What one head promised on one target.

    Args:
        known: [V] bool, target ids that the head can draft; None for all.
    """

    def __init__(self, known: Tensor | None) -> None:
        self._known, self._rounds = known, 0
        self._sums: Tensor | None = None  # [2, 4]: by place; tokens, promised, came, variance
        self._judged = False

    def see(self, result: RoundResult) -> None:
        """Counts a finished round in; does nothing after enough of them."""
        trees, verdict, rows = result.trees, result.verdict, result.rows[:_MOST_ROWS]
        if self._judged or self._rounds >= ROUNDS or trees.scores is None or trees.size == 1:
            return
        self._rounds += 1
        width = max((len(path) for path in result.host.paths[: len(rows)]), default=0) + 1
        nodes = pad(verdict.path[: len(rows), : width - 1].long().clamp(min=0), (1, 0))
        scores, logits = trees.scores[: len(rows)], result.output.logits[: len(rows)]
        parents, live = trees.parents[: len(rows), None], trees.live()[: len(rows), None]
        below = (parents == nodes[:, :, None]) & live
        child = below.to(torch.uint8).argmax(-1)  # the likeliest of siblings stands first
        chance = (scores.gather(1, child) - scores.gather(1, nodes)).exp().nan_to_num(0.0)
        index = nodes.to(logits.device)[:, :, None].expand(-1, -1, logits.shape[-1])
        best = logits.gather(1, index).argmax(-1).to(nodes.device)
        steps = torch.arange(width, device=nodes.device)
        counted = below.any(-1) & (steps <= verdict.length[: len(rows), None])
        if not all(rows):
            counted &= torch.tensor(rows, device=nodes.device)[:, None]
        if self._known is not None:
            counted &= self._known[best.clamp(max=len(self._known) - 1)]
        chance = torch.where(counted, chance.clamp(max=1.0), 0.0)
        came = counted & (trees.tokens[: len(rows)].gather(1, child) == best)
        found = torch.stack([counted, chance, came, chance * (1 - chance)]).sum(1)
        sums = torch.stack([found[:, 0], found[:, 1:].sum(1)])
        self._sums = sums if self._sums is None else self._sums + sums

    def broken(self) -> str:
        """A sentence on how far the head stayed below its promise, once; else an empty one."""
        if self._judged or self._sums is None or self._rounds < _LEAST_ROUNDS:
            return ""
        self._judged = self._rounds >= ROUNDS
        for place, row in zip(_PLACES, self._sums.tolist(), strict=True):
            tokens, promised, came, variance = row
            clear = promised - came > _CLEAR * math.sqrt(variance)
            if tokens >= _LEAST_TOKENS and came < _FAR_BELOW * promised and clear:
                self._judged = True
                return (
                    f"of its likeliest {place}, {came / tokens:.0%} were the target's in "
                    f"{self._rounds} rounds, and it gave them {promised / tokens:.0%}"
                )
        return ""
