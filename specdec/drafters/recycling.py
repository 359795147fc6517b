"""Token Recycling (Luo et al., arXiv 2408.08696): what the target nearly said is drafted next.

A matrix holds, for every token id, the top-k candidates that the target named the last time it saw
that token, at accepted and at rejected nodes alike. A draft is a fixed tree of ranks: every node
takes the candidate of that rank of the token above it. All of it lives on the target's device.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Annotated

import torch
from torch import Tensor

from specdec.contracts import BatchState, Needs, RoundResult, Shape
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TreeBatch, padded_size

_UNKNOWN = -1


@dataclass(frozen=True)
class RecyclingConfig(MethodOptions):
    """Options of `recycling`; 8 candidates and 80 nodes are the paper's sizes."""

    top_k: Annotated[int, Range(1, tries=(2, 4, 8))] = 8
    """Candidates kept for every token id."""
    nodes: Annotated[int, Range(1, MAX_NODES, tries=(1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 80))] = 80
    """Most nodes of the tree below the root."""
    depth: Annotated[int, Range(1)] = 8
    """Deepest level of the tree."""
    from_prompt: bool = True
    """Begin with what follows each token in the prompts."""
    keep_matrix: bool = False
    """Keep the matrix from call to call; text never depends on it, speed does."""


def rank_weight(rank: int) -> float:
    """Assumed probability that the target goes on with candidate `rank`, counted from 0.

    A heuristic of this library, close to what two small models showed: every other time it is the
    first candidate, and the others follow far behind. It decides which nodes enter the tree.
    """
    return 0.08 / rank if rank else 0.5


@dataclass(frozen=True)
class RankTree:
    """A tree of candidate ranks, best node first; any prefix of its nodes is a tree, too.

    Attributes:
        parents: Parent of each node; -1 at the root.
        ranks: Which candidate of its parent's token a node takes; 0 at the root.
        depths: Distance of each node from the root.
    """

    parents: list[int]
    ranks: list[int]
    depths: list[int]

    @classmethod
    def grow(cls, nodes: int, depth: int, top_k: int) -> RankTree:
        """The `nodes` likeliest paths below the root, by the product of their ranks' weights."""
        tree = cls([-1], [0], [0])
        best = [1.0]  # weight of the path to each node
        waiting = [(-rank_weight(0), 0, 0)]  # next best child of every node
        while waiting and len(best) <= nodes:
            weight, parent, rank = heapq.heappop(waiting)
            node = len(best)
            best.append(-weight)
            tree.parents.append(parent)
            tree.ranks.append(rank)
            tree.depths.append(tree.depths[parent] + 1)
            if rank + 1 < top_k:
                sibling = -best[parent] * rank_weight(rank + 1)
                heapq.heappush(waiting, (sibling, parent, rank + 1))
            if tree.depths[node] < depth:
                heapq.heappush(waiting, (weight * rank_weight(0), node, 0))
        return tree


class _Template:
    """A `RankTree` on the device: where each level looks, and where its nodes stand in the tree."""

    def __init__(self, tree: RankTree, device: torch.device) -> None:
        self.depth, self.size = max(tree.depths), len(tree.parents)
        levels: list[list[int]] = [[] for _ in range(self.depth + 1)]
        for node, depth in enumerate(tree.depths):
            levels[depth].append(node)
        self.levels: list[tuple[Tensor, Tensor]] = []
        for above, level in pairwise(levels):
            parents = [above.index(tree.parents[node]) for node in level]
            ranks = [tree.ranks[node] for node in level]
            self.levels.append(
                (torch.tensor(parents, device=device), torch.tensor(ranks, device=device))
            )
        place = {node: at for at, node in enumerate(chain.from_iterable(levels))}
        self.order = torch.tensor([place[node] for node in range(self.size)], device=device)
        self.parents = torch.tensor(tree.parents, device=device)


