"""Throw-away drafters for the law suite: a useful one, a nasty one, and one on the device."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from helpers.families import VOCAB
from specdec.contracts import BatchState, Needs, RoundResult, Shape
from specdec.drafters.row import DraftRow, RowDrafter
from specdec.round.tree import TokenTree, TreeBatch, TreeBuilder, bucket_size

Truth = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TruthConfig:
    truth: Truth = ()  # the whole text of each row, prompt included
    lie_every: int = 7  # positions at which the drafter is wrong, so that rows accept unequally
    seed: int = 0

    def of(self, row: int) -> tuple[int, ...]:
        return self.truth[row] if row < len(self.truth) else ()


class Oracle(RowDrafter):
    """Knows the text, and puts a decoy before every node: accepted paths are never contiguous."""

    Config = TruthConfig
    max_nodes = 20

    class Row(DraftRow):
        def propose(self, budget: int) -> TokenTree:
            builder, node, truth = TreeBuilder(self.text[-1]), 0, self.config.of(self.index)
            for at in range(len(self.text), min(len(self.text) + 10, len(truth))):
                lie = at % self.config.lie_every == self.index
                builder.add(node, (truth[at] + 1 + lie) % VOCAB)
                node = builder.add(node, (truth[at] + lie) % VOCAB)
            return builder.build()


class RandomTrees(RowDrafter):
    """Adversarial: any shape, equal siblings included, every other token from the real text."""

    Config = TruthConfig
    max_nodes = 14

    class Row(DraftRow):
        drafter: RandomTrees

        def propose(self, budget: int) -> TokenTree:
            draw, truth = self.drafter.random, self.config.of(self.index)
            tokens, parents, depths = [self.text[-1]], [-1], [0]
            for _ in range(draw.randint(0, self.drafter.max_nodes)):
                parent = draw.choice([len(tokens) - 1, draw.randrange(len(tokens))])
                at = len(self.text) + depths[parent]
                known = at < len(truth) and draw.random() < 0.5
                tokens.append(truth[at] if known else draw.randrange(VOCAB))
                parents.append(parent)
                depths.append(depths[parent] + 1)
            return TokenTree(tokens, parents)

    def __init__(self, config: TruthConfig) -> None:
        super().__init__(config)
        self.random = random.Random(config.seed)


class DeviceBigrams:
    """Implements `Drafter` itself: a top-2 bigram tree of depth 3, built without a host copy.

    The trees of a batch differ in size (rows whose pending token has no known successor propose
    one level less), which only the device knows; the tensors are padded to a bucket.
    """

    Config = TruthConfig
    needs = Needs()
    host_needs = False
    shape: Shape = "tree"
    source_names = ("first", "second")
    max_nodes = 14
    _WIDTH = 2

    def __init__(self, config: TruthConfig) -> None:
        self._truth, self._table = config.truth, torch.empty(0)

    def start(self, state: BatchState) -> None:
        """Uploads the successor table [V, 2]; -1 where the text never went on from a token."""
        table = [[-1] * self._WIDTH for _ in range(VOCAB)]
        for text in self._truth:
            for token, after in pairwise(text):
                if after not in table[token]:
                    table[token] = [after, table[token][0]]
        self._table = torch.tensor(table, device=state.pending.device)

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        """Nothing."""

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """Level by level: every node's two successors; the budget cuts the last level short."""
        pending = state.pending
        levels, live = [pending[:, None]], min(budget, self.max_nodes) + 1
        sources = [torch.zeros_like(pending[:, None])]
        parents, depth = [-1], 0
        while len(parents) < live:
            successors = self._table[levels[-1]].flatten(1)
            first = len(parents) - levels[-1].shape[1]
            parents += [first + index // self._WIDTH for index in range(successors.shape[1])]
            order = torch.arange(successors.shape[1], device=pending.device) % self._WIDTH
            sources.append(order.expand_as(successors))
            levels.append(successors.clamp(min=0))
            depth += 1
        known = self._table[pending, 0] >= 0
        one_level_less = max(1, live - levels[-1].shape[1])
        sizes = torch.where(known, live, one_level_less).to(torch.int32)
        size = bucket_size(live)
        up = torch.tensor(_padded(parents[:live], size), dtype=torch.int32, device=pending.device)
        return TreeBatch(
            tokens=_pad_columns(torch.cat(levels, 1)[:, :live], size),
            parents=up.expand(len(pending), -1),
            sizes=sizes,
            max_depth=max(depth, int(size > live)),
            sources=_pad_columns(torch.cat(sources, 1)[:, :live], size).to(torch.int8),
        )

    def observe(self, round_result: RoundResult) -> None:
        """Nothing."""


def _padded(parents: list[int], size: int) -> list[int]:
    return parents + [0] * (size - len(parents))


def _pad_columns(nodes: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(nodes, (0, size - nodes.shape[1]))


THROW_AWAY = {"oracle": Oracle, "random_trees": RandomTrees, "device_bigrams": DeviceBigrams}
