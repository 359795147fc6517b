"""Drafts that need no model, node by node against plain references, on texts that are functions."""

from __future__ import annotations

from math import log
from typing import Any

import pytest

from helpers.reference_drafts import (
    ReferenceJacobi,
    ReferenceRecycling,
    ReferenceSuffix,
    copied,
    likeliest_ranks,
)
from helpers.toy_target import TARGETS, VOCAB, Game, Played, next_of, scrambled
from specdec.drafters.jacobi import Jacobi, JacobiConfig
from specdec.drafters.prompt_lookup import PromptLookup, PromptLookupConfig
from specdec.drafters.recycling import RankTree, Recycling, RecyclingConfig
from specdec.drafters.suffix import Suffix, SuffixConfig

BUDGETS = [None, [99, 5, 0, 3], [2]]
chains_too = pytest.mark.parametrize("chains", [False, True], ids=["trees", "chains"])
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=str)
every_target = pytest.mark.parametrize("target", TARGETS)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """The second half repeats the first."""
    half = [scrambled(seed, place) % VOCAB for place in range(length // 2)]
    return [*half, *half]


def budget_of(game: Game, index: int) -> int | None:
    return None if game.budget is None else game.budget[index % len(game.budget)]


def row_of(rounds: list[list[Played | None]], row: int = 0) -> list[Played]:
    return [played[row] for played in rounds if played[row] is not None]  # type: ignore[misc]


@every_budget
@chains_too
@every_target
@pytest.mark.parametrize("sizes", [(6, 2, 4), (9, 0, 2), (3, 4, 6), (1, 1, 3)], ids=str)
def test_jacobi(
    sizes: tuple[int, int, int], target: str, chains: bool, budget: list[int] | None
) -> None:
    block, recycle, ngram = sizes
    game = Game(TARGETS[target], chains_only=chains, budget=budget)
    config = JacobiConfig(block=block, recycle=recycle, ngram=ngram, seed=5)
    rounds = row_of(game.play(Jacobi(config), prompt_of(12)))
    reference = ReferenceJacobi(
        next_of(TARGETS[target]), list(rounds[0].history), *sizes, seed=5, chain=chains
    )
    for index, played in enumerate(rounds):
        wanted = reference.step(budget_of(game, index))
        assert (played.paths, played.tokens) == wanted, f"round {index}"
    if target == "by_place" and budget is None and not chains and recycle == 0:
        assert len(rounds) < 40  # the block is right one round after it was guessed


@every_budget
@every_target
@pytest.mark.parametrize("options", [
    {}, {"max_ngram": 3, "min_ngram": 2, "tokens_per_match": 1},
    {"max_ngram": 9, "num_draft_tokens": 25},
], ids=str)  # fmt: skip
def test_prompt_lookup(options: dict[str, Any], target: str, budget: list[int] | None) -> None:
    config = PromptLookupConfig(**options)
    game = Game(TARGETS[target], budget=budget)
    emitted = []
    for index, played in enumerate(row_of(game.play(PromptLookup(config), prompt_of(12)))):
        allowed = budget_of(game, index)
        most = min(config.num_draft_tokens, 10**6 if allowed is None else allowed)
        wanted = copied(
            played.history, config.max_ngram, config.min_ngram, most, config.tokens_per_match
        )
        assert played.tree.tokens[1:] == wanted, f"round {index}"
        assert played.tree.parents == list(range(-1, len(wanted)))
        emitted.append(len(played.tokens))
    if target == "bigrams" and not options and budget is None:
        assert {1, 2, 4} <= set(emitted)


@pytest.mark.parametrize("nodes", [1, 7, 30, 80])
@pytest.mark.parametrize(("depth", "width"), [(8, 8), (3, 3), (5, 1), (1, 9)])
def test_recyclings_static_tree(nodes: int, depth: int, width: int) -> None:
    tree = RankTree.grow(nodes, depth, width)
    paths: list[tuple[int, ...]] = [()]
    for parent, rank in zip(tree.parents[1:], tree.ranks[1:], strict=True):
        paths.append((*paths[parent], rank))
    assert paths[1:] == likeliest_ranks(nodes, depth, width)


@every_budget
@chains_too
@every_target
@pytest.mark.parametrize("from_prompt", [True, False])
@pytest.mark.parametrize("sizes", [(3, 12, 4), (8, 40, 6), (1, 5, 8)], ids=str)
def test_recycling(
    sizes: tuple[int, int, int], from_prompt: bool, target: str, chains: bool,
    budget: list[int] | None,
) -> None:  # fmt: skip
    top_k, nodes, depth = sizes
    config = RecyclingConfig(top_k=top_k, nodes=nodes, depth=depth, from_prompt=from_prompt)
    drafter, prompts = Recycling(config), [prompt_of(12), prompt_of(8, seed=3)]
    matrices: list[list[list[int]]] = []
    game = Game(TARGETS[target], limits=(40, 25), chains_only=chains, budget=budget)
    game.look = lambda: matrices.append(drafter.matrix.tolist())
    rounds = game.play(drafter, *prompts)
    first = [played.history for played in rounds[0] if played is not None]
    reference = ReferenceRecycling(
        TARGETS[target], first, top_k, nodes, depth, prompts if from_prompt else (), chain=chains
    )
    for index, (rows, matrix) in enumerate(zip(rounds, matrices, strict=True)):
        steps = reference.step([row is not None for row in rows], budget_of(game, index))
        for row, wanted in zip(rows, steps, strict=True):
            if row is not None:
                assert (row.paths, row.tokens) == wanted, f"round {index}"
        for token, found in enumerate(matrix):
            wanted_row = reference.known.get(token, [])
            assert found == wanted_row + [-1] * (top_k - len(wanted_row)), f"round {index}"


@every_budget
@chains_too
@every_target
@pytest.mark.parametrize("options", [
    {}, {"min_probability": 0.02, "max_nodes": 60}, {"max_depth": 3, "nodes_per_match": 1.0},
], ids=str)  # fmt: skip
def test_suffix(
    options: dict[str, Any], target: str, chains: bool, budget: list[int] | None
) -> None:
    config = SuffixConfig(**options)
    game = Game(TARGETS[target], chains_only=chains, budget=budget, limits=(45,))
    branched = 0
    for index, played in enumerate(row_of(game.play(Suffix(config), prompt_of(12)))):
        reference = ReferenceSuffix(
            played.history, config.max_nodes, config.max_depth, config.min_probability,
            config.nodes_per_match, config.extra_nodes, chains,
        )  # fmt: skip
        wanted = reference.draft(budget_of(game, index))
        assert played.paths == list(wanted), f"round {index}"
        scores = played.tree.scores or [0.0]
        assert scores[1:] == pytest.approx([log(found) for found in wanted.values()], abs=1e-6)
        branched += len(set(played.tree.parents)) < len(played.tree.parents)
    assert chains or target == "by_place" or budget == [2] or branched > 0