class Recycling:
    """A static tree of recycled candidates, one matrix for all rows."""

    Config = RecyclingConfig
    host_needs = False
    shape: Shape = "any"
    source_names: tuple[str, ...] = ("recycled",)

    def __init__(self, config: RecyclingConfig) -> None:
        self._config = config
        self.needs = Needs(node_topk=config.top_k)
        self.max_nodes = config.nodes
        self._matrix = torch.empty(0, config.top_k, dtype=torch.int32)
        self._templates: dict[tuple[int, int, int], _Template] = {}

    @property
    def matrix(self) -> Tensor:
        """[V + 1, k] int32 candidates of every token id, best first; -1 where none is known.

        The last row stays unknown: ids that the matrix cannot hold are looked up there.
        """
        return self._matrix

    def start(self, state: BatchState) -> None:
        """Takes over a kept matrix or makes an empty one, and seeds it from the prompts."""
        width = min(self._config.top_k, self._config.nodes, state.vocab_size)
        self.needs = Needs(node_topk=width)
        shape, device = (state.vocab_size + 1, width), state.pending.device
        kept = state.memory.get("recycling.matrix") if self._config.keep_matrix else None
        with torch.inference_mode(False):  # later calls, in other modes, write into the matrix
            if kept is not None and kept.shape == shape:
                self._matrix = kept.to(device)
            else:
                self._matrix = torch.full(shape, _UNKNOWN, dtype=torch.int32, device=device)
        if self._config.keep_matrix:
            state.memory["recycling.matrix"] = self._matrix
        if self._config.from_prompt:
            self._seed(state.tokens)

    def _seed(self, texts: Sequence[Sequence[int]]) -> None:
        """Fills the unknown rows of the prompts' tokens with what followed them, latest first."""
        ids, width = self._matrix.shape[0] - 1, self._matrix.shape[1]
        followers: dict[int, dict[int, None]] = {}
        for text in texts:
            for token, after in pairwise(text):
                if 0 <= token < ids and 0 <= after < ids:
                    found = followers.setdefault(token, {})
                    found.pop(after, None)
                    found[after] = None  # a dict keeps insertion order: the latest comes last
        if not followers:
            return
        best = [list(found)[::-1][:width] for found in followers.values()]
        rows = [[token, *found, *[_UNKNOWN] * (width - len(found))]
                for token, found in zip(followers, best, strict=True)]  # fmt: skip
        upload = torch.tensor(rows, dtype=torch.int32, device=self._matrix.device)
        index = upload[:, 0].long()
        known = self._matrix[index]
        self._matrix[index] = torch.where(known[:, :1] == _UNKNOWN, upload[:, 1:], known)

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        """Nothing: the target gives no candidates for the prompt."""

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """The template's tree for every row, without the nodes that the matrix does not know."""
        depth = min(self._config.depth, state.deepest_room())
        nodes = min(budget, self._config.nodes)
        if nodes < 1 or depth < 1:
            return TreeBatch.roots(state.pending)
        template = self._template(nodes, depth, 1 if state.shape == "chain" else None)
        tokens = self._look_up(template, state.pending)
        live = tokens >= 0
        if not all(state.active):
            live &= torch.tensor(state.active, device=tokens.device)[:, None]
        live[:, 0] = True
        on_cpu = tokens.device.type == "cpu"  # where asking for a number is free
        size = int(live.sum(1).max()) if on_cpu else template.size
        return _compact(tokens, live, template, padded_size(size, tokens.device))

    def _template(self, nodes: int, depth: int, width: int | None) -> _Template:
        """The template of this size, made when it is first wanted."""
        key = nodes, depth, width or self._matrix.shape[1]
        if key not in self._templates:
            self._templates[key] = _Template(RankTree.grow(*key), self._matrix.device)
        return self._templates[key]

    def _look_up(self, template: _Template, pending: Tensor) -> Tensor:
        """[B, N] int64 token of every template node, -1 where unknown."""
        levels = [pending[:, None]]
        for above, ranks in template.levels:
            levels.append(self._matrix[self._rows_of(levels[-1][:, above]), ranks].long())
        return torch.cat(levels, 1)[:, template.order]

    def _rows_of(self, tokens: Tensor) -> Tensor:
        """Where `tokens` stand in the matrix."""
        unknown = self._matrix.shape[0] - 1
        return torch.where((tokens >= 0) & (tokens < unknown), tokens, unknown)

    def observe(self, round_result: RoundResult) -> None:
        """Stores the target's candidates at every verified node.

        Of nodes with equal tokens the first one counts: it is the likeliest of them.
        """
        trees, found = round_result.trees, round_result.node_topk
        if found is None:
            return
        live = trees.live()
        if not all(round_result.rows):
            live &= torch.tensor(round_result.rows, device=live.device)[:, None]
        unknown = self._matrix.shape[0] - 1
        rows = self._rows_of(torch.where(live, trees.tokens, _UNKNOWN)).flatten()
        ordered, order = rows.sort(stable=True)
        # Equal rows get equal values, so that the order of the writes does not matter.
        values = found.flatten(0, 1)[order[torch.searchsorted(ordered, rows)]]
        usable = (values < unknown) & (rows != unknown)[:, None]
        self._matrix[rows] = torch.where(usable, values, _UNKNOWN).to(torch.int32)


def _compact(tokens: Tensor, live: Tensor, template: _Template, size: int) -> TreeBatch:
    """The live nodes [B, N] moved together, in their order, as trees padded to `size`.

    The root is live, and so is every live node's parent. No row has more than `size` live nodes.
    """
    slots = live.cumsum(1) - 1
    above = slots.gather(1, template.parents.clamp(min=0).expand_as(slots))
    slots = torch.where(live, slots, size)  # the others pile up in a column that is cut off

    def moved(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), size + 1).scatter(1, slots, values)[:, :size]

    parents = moved(above).to(torch.int32)
    parents[:, 0] = -1
    return TreeBatch(
        tokens=moved(tokens),
        parents=parents,
        sizes=live.sum(1).to(torch.int32),
        max_depth=min(template.depth, size - 1),
    )
