"""Words, the walk and the commit in Triton, run by its interpreter, against plain torch."""

from __future__ import annotations

import pytest
import torch

from helpers.kv_buffers import committed, different_buffers, random_paths
from helpers.random_trees import SIZES, random_trees
from specdec_kernels import commit_kv, tree_words, walk


@pytest.mark.parametrize("size", SIZES)
def test_words(size: int) -> None:
    trees = random_trees(size, 3, size)
    for parents in (trees.parents, trees.parents.long().T.contiguous().T):
        found, wanted = (tree_words(parents, backend=b) for b in ("triton", "reference"))
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert found[1].dtype == wanted[1].dtype


def test_the_walk_on_500_trees() -> None:
    lengths = []
    for seed in range(20, 45):  # long paths are among them
        trees = random_trees(seed, 20, SIZES[seed % len(SIZES)])
        found, wanted = (walk(*trees, backend=b) for b in ("triton", "reference"))
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other), seed
            assert one.dtype == other.dtype
        lengths += found[1].tolist()
    assert max(lengths) > 64


def test_the_walk_reads_strides() -> None:
    trees = random_trees(2, 4, 33)
    tokens, parents, picks = (
        x.T.contiguous().T for x in (trees.tokens, trees.parents, trees.picks)
    )
    found = walk(tokens, parents, trees.sizes, picks, trees.max_depth, backend="triton")
    wanted = walk(*trees, backend="reference")
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("seed", range(6))
def test_commit(seed: int) -> None:
    """Paths longer than one turn moves, over places that others are read from."""
    buffers = different_buffers(2, 70)
    path, length = random_paths(seed, 2, 48, 40)
    prefix = torch.tensor([21, 3])
    wanted, after = committed(buffers, path, length, prefix)
    commit_kv(buffers, path, length, prefix, backend="triton")
    assert torch.equal(prefix, after)
    for found, right in zip(buffers, wanted, strict=True):
        assert torch.equal(found, right)
