"""The walk, the ancestor mask, the buckets and the picks, on random trees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import TokenTree, TreeBatch
from specdec.round.noise import NoiseTape
from specdec.round.pickers import picker_of
from specdec.round.prefix import PrefixIds
from specdec.round.tree import bucket_size, padded_size
from specdec.round.verify import walk_on_device, walk_on_host

CPU = torch.device("cpu")
BUCKETS = {1, 2, 4, 8, 12, 16, 24, 32, 48, 64}


@st.composite
def tree_batches(draw: st.DrawFn) -> tuple[TreeBatch, Tensor]:
    """Up to 3 rows of up to 12 nodes over 3 tokens (so many equal siblings), with any picks."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parents = [-1, *(draw(st.integers(0, n)) for n in range(draw(st.integers(0, 11))))]
        rows.append(TokenTree([draw(st.integers(0, 2)) for _ in parents], parents))
    longest = max(map(len, rows))
    size = bucket_size(longest) if draw(st.booleans()) else longest
    trees = TreeBatch.from_rows(rows, CPU, size)
    count = len(rows) * trees.size
    picks = draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))
    return trees, torch.tensor(picks).view(len(rows), trees.size)


def without_host_knowledge(trees: TreeBatch) -> TreeBatch:
    """The same trees as if a device had built them: nothing but the tensors, a loose bound."""
    return TreeBatch(trees.tokens, trees.parents, trees.sizes, trees.max_depth + 2)


@settings(max_examples=400, deadline=None)
@given(tree_batches())
def test_both_walks_agree(case: tuple[TreeBatch, Tensor]) -> None:
    """I2, and the first of equal siblings wins in both."""
    trees, picks = case
    host = walk_on_host(trees, picks)
    for batch in (trees, without_host_knowledge(trees)):
        device = walk_on_device(batch, picks)
        depth = trees.max_depth
        assert host.length.tolist() == device.length.tolist()
        assert host.path.tolist() == device.path[:, :depth].tolist()
        assert host.tokens.tolist() == device.tokens[:, : depth + 1].tolist()
        assert (device.path[:, depth:] == -1).all()
    for row, length in enumerate(host.length.tolist()):
        assert (host.tokens[row, length + 1 :] == -1).all()
        path = host.path[row, :length].tolist()
        assert path == sorted(path)
        parents = [trees.parents[row, node].item() for node in path]
        assert parents == [0, *path][:length]


@settings(max_examples=200, deadline=None)
@given(tree_batches())
def test_ancestors_are_the_same_uploaded_and_computed(case: tuple[TreeBatch, Tensor]) -> None:
    trees, _ = case
    computed = without_host_knowledge(trees)
    assert torch.equal(trees.ancestor_mask(), computed.ancestor_mask())
    assert torch.equal(trees.depths(), computed.depths())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_buckets(sizes: list[int]) -> None:
    rows = [TokenTree.chain(7, [3] * (n - 1)) for n in sizes]
    assert TreeBatch.from_rows(rows, CPU).size == padded_size(max(sizes), CPU) == max(sizes)
    size = padded_size(max(sizes), torch.device("cuda"))
    trees = TreeBatch.from_rows(rows, CPU, size)
    assert trees.size == size >= max(sizes)
    assert trees.size in BUCKETS or trees.size % 32 == 0
    assert trees.live().sum(1).tolist() == sizes
    assert trees.to_rows() == rows


class EndlessRows:
    """State and stop rules of rows that have emitted some tokens and never end."""

    def __init__(self, emitted: list[int]) -> None:
        self.active, self._emitted = [True] * len(emitted), emitted

    def emitted(self, row: int) -> int:
        return self._emitted[row]

    def is_final(self, row: int, index: int, token: int) -> bool:
        return False


@pytest.mark.parametrize("sampled", [False, True])
@settings(max_examples=60, deadline=None)
@given(case=tree_batches(), seed=st.integers(0, 99))
def test_picks_everywhere_are_picks_along_the_path(
    case: tuple[TreeBatch, Tensor], seed: int, sampled: bool
) -> None:
    trees, _ = case
    batch = len(trees.tokens)
    logits = torch.randn(batch, trees.size, 3, generator=torch.Generator().manual_seed(seed))
    rows = EndlessRows([(seed + 3 * row) % 5 for row in range(batch)])
    found = []
    for along_path in (False, True):
        torch.manual_seed(seed)
        tape = NoiseTape(batch, CPU) if sampled else None
        prefix = PrefixIds(torch.zeros(batch, 1, dtype=torch.long), 32)
        picker = picker_of(None, prefix, tape, along_path)
        found.append(picker.picks(trees, logits, rows, rows).ids)
    everywhere, lazy = found
    assert torch.equal(everywhere[lazy >= 0], lazy[lazy >= 0])
    verdicts = [walk_on_device(trees, picks) for picks in found]
    assert torch.equal(verdicts[0].tokens, verdicts[1].tokens)
    assert torch.equal(verdicts[0].path, verdicts[1].path)
