"""Token trees: what every drafter proposes and every target verifies.

A tree holds draft tokens below the *pending* token (node 0, emitted but not yet in the target's
cache). `TokenTree` is one row on the host; `TreeBatch` is all rows of a batch on the device. The
idea of verifying a tree in one forward is SpecInfer's (arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specdec.errors import DrafterError

MAX_NODES = 4096
"""Most nodes that a method may ask for; masks grow with the square."""

_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


def bucket_size(nodes: int) -> int:
    """Smallest padded tree size that holds `nodes`: few sizes keep kernels and graphs reusable."""
    return next((size for size in _BUCKETS if nodes <= size), -(-nodes // 32) * 32)


def padded_size(nodes: int, device: torch.device) -> int:
    """The size that trees are padded to: on a CPU, without kernels or graphs, it would be work."""
    return nodes if device.type == "cpu" else bucket_size(nodes)


@dataclass(frozen=True, slots=True)
class TokenTree:
    """One row's tree, as plain host integers.

    Attributes:
        tokens: Token of each node; node 0 is the pending token.
        parents: Parent of each node; `parents[0] == -1` and `parents[i] < i`.
        scores: Log-probability of the path to each node by its drafter, if it has one.
        sources: Index into the drafter's `source_names` for each node, for statistics.
    """

    tokens: list[int]
    parents: list[int]
    scores: list[float] | None = None
    sources: list[int] | None = None

    def __post_init__(self) -> None:
        """Checks the shape of the tree; raises `DrafterError`."""
        parents = self.parents
        if not parents or len(self.tokens) != len(parents) or parents[0] != -1:
            raise DrafterError(
                f"a token tree needs a root with parent -1 and one parent per token, got "
                f"{len(self.tokens)} tokens and parents {parents[:8]}"
            )
        for node in range(1, len(parents)):
            if not 0 <= parents[node] < node:
                raise DrafterError(
                    f"node {node} has parent {parents[node]}; a parent must come before its child"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, root: int, tokens: Sequence[int]) -> TokenTree:
        """The tree with a single path: `root`, then `tokens` one below the other."""
        return cls([root, *tokens], list(range(-1, len(tokens))))

    @classmethod
    def merge(cls, root: int, paths: Iterable[Sequence[int]]) -> TokenTree:
        """The trie of `paths` under `root`: shared prefixes become one node."""
        builder = TreeBuilder(root)
        for path in paths:
            builder.add_path(path)
        return builder.build()

    def depths(self) -> list[int]:
        """Distance of each node from the root."""
        depths = [0] * len(self)
        for node in range(1, len(self)):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    def child(self, node: int, token: int) -> int | None:
        """The first child of `node` that carries `token`, or None."""
        for candidate in range(node + 1, len(self)):
            if self.parents[candidate] == node and self.tokens[candidate] == token:
                return candidate
        return None

    def deepest_path(self) -> TokenTree:
        """The chain from the root to the deepest node, the first of them; itself when a chain."""
        if self.parents == list(range(-1, len(self) - 1)):
            return self
        depths = self.depths()
        path = [depths.index(max(depths))]
        while path[-1]:
            path.append(self.parents[path[-1]])
        return self._keep(path[::-1], list(range(-1, len(path) - 1)))

    def limited(self, nodes: int, depth: int, vocab_size: int) -> TokenTree:
        """The part of the tree that may be verified; the tree itself when all of it may.

        Args:
            nodes: Nodes to keep at most, the root included.
            depth: Deepest level to keep.
            vocab_size: Tokens that are not below it are dropped, with what hangs below them.
        """
        known = min(self.tokens) >= 0 and max(self.tokens) < vocab_size
        if known and len(self) <= nodes and len(self) <= depth + 1:
            return self  # the common case: n nodes reach n - 1 levels down at most
        depths, kept = self.depths(), [0]
        new_index = {0: 0}
        for node in range(1, len(self)):
            fits = depths[node] <= depth and 0 <= self.tokens[node] < vocab_size
            if fits and self.parents[node] in new_index and len(kept) < nodes:
                new_index[node] = len(kept)
                kept.append(node)
        if len(kept) == len(self):
            return self
        return self._keep(kept, [-1, *(new_index[self.parents[node]] for node in kept[1:])])

    def _keep(self, kept: list[int], parents: list[int]) -> TokenTree:
        """The tree of the nodes `kept`, hung up as `parents` says."""
        return TokenTree(
            [self.tokens[node] for node in kept],
            parents,
            [self.scores[node] for node in kept] if self.scores is not None else None,
            [self.sources[node] for node in kept] if self.sources is not None else None,
        )


class TreeBuilder:
    """Grows a `TokenTree` node by node; equal children of one parent become one node."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parents, self.sources = [root], [-1], [0]
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, source: int = 0) -> int:
        """Node index of `token` below `parent`, made if it is not there yet."""
        node = self._children.get((parent, token))
        if node is None:
            node = len(self.tokens)
            self._children[parent, token] = node
            self.tokens.append(token)
            self.parents.append(parent)
            self.sources.append(source)
        return node

    def add_path(
        self, path: Sequence[int], source: int = 0, limit: int | None = None, start: int = 0
    ) -> int | None:
        """Adds `path` below node `start`; returns its last node.

        Stops, and returns None, where a new node would make the tree larger than `limit`.
        """
        node = start
        for token in path:
            if limit is not None and len(self) >= limit and (node, token) not in self._children:
                return None
            node = self.add(node, token, source)
        return node

    def build(self) -> TokenTree:
        """The finished tree."""
        return TokenTree(self.tokens, self.parents, sources=self.sources)


