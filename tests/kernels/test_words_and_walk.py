"""Words, depths and the walk in plain torch, against the trees of the library."""

from __future__ import annotations

import pytest
import torch

from helpers.random_trees import SIZES, RandomTrees, random_trees
from specdec import TreeBatch
from specdec.round.verify import walk_on_host
from specdec_kernels import KernelError, tree_words, walk
from specdec_kernels.tree import unpacked


def batch_of(trees: RandomTrees) -> TreeBatch:
    return TreeBatch(trees.tokens, trees.parents, trees.sizes, trees.max_depth)


@pytest.mark.parametrize("size", SIZES)
def test_words_are_the_ancestor_mask(size: int) -> None:
    for seed in range(4):
        trees = batch_of(random_trees(seed, 5, size))
        words, depth = tree_words(trees.parents)
        assert torch.equal(unpacked(words, size), trees.ancestor_mask())
        assert torch.equal(depth.long(), trees.depths())


def test_the_walk_is_that_of_the_host_on_10000_trees() -> None:
    lengths = []
    for seed in range(100):
        trees = random_trees(seed, 100, SIZES[seed % len(SIZES)])
        host, found = walk_on_host(batch_of(trees), trees.picks), walk(*trees)
        for one, other in zip(found, (host.path, host.length, host.tokens), strict=True):
            assert torch.equal(one, other), seed
            assert one.dtype == other.dtype
        lengths += found[1].tolist()
    assert sum(length > 3 for length in lengths) > 1000
    assert max(lengths) > 64


def test_a_pick_below_zero_matches_no_token() -> None:
    """Not even the same number: no token is below zero, but padding may hold anything."""
    tokens, parents = torch.tensor([[5, -1]]), torch.tensor([[-1, 0]])
    _, length, emitted = walk(tokens, parents, torch.tensor([2]), torch.tensor([[-1, 3]]), 1)
    assert length.tolist() == [0]
    assert emitted.tolist() == [[-1, -1]]


@pytest.mark.parametrize("op", ["tree_words", "walk"])
def test_they_are_operators_with_a_fake(op: str) -> None:
    trees = random_trees(1, 3, 65)
    inputs: dict[str, tuple[object, ...]] = {"tree_words": (trees.parents,), "walk": trees}
    torch.library.opcheck(getattr(torch.ops.specdec, op).default, (*inputs[op], "reference"))


def test_shapes_are_checked() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(KernelError, match="tokens, parents and picks"):
        walk(tokens, tokens, torch.tensor([3, 3]), tokens[:, :2], 2)
    with pytest.raises(KernelError, match=r"size must be \[2\]"):
        walk(tokens, tokens, torch.tensor([3]), tokens, 2)
    with pytest.raises(KernelError, match="int32 or int64"):
        tree_words(tokens.float())
