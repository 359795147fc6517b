"""Jacobi decoding: a block that moves towards its fixed point, and what is kept of its guesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from specdec.contracts import BatchState
from specdec.drafters.jacobi import Jacobi, JacobiConfig, JacobiRow, recycle
from specdec.drafters.row import RowRound
from specdec.errors import ConfigError
from specdec.round.tree import TokenTree
from specdec.sources.ngram_pool import NgramPool

VOCAB = 1000
PROMPT = [11, 12, 13, 14, 15]
Target = Callable[[Sequence[int]], int]


def by_position(text: Sequence[int]) -> int:
    """A target that ignores what was written."""
    return (37 * len(text)) % VOCAB


def forgetful(text: Sequence[int]) -> int:
    """A function of the last token alone, under which all tokens come closer to each other."""
    return text[-1] // 3 + 5


def by_everything(text: Sequence[int]) -> int:
    """A target that no guess helps with."""
    return hash(tuple(text)) % VOCAB


def drafter_of(shape: str = "any", **options: Any) -> Jacobi:
    drafter = Jacobi(JacobiConfig(**options))
    one = torch.tensor([0])
    drafter.start(BatchState([PROMPT], [4], [True], one, one, VOCAB, 500, shape=shape))  # type: ignore[arg-type]
    return drafter


@dataclass
class Round:
    """What a round proposed and emitted."""

    tree: TokenTree
    picks: list[int]
    tokens: list[int]


def play(drafter: Jacobi, target: Target, rounds: int, budget: int | None = None) -> list[Round]:
    """Decodes as the loop does, with a target that is a function of the text."""
    row, played = JacobiRow(list(PROMPT), drafter), list[Round]()
    for _ in range(rounds):
        allowed = drafter.max_nodes if budget is None else budget
        tree = row.propose(allowed)
        assert len(tree) <= allowed + 1
        texts = [list(row.text)]
        for node in range(1, len(tree)):
            texts.append([*texts[tree.parents[node]], tree.tokens[node]])
        picks = [target(text) for text in texts]
        path, at = list[int](), 0
        while (child := tree.child(at, picks[at])) is not None:
            path.append(child)
            at = child
        tokens = [*(tree.tokens[node] for node in path), picks[at]]
        assert tokens == [target(texts[node]) for node in (0, *path)]
        row.advance(RowRound(tree, path, tokens, picks))
        played.append(Round(tree, picks, tokens))
    return played


# The fixed point


@pytest.mark.parametrize("target", [by_position, forgetful, by_everything])
def test_the_picks_after_the_accepted_nodes_are_the_next_guesses(target: Target) -> None:
    block = 9
    played = play(drafter_of(block=block, recycle=0), target, 30)
    for before, after in pairwise(played):
        assert before.tree.parents == list(range(-1, block))
        refined = before.picks[len(before.tokens) :]
        assert after.tree.tokens[0] == before.tokens[-1]
        assert after.tree.tokens[1 : len(refined) + 1] == refined
        fresh = block - len(refined)
        assert after.tree.sources is not None
        assert after.tree.sources[1:] == [0] * len(refined) + [1] * fresh


def test_a_block_is_right_one_round_after_its_guesses_where_only_positions_count() -> None:
    played = play(drafter_of(block=9, recycle=0), by_position, 20)
    emitted = [len(found.tokens) for found in played]
    assert emitted == [1, 10] * 10  # fresh guesses are wrong, their picks are right


def test_a_block_converges_where_the_target_forgets() -> None:
    """After as many rounds as a wrong token is remembered, the block is the text itself."""
    target_forgets_after = 6  # 1000 // 3**6 is 1
    played = play(drafter_of(block=30, recycle=0), forgetful, target_forgets_after + 2)
    last = played[-1]
    right = [last.tree.tokens[0]]
    while len(right) < 24:
        right.append(forgetful(right))
    assert last.tree.tokens[:24] == right
    assert len(last.tokens) >= 24


def test_at_least_one_token_a_round() -> None:
    for found in play(drafter_of(), by_everything, 20):
        assert len(found.tokens) >= 1


# Fresh guesses


def test_fresh_guesses_come_from_the_text_and_repeat_with_the_seed() -> None:
    def first(**options: Any) -> list[int]:
        return play(drafter_of(block=40, recycle=0, **options), by_everything, 1)[0].tree.tokens

    before = torch.get_rng_state()
    assert set(first()[1:]) == set(PROMPT)
    assert first() == first(seed=0) != first(seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_model_cannot_take_is_not_guessed() -> None:
    drafter = drafter_of(block=40, recycle=0)
    assert set(JacobiRow([7, VOCAB, VOCAB + 3, 9], drafter).propose(40).tokens) == {7, 9}


def test_rows_do_not_share_guesses() -> None:
    drafter = drafter_of(block=6, recycle=0)
    one, other = JacobiRow(list(PROMPT), drafter), JacobiRow(list(PROMPT), drafter)
    tree = one.propose(6)
    one.advance(RowRound(tree, [], [1], [1, 2, 3, 4, 5, 6, 7]))
    other.advance(RowRound(other.propose(6), [], [9], [9] * 7))
    assert one.propose(6).tokens == [1, 2, 3, 4, 5, 6, 7]


# Recycling


def test_runs_that_the_target_confirms_are_kept_from_every_node() -> None:
    #        4 - 5 - 6 - 7     the target: 4 -> 9, 5 -> 6, 6 -> 7, 7 -> 8, and 3 -> 1 on the branch
    #          \ 3
    tree = TokenTree([4, 5, 6, 7, 3], [-1, 0, 1, 2, 0])
    pool = NgramPool(4)
    recycle(tree, [9, 6, 7, 8, 1], pool, 4)
    kept = {key: [gram for gram, _ in pool.guesses(key)] for key in (3, 4, 5, 6, 7)}
    assert kept == {3: [(1,)], 4: [(9,)], 5: [(6, 7, 8)], 6: [(7, 8)], 7: [(8,)]}
    short = NgramPool(4)
    recycle(tree, [9, 6, 7, 8, 1], short, 3)
    assert [gram for gram, _ in short.guesses(5)] == [(6, 7)]
    recycle(TokenTree.chain(4, [4]), [1, 2], short, 3)
    assert [gram for gram, _ in short.guesses(4)][:2] == [(1,), (2,)]  # the root's is the newest


def test_a_rejected_run_is_verified_when_its_first_token_comes() -> None:
    drafter = drafter_of(block=3, recycle=2, ngram=4)
    row = JacobiRow([1, 2], drafter)
    row.propose(9)
    tree = TokenTree.chain(2, [50, 51, 52])
    row.advance(RowRound(tree, [], [60, 50], [60, 51, 52, 53]))
    again = row.propose(9)
    assert again.tokens[:4] == [50, 51, 52, 53]  # the block, which they are the guesses of
    row.advance(RowRound(again, [], [70, 51], [70] * len(again)))
    later = row.propose(9)
    assert (51, 52, 53) in {tuple(path_of(later, node)) for node in range(len(later))}
    assert later.tokens[1:4] == [70, 70, 70]


def test_the_chain_comes_first_and_branches_hang_where_their_ngrams_end() -> None:
    drafter = drafter_of(block=2, recycle=3, ngram=3)
    text = [1, 2, 3, 8, 9, 3, 1, 4, 5, 6]
    row = JacobiRow(text, drafter)
    row.propose(8)
    block = TokenTree.chain(6, [30, 31])
    row.advance(RowRound(block, [], [1], [1, 0, 7]))
    tree = row.propose(8)
    paths = [tuple(path_of(tree, node)) for node in range(len(tree))]
    assert paths[1:3] == [(1, 0), (1, 0, 7)]
    below_the_root = [(1, 4), (1, 4, 5), (1, 2), (1, 2, 3)]  # the newest n-gram first
    assert paths[3:] == [*below_the_root, (1, 4, 5, 6), (1, 4, 5, 6, 1)]  # (1, 2, 3) has no room


def path_of(tree: TokenTree, node: int) -> list[int]:
    above = path_of(tree, tree.parents[node]) if node else []
    return [*above, tree.tokens[node]]


# Budgets and chains


@pytest.mark.parametrize("shape", ["any", "chain"])
@pytest.mark.parametrize("budget", [*range(12), 100])
def test_budgets(budget: int, shape: str) -> None:
    drafter = drafter_of(shape, block=4, recycle=2, ngram=4)
    for found in play(drafter, by_position, 8, budget):
        block = found.tree.parents[: 1 + min(budget, 4)]
        assert len(found.tree) <= min(budget, 10) + 1
        if shape == "chain":
            assert block == found.tree.parents == list(range(-1, min(budget, 4)))
        elif budget:
            assert found.tree.parents[1] == 0


def test_a_larger_budget_brings_the_block_back() -> None:
    drafter = drafter_of(block=6, recycle=0)
    row, sizes = JacobiRow(list(PROMPT), drafter), []
    for budget in (6, 0, 3, 0, 6):
        tree = row.propose(budget)
        sizes.append(len(tree) - 1)
        row.advance(RowRound(tree, [], [15], [9] * len(tree)))
    assert sizes == [6, 0, 3, 0, 6]


def test_on_a_chain_target_known_ngrams_go_before_the_guesses() -> None:
    drafter = drafter_of("chain", block=6, recycle=2, ngram=3)
    tree = JacobiRow([1, 4, 5, 1, 2, 3, 8, 9, 1], drafter).propose(20)
    assert tree.parents == list(range(-1, 6))
    assert tree.tokens[:5] == [1, 2, 3, 8, 9]
    assert tree.sources == [0, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "bad", [{"block": 0}, {"recycle": -1}, {"ngram": 1}, {"block": 5000}, {"recycle": 900}]
)
def test_impossible_sizes(bad: dict[str, int]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ConfigError, match=rf"({name} must be|jacobi verifies) .* got .*{value}"):
        JacobiConfig(**bad)