@dataclass(frozen=True, slots=True)
class Structure:
    """What follows from the parents of a batch, for as long as nobody writes into the tensors.

    Attributes:
        parents: [B, T] int32.
        mask: [B, T, T] bool; entry (i, j) says whether j is i or one of its ancestors.
        depths: [B, T] int64 distance of each node from the root.
        versions: How often each of them had been written to; -1 where torch does not count.
    """

    parents: Tensor
    mask: Tensor
    depths: Tensor
    versions: tuple[int, ...]

    @classmethod
    def of(cls, parents: Tensor, mask: Tensor, depths: Tensor) -> Structure:
        """Remembers the tensors as they are now."""
        return cls(parents, mask, depths, _versions(parents, mask, depths))

    @classmethod
    def found(cls, parents: Tensor) -> Structure:
        """Of parents that each come before their children, computed on the device."""
        mask = _doubled_ancestors(parents)
        return cls.of(parents, mask, mask.sum(-1) - 1)

    def belongs_to(self, parents: Tensor) -> bool:
        """Whether it was made of this very tensor, and none of the three was written to since."""
        same = parents is self.parents
        return same and self.versions == _versions(parents, self.mask, self.depths)

    @property
    def is_watched(self) -> bool:
        """Whether a write would be noticed; tensors made in inference mode count no versions."""
        return -1 not in self.versions


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """The trees of all rows on the target's device, padded to one size T.

    Padding nodes hang below the root and never take part in acceptance. `dataclasses.replace` gives
    a batch that knows nothing of the old one's mask and depths; `with_tokens` keeps them.

    Attributes:
        tokens: [B, T] int64.
        parents: [B, T] int32; -1 at node 0.
        sizes: [B] int32, live nodes of each row.
        max_depth: Host-side upper bound on the depth of any node, so that no one has to ask the
            device for it.
        scores: [B, T] float32 log-probability of the path by its drafter, or None.
        sources: [B, T] int8, who proposed the node, or None.
        draft_law: [B, T, V] law that sampled drafts were drawn from, or None. It counts only where
            the method was told to sample (`Drafter.sampling_option`).
    """

    tokens: Tensor
    parents: Tensor
    sizes: Tensor
    max_depth: int
    scores: Tensor | None = None
    sources: Tensor | None = None
    draft_law: Tensor | None = None
    _structure: list[Structure] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Padded number of nodes T."""
        return self.tokens.shape[1]

    @classmethod
    def roots(cls, pending: Tensor) -> TreeBatch:
        """Trees of one node each, from the pending tokens [B]: a round without speculation."""
        tokens = pending[:, None]
        parents = torch.full_like(tokens, -1, dtype=torch.int32)
        return cls(tokens, parents, torch.ones_like(pending, dtype=torch.int32), 0)

    @classmethod
    def from_rows(
        cls, rows: Sequence[TokenTree], device: torch.device, size: int | None = None
    ) -> TreeBatch:
        """Uploads host trees, padded to `size` or that of the device: one copy, one for scores."""
        size = padded_size(max(map(len, rows)), device) if size is None else size
        packed = np.zeros((len(rows), 5 + size, size), dtype=np.int64)
        for index, row in enumerate(rows):
            _pack(row, packed[index])
        upload = torch.from_numpy(packed).to(device)
        scores = None
        if any(row.scores is not None for row in rows):
            padded = [[*(row.scores or ()), *[0.0] * size][:size] for row in rows]
            scores = torch.tensor(padded, dtype=torch.float32, device=device)
        trees = cls(
            tokens=upload[:, 0],
            parents=upload[:, 1].to(torch.int32),
            sizes=upload[:, 4, 0].to(torch.int32),
            max_depth=int(packed[:, 3].max()),
            scores=scores,
            sources=upload[:, 2].to(torch.int8) if any(row.sources for row in rows) else None,
        )
        return trees.knowing(Structure.of(trees.parents, upload[:, 5:] > 0, upload[:, 3].clone()))

    def to_rows(self) -> list[TokenTree]:
        """Host copies of the live trees. Costs device-to-host copies: for traces and tests."""
        sizes, tokens, parents = self.sizes.tolist(), self.tokens.tolist(), self.parents.tolist()
        scores = None if self.scores is None else self.scores.tolist()
        sources = None if self.sources is None else self.sources.tolist()
        return [
            TokenTree(
                tokens[row][:n],
                parents[row][:n],
                scores[row][:n] if scores is not None else None,
                sources[row][:n] if sources is not None else None,
            )
            for row, n in enumerate(sizes)
        ]

    @classmethod
    def chains(cls, tokens: Tensor) -> TreeBatch:
        """Every row of `tokens` [B, T] as one path, built on the device."""
        batch, size = tokens.shape
        order = torch.arange(size, device=tokens.device)
        mask = (order[:, None] >= order).expand(batch, size, size)
        trees = cls(
            tokens=tokens,
            parents=(order - 1).to(torch.int32).expand(batch, size),
            sizes=torch.full((batch,), size, dtype=torch.int32, device=tokens.device),
            max_depth=size - 1,
        )
        return trees.knowing(Structure.of(trees.parents, mask, order.expand(batch, size)))

    def with_tokens(
        self,
        tokens: Tensor,
        *,
        sizes: Tensor | None = None,
        scores: Tensor | None = None,
        draft_law: Tensor | None = None,
    ) -> TreeBatch:
        """The same trees with `tokens` [B, T] in their nodes; their mask and depths are kept.

        Args:
            tokens: Of the same shape.
            sizes: [B] live nodes; as before when None.
            scores: As `TreeBatch` says; none when None.
            draft_law: As `TreeBatch` says; none when None.
        """
        trees = TreeBatch(
            tokens,
            self.parents,
            self.sizes if sizes is None else sizes,
            self.max_depth,
            scores,
            self.sources,
            draft_law,
        )
        known = self.known_structure()
        return trees if known is None else trees.knowing(known)

    def knowing(self, structure: Structure) -> TreeBatch:
        """This batch, told what follows from its parents."""
        self._structure[:] = [structure]
        return self

    def known_structure(self) -> Structure | None:
        """What is known to follow from the parents without asking the device, or None."""
        found = self._structure[0] if self._structure else None
        return found if found is not None and found.belongs_to(self.parents) else None

    def structure(self) -> Structure:
        """What follows from the parents; computed once, on the device, where it is not known."""
        found = self.known_structure()
        if found is None:
            found = Structure.found(self.parents)
            self.knowing(found)
        return found

    def ancestor_mask(self) -> Tensor:
        """[B, T, T] bool; entry (i, j) says whether j is i or one of its ancestors."""
        return self.structure().mask

    def depths(self) -> Tensor:
        """[B, T] int64 distance of each node from the root."""
        return self.structure().depths

    def live(self) -> Tensor:
        """[B, T] bool, False at padding nodes."""
        nodes = torch.arange(self.size, device=self.tokens.device)
        return nodes < self.sizes[:, None]


def _pack(row: TokenTree, into: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
    """Writes one tree as [5 + T, T]: tokens, parents, sources, depths, size; its ancestor mask."""
    count, size = len(row), into.shape[1]
    into[0, :count], into[1, :count], into[2, :count] = row.tokens, row.parents, row.sources or 0
    into[3, 1:], into[3, :count] = 1, row.depths()
    into[4, 0] = count
    into[5:, 0] = 1  # everyone sees the root; padding nodes hang below it
    for node in range(1, size):
        if node < count:
            into[5 + node] = into[5 + row.parents[node]]
        into[5 + node, node] = 1


def _doubled_ancestors(parents: Tensor) -> Tensor:
    """[B, T, T] ancestor mask by pointer doubling: log2(T) steps, no host loop over nodes."""
    batch, size = parents.shape
    mask = torch.eye(size, dtype=torch.bool, device=parents.device)
    mask = mask.expand(batch, size, size)
    jump = parents.long()
    reached = 1  # `mask` covers this many levels, counting the node itself
    while reached < size:  # `max_depth` is only what the drafter says
        index = jump.clamp(min=0)
        above = mask.gather(1, index[:, :, None].expand_as(mask))
        mask = mask | (above & (jump >= 0)[:, :, None])
        jump = torch.where(jump >= 0, jump.gather(1, index), jump)
        reached *= 2
    return mask
