"""Decides acceptance, and is the only place that does: picks at the nodes -> `Verdict`.

The target's choice at a node either is one of its children, and the walk goes on there, or it is
not, and the walk ends with that token (the correction, or the bonus after a full path). Greedy and
sampled decoding are the same walk, because the picks already hold the noise (see `noise.py`).
Knows nothing about models, tokenizers or stop rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import specdec_kernels
from specdec.round.tree import TreeBatch


@dataclass(slots=True)
class CopyCounter:
    """Counts device-to-host copies, so that tests can hold the loop to one a round."""

    copies: int = 0


@dataclass(frozen=True, slots=True)
class HostVerdict:
    """A round's outcome on the host, row by row.

    Attributes:
        paths: Accepted nodes of each row, from depth 1 down.
        tokens: Emitted tokens of each row; I2: one more than the accepted nodes.
        sources: Source of each accepted node, before the stop rules cut the path; empty when the
            trees carry none.
        drafted: Nodes proposed below the root, by row.
        node_picks: Target's greedy choice at every node, if the drafter needs it.
        node_topk: Target's top-k candidates at every node, if the drafter needs them.
    """

    paths: list[list[int]]
    tokens: list[list[int]]
    sources: list[list[int]] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    node_picks: list[list[int]] | None = None
    node_topk: list[list[list[int]]] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round accepted, on the device.

    Attributes:
        path: [B, P] int32 accepted nodes, padded with -1.
        length: [B] int64 accepted nodes.
        tokens: [B, P + 1] int64 emitted tokens: the path's, then bonus or correction.
    """

    path: Tensor
    length: Tensor
    tokens: Tensor

    def pending(self) -> Tensor:
        """[B] int64 last emitted token of each row.

        A row that had ended before the round may hold -1; it still takes part in forwards, so it is
        given a valid token.
        """
        if self.tokens.shape == (1, 1):
            return self.tokens[0].clone()  # drafters hold `tokens`
        return self.tokens.gather(1, self.length[:, None])[:, 0].clamp(min=0)

    def host(
        self,
        trees: TreeBatch,
        node_picks: Tensor | None = None,
        node_topk: Tensor | None = None,
        counter: CopyCounter | None = None,
    ) -> HostVerdict:
        """The round's one device-to-host copy; extras for the drafter travel in it.

        Args:
            trees: Proposed trees; their sizes and the sources along the path come along.
            node_picks: [B, T] int64.
            node_topk: [B, T, k] int64.
            counter: Told about the copy.
        """
        if counter is not None:
            counter.copies += 1
        extras = (node_picks, node_topk)
        if trees.size == 1 and all(extra is None for extra in extras):
            tokens, rows = self.tokens.tolist(), len(self.tokens)
            return HostVerdict([[] for _ in range(rows)], tokens, drafted=[0] * rows)
        parts = [self.length[:, None], trees.sizes[:, None], self.path, self.tokens]
        if trees.sources is not None:
            parts.append(trees.sources.gather(1, self.path.long().clamp(min=0)))
        if node_picks is not None:
            parts.append(node_picks)
        if node_topk is not None:
            parts.append(node_topk.flatten(1))
        packed = torch.cat([part.long() for part in parts], dim=1)
        readers = [_Reader(row) for row in packed.tolist()]
        lengths, sizes = [r.take(1)[0] for r in readers], [r.take(1)[0] for r in readers]
        depth, nodes = self.path.shape[1], trees.size
        paths = [r.take(depth)[:n] for r, n in zip(readers, lengths, strict=True)]
        tokens = [r.take(depth + 1)[: n + 1] for r, n in zip(readers, lengths, strict=True)]
        sources: list[list[int]] = []
        if trees.sources is not None:
            sources = [r.take(depth)[:n] for r, n in zip(readers, lengths, strict=True)]
        return HostVerdict(
            paths=paths,
            tokens=tokens,
            sources=sources,
            drafted=[size - 1 for size in sizes],
            node_picks=[r.take(nodes) for r in readers] if node_picks is not None else None,
            node_topk=[[r.take(node_topk.shape[2]) for _ in range(nodes)] for r in readers]
            if node_topk is not None
            else None,
        )


class _Reader:
    """Takes one row of the packed copy apart, front to back."""

    def __init__(self, values: list[int]) -> None:
        self._values, self._at = values, 0

    def take(self, count: int) -> list[int]:
        self._at += count
        return self._values[self._at - count : self._at]


def verify(trees: TreeBatch, picks: Tensor) -> Verdict:
    """Walks every tree along the picks.

    Args:
        picks: [B, T] int64, the target's token after each node; -1 where it was not asked.

    Returns:
        The verdict, on the device of `picks`. Pure: nothing is committed or emitted here.
    """
    if trees.size == 1:
        none = torch.empty(picks.shape[0], 0, dtype=torch.int32, device=picks.device)
        return Verdict(none, torch.zeros_like(picks[:, 0]), picks)
    if picks.device.type == "cpu":
        return walk_on_host(trees, picks)
    return walk_on_device(trees, picks)


def walk_on_host(trees: TreeBatch, picks: Tensor) -> Verdict:
    """The walk, node by node. Fastest where tensors already live on the host."""
    paths, emitted = [], []
    rows = zip(
        trees.tokens.tolist(),
        trees.parents.tolist(),
        trees.sizes.tolist(),
        picks.tolist(),
        strict=True,
    )
    for tokens, parents, size, row_picks in rows:
        children: dict[tuple[int, int], int] = {}
        for node in range(size - 1, 0, -1):  # backwards: the first of equal children wins
            children[parents[node], tokens[node]] = node
        node, path = 0, list[int]()
        while (child := children.get((node, row_picks[node]))) is not None:
            if len(path) == trees.max_depth:
                break  # deeper than the drafter said: nobody has made room for it
            path.append(child)
            node = child
        paths.append(path)
        emitted.append([*(tokens[node] for node in path), row_picks[node]])
    depth = trees.max_depth
    return Verdict(
        torch.tensor([p + [-1] * (depth - len(p)) for p in paths], dtype=torch.int32),
        torch.tensor([len(p) for p in paths]),
        torch.tensor([t + [-1] * (depth + 1 - len(t)) for t in emitted]),
    )


def walk_on_device(trees: TreeBatch, picks: Tensor) -> Verdict:
    """The walk in one launch, without a copy to the host."""
    path, length, tokens = specdec_kernels.walk(
        trees.tokens, trees.parents, trees.sizes, picks, trees.max_depth
    )
    return Verdict(path, length, tokens)
