"""Lookahead against the algorithm of the paper: window, pool and hypotheses, step by step."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.reference_lookahead import ReferenceLookahead
from helpers.toy_target import TARGETS, VOCAB, Game, Played, next_of, scrambled
from specdec.drafters.lookahead import Lookahead, LookaheadConfig

SHAPES = [(7, 5, 7), (5, 4, 3), (4, 3, 6), (1, 3, 2), (6, 2, 4), (1, 2, 1), (3, 7, 2), (0, 4, 5),
          (6, 4, 0)]  # fmt: skip
PAPER = {"pool_from_prompt": False, "extend_guesses": False, "harvest": False}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [scrambled(seed, place) % VOCAB for place in range(length)]


def check(target: str, game: Game, shape: tuple[int, int, int], **options: Any) -> list[int]:
    """Plays a call of one row beside the reference; tokens emitted in each round."""
    window, ngram, guesses = shape
    drafter = Lookahead(LookaheadConfig(window, ngram, guesses, **options))
    states: list[tuple[Any, Any]] = []

    def look() -> None:
        grams = drafter.rows[0].pool._followers
        pool = {key: list(found) for key, found in grams.items()}
        states.append(([list(level) for level in drafter.rows[0].window.levels], pool))

    game.look = look
    rounds = game.play(drafter, prompt_of(12))
    first = rounds[0][0]
    assert first is not None
    reference = ReferenceLookahead(
        next_of(TARGETS[target]), list(first.history), window, ngram, guesses,
        seed=options.get("seed", 0), from_prompt=options.get("pool_from_prompt", True),
        extend=options.get("extend_guesses", True), harvest=options.get("harvest", True),
        chain=game.chains_only,
    )  # fmt: skip
    emitted = []
    for index, ((played,), (levels, pool)) in enumerate(zip(rounds, states, strict=True)):
        assert isinstance(played, Played)
        budget = None if game.budget is None else game.budget[index % len(game.budget)]
        hypotheses, tokens = reference.step(budget)
        assert (played.paths, played.tokens) == (hypotheses, tokens), f"round {index}"
        assert levels == reference.levels, f"round {index}"
        assert pool == {
            key: grams for key, grams in reference.pool.grams.items() if grams or key in pool
        }
        emitted.append(len(tokens))
    return emitted


@pytest.mark.parametrize("options", [PAPER, {}], ids=["paper", "ours"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_is_the_papers(
    shape: tuple[int, int, int], target: str, options: dict[str, Any]
) -> None:
    check(target, Game(TARGETS[target]), shape, **options)


@pytest.mark.parametrize("option", PAPER)
def test_each_option_alone(option: str) -> None:
    check("trigrams", Game(TARGETS["trigrams"]), (5, 4, 4), **{option: False}, seed=3)


@pytest.mark.parametrize("shape", [(7, 5, 7), (3, 4, 2), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("budget", [[99], [99, 99, 13, 0, 4], [5], [0, 1, 2, 99]], ids=str)
def test_budgets(shape: tuple[int, int, int], budget: list[int]) -> None:
    check("bigrams", Game(TARGETS["bigrams"], budget=budget), shape)


@pytest.mark.parametrize("options", [PAPER, {}], ids=["paper", "ours"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("budget", [None, [9, 2, 0]], ids=str)
def test_one_chain_at_a_time(
    target: str, budget: list[int] | None, options: dict[str, Any]
) -> None:
    game = Game(TARGETS[target], chains_only=True, budget=budget)
    check(target, game, (6, 4, 3), **options)


def test_the_toy_texts_exercise_what_is_compared() -> None:
    """Several tokens at once in some rounds and one in others, by guesses and by the window."""
    emitted = check("trigrams", Game(TARGETS["trigrams"]), (7, 5, 7))
    assert {1, 2, 3} <= set(emitted)
    window = Lookahead(LookaheadConfig(9, 5, 7, pool_from_prompt=False, extend_guesses=False))
    won = set()
    for (played,) in Game(TARGETS["bigrams"]).play(window, prompt_of(12)):
        assert played is not None
        assert played.tree.sources is not None
        accepted = played.paths.index(tuple(played.tokens[:-1])) if played.tokens[1:] else -1
        won.add(played.tree.sources[accepted + 1])
    assert {0, 2} <= won


def test_rows_have_windows_and_pools_of_their_own() -> None:
    """The rows draw from one generator, in their order; else each is what it would be alone."""
    shape, prompts = (4, 3, 3), [prompt_of(9, 1), prompt_of(12, 2)]
    game = Game(TARGETS["trigrams"], limits=(60, 40))
    rounds = game.play(Lookahead(LookaheadConfig(*shape)), *prompts)
    model = next_of(TARGETS["trigrams"])
    references = []
    for row, prompt in enumerate(prompts):
        reference = ReferenceLookahead(model, [*prompt, model(prompt)], *shape)
        if row:
            reference.random = references[0].random
            reference.begin_window()
        references.append(reference)
    for played in rounds:
        for row, reference in enumerate(references):
            own = played[row]
            if own is not None:
                assert (own.paths, own.tokens) == reference.step()
    assert len({len([1 for played in rounds if played[row]]) for row in range(2)}) == 2
