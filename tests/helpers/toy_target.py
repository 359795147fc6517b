"""A target that is a function of the text, behind the real loop: no model, all integers.

`decode` runs `speculative_generate` on it, so a drafter sees what it would see of a real model. The
functions prefer what they preferred before, so that every kind of draft is right now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from specdec.contracts import (
    BatchState,
    Drafter,
    FixedBudget,
    RoundResult,
    ShowPrompt,
    TargetOutput,
)
from specdec.loop import Call, speculative_generate
from specdec.round.pickers import picker_of
from specdec.round.prefix import PrefixIds
from specdec.round.tree import TokenTree, TreeBatch
from specdec.round.verify import HostVerdict
from specdec.stats import GenerationStats, RoundRecord

VOCAB = 24
Text = Sequence[int]
Ranks = Callable[[Text], Sequence[int]]
"""All tokens, the likeliest one first, after a text."""


def scrambled(*numbers: int) -> int:
    """A number below 2**31 that looks random, the same on every machine."""
    state = 2166136261
    for number in numbers:
        state = (state ^ (number + 1)) * 16777619 & 0xFFFFFFFF
        state ^= state >> 13
    return state >> 1


@cache
def ranks_of(*key: int) -> tuple[int, ...]:
    """The vocabulary in the order that belongs to `key`."""
    return tuple(sorted(range(VOCAB), key=lambda token: (scrambled(token, *key), token)))


@cache
def _logits_of(ranks: tuple[int, ...]) -> Tensor:
    logits = torch.empty(VOCAB, dtype=torch.float64)
    logits[torch.tensor(ranks)] = -torch.arange(VOCAB, dtype=torch.float64)
    return logits


def mostly_bigrams(text: Text) -> Sequence[int]:
    """The last token decides nine times in ten, the place in the text else."""
    return ranks_of(7, len(text)) if scrambled(3, len(text)) % 10 == 0 else ranks_of(text[-1])


def trigrams(text: Text) -> Sequence[int]:
    """The last two tokens decide, and now and then the place."""
    if scrambled(5, len(text)) % 8 == 0:
        return ranks_of(11, len(text))
    return ranks_of(text[-1], text[-2] % 4)


def by_place(text: Text) -> Sequence[int]:
    """Only the place decides: whoever guesses right was told before."""
    return ranks_of(13, len(text))


TARGETS: dict[str, Ranks] = {
    "bigrams": mostly_bigrams,
    "trigrams": trigrams,
    "by_place": by_place,
}


def next_of(ranks: Ranks) -> Callable[[Text], int]:
    """The greedy choice as a function of the text."""
    return lambda text: ranks(text)[0]


class ToyTarget:
    """Implements `TargetModel` without a cache: every node is asked about with its whole text."""

    prefill_forwards, refeed = 1, 0

    def __init__(self, state: BatchState, ranks: Ranks, chains_only: bool) -> None:
        self.allowed_shape = "chain" if chains_only else "any"
        self._state, self._ranks = state, ranks

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(text) - 1 for text in self._state.tokens])

    def depth_limit(self) -> int:
        return 10**6

    def prefill(self, show: ShowPrompt | None = None) -> TargetOutput:
        return TargetOutput(torch.stack([self._logits(text)[None] for text in self._state.tokens]))

    def forward_tree(self, trees: TreeBatch) -> TargetOutput:
        logits = torch.zeros(*trees.tokens.shape, VOCAB, dtype=torch.float64)
        for row, tree in enumerate(trees.to_rows()):
            for node, path in enumerate(paths_of(tree)):
                logits[row, node] = self._logits([*self._state.tokens[row], *path])
        return TargetOutput(logits)

    def commit(self, path: Tensor, accepted: Sequence[Sequence[int]], rows: Sequence[bool]) -> None:
        pass

    def rollback(self) -> None:
        pass

    def _logits(self, text: Text) -> Tensor:
        return _logits_of(tuple(self._ranks(text)))


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    """The tokens from the root, without it, to each node."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


@dataclass
class _After:
    """Stop rules: a row ends with its round once it has `limit` tokens."""

    limits: Sequence[int]

    def is_final(self, row: int, index: int, token: int) -> bool:
        return False

    def cut(self, verdict: HostVerdict, state: BatchState) -> HostVerdict:
        for row, tokens in enumerate(verdict.tokens):
            if not state.active[row]:
                verdict.tokens[row], verdict.paths[row] = [], []
            elif state.emitted(row) + len(tokens) >= self.limits[row]:
                state.active[row] = False
        sources = verdict.sources or [[0] * len(path) for path in verdict.paths]
        return replace(verdict, sources=sources)


@dataclass
class Played:
    """One row of one round.

    Attributes:
        history: The text before it; its last token is the root.
        tree: What was verified.
        tokens: What was emitted.
    """

    history: list[int]
    tree: TokenTree
    tokens: list[int]

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """Path to every node but the root, in their order."""
        return paths_of(self.tree)[1:]


@dataclass
class Game:
    """A call: its rows' rounds, and a look at the drafter after each of them.

    Attributes:
        ranks: The target.
        limits: Tokens after which each row ends.
        chains_only: Whether the target takes chains alone.
        budget: Nodes allowed in each round, over and over; None for the drafter's own size.
        look: Called after every round but the prefill.
    """

    ranks: Ranks
    limits: Sequence[int] = (70,)
    chains_only: bool = False
    budget: Sequence[int] | None = None
    look: Callable[[], None] = lambda: None
    rounds: list[list[Played | None]] = field(default_factory=list)

    def nodes(self, state: BatchState) -> int:
        """As `BudgetPolicy` says."""
        assert self.budget is not None
        return self.budget[len(self.rounds) % len(self.budget)]

    def observe(self, record: RoundRecord) -> None:
        """As `BudgetPolicy` says."""

    def play(self, drafter: Drafter, *prompts: Text) -> list[list[Played | None]]:
        """Decodes; the rows of every round, None for those that have ended."""
        batch = len(prompts)
        state = BatchState(
            tokens=[list(prompt) for prompt in prompts],
            prompt_lengths=[len(prompt) for prompt in prompts],
            active=[True] * batch,
            pending=torch.tensor([prompt[-1] for prompt in prompts]),
            lengths=torch.tensor([len(prompt) - 1 for prompt in prompts]),
            vocab_size=VOCAB,
            max_new_tokens=10**6,
        )
        histories: list[list[int]] = []

        def watch(result: RoundResult, record: RoundRecord) -> None:
            if record.index:
                assert record.trees is not None
                self.rounds.append([
                    Played(before, tree, tokens) if tokens else None
                    for before, tree, tokens in zip(
                        histories, record.trees, record.tokens, strict=True
                    )
                ])  # fmt: skip
                self.look()
            histories[:] = [list(tokens) for tokens in state.tokens]

        picker = picker_of(None, PrefixIds(torch.zeros(batch, 1).long(), 1), None, False)
        budget = FixedBudget(drafter.max_nodes) if self.budget is None else self
        stats = GenerationStats("toy")
        call = Call(state, picker, _After(self.limits), budget, stats, [watch], show_trees=True)
        speculative_generate(ToyTarget(state, self.ranks, self.chains_only), drafter, call)
        for text, prompt in zip(state.tokens, prompts, strict=True):
            for at in range(len(prompt), len(text)):
                assert text[at] == self.ranks(text[:at])[0]
        return self.rounds
