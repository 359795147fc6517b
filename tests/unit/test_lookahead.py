"""The Jacobi window is the one of the paper, written as a tree."""

import random

import pytest
import torch

from specdec.drafters.lookahead import JacobiWindow, Lookahead, LookaheadConfig, LookaheadRow
from specdec.drafters.row import RowRound
from specdec.errors import ConfigError
from specdec.round.tree import TokenTree, TreeBatch, TreeBuilder
from specdec.sources.ngram_pool import NgramPool

SHAPES = [(1, 3), (2, 3), (5, 4), (7, 5), (15, 5), (4, 2)]


def next_token(token: int, depth: int) -> int:
    """A target that never repeats itself here, so that no two nodes merge."""
    return (31 * token + 7 * depth + 11) % 100_003


def play(window: JacobiWindow, rounds: int, pool: NgramPool) -> TokenTree:
    """Runs the window over a root that moves by one token a round; returns the last tree."""
    tree = TokenTree([1], [-1])
    for root in range(1, rounds + 1):
        builder = TreeBuilder(root)
        window.grow(builder)
        tree = builder.build()
        depths = tree.depths()
        picks = [next_token(t, d) for t, d in zip(tree.tokens, depths, strict=True)]
        window.advance(root, picks, pool)
    return tree


@pytest.mark.parametrize(("width", "ngram"), SHAPES)
def test_warm_up_ends_with_a_full_comb(width: int, ngram: int) -> None:
    window = JacobiWindow(width, ngram, list(range(1000, 1200)), random.Random(0))
    pool = NgramPool(guesses=10**6)
    play(window, ngram - 2, pool)
    assert window.is_full
    assert [len(level) for level in window.levels] == [width - 1] + [width] * (ngram - 2)
    before = len(pool)
    play(window, 1, pool)
    longest = [g for key in pool._followers for g, _ in pool.guesses(key) if len(g) == ngram - 1]
    assert len(longest) == width
    assert len(pool) > before


@pytest.mark.parametrize(("width", "ngram"), SHAPES)
def test_the_comb_is_the_papers_mask_and_positions(width: int, ngram: int) -> None:
    """Level l of column i stands at position l + i (+1 on level 0) and sees row 0 up to column i
    and its own column above it."""
    window = JacobiWindow(width, ngram, list(range(1000, 1400)), random.Random(1))
    tree = play(window, ngram, NgramPool(guesses=4))
    trees = TreeBatch.from_rows([tree], torch.device("cpu"))
    mask, depths = trees.ancestor_mask()[0], tree.depths()
    row_0 = list(range(width))  # the root, then W - 1 nodes
    node = width
    for level in range(1, ngram - 1):
        for column in range(width):
            own_column = [width + (above - 1) * width + column for above in range(1, level + 1)]
            seen = set(row_0[: column + 1]) | set(own_column)
            assert set(mask[node].nonzero()[:, 0].tolist()) == seen
            assert depths[node] == level + column
            node += 1
    assert node == len(tree)


def test_a_small_budget_shrinks_the_window_and_a_large_one_brings_it_back() -> None:
    config = LookaheadConfig(window=5, ngram=4, guesses=3)
    drafter = Lookahead(config)
    row = LookaheadRow([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], drafter)
    for budget in (config.nodes, 9, 4, 1, 0, 2, config.nodes, config.nodes):
        tree = row.propose(budget)
        assert len(tree) <= budget + 1
        picks = [7] * len(tree)
        row.advance(RowRound(tree, [], [7], picks))
    assert row.window.width == config.window


def test_guesses_are_one_trie() -> None:
    drafter = Lookahead(LookaheadConfig(window=0, ngram=3, guesses=4))
    tree = LookaheadRow([1, 2, 3, 1, 2, 4, 1], drafter).propose(8)
    assert tree.child(0, 2) == 1
    assert {tree.tokens[n] for n in range(len(tree)) if tree.parents[n] == 1} == {3, 4}


@pytest.mark.parametrize("bad", [{"window": -1}, {"ngram": 1}, {"guesses": -1}])
def test_impossible_sizes(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be a whole number from"):
        LookaheadConfig(**bad)
