"""Lookahead decoding (Fu et al., arXiv 2402.02057) as an ordinary token tree.

The window of W columns and N - 1 levels is a comb: level 0 is a chain under the root, and every
deeper level hangs below the one before it in its column. The n-gram guesses are a trie under the
root. So one ancestor mask and one walk serve both, window nodes can be accepted too (Jacobi
acceptance for free), and a fully accepted guess still gets its bonus token; the original does
neither.

Merged guesses leave nodes of the G (N - 1) allotment unused. They are spent on what the pool says
comes after a guess, and the pool learns from every verified node, rejected ones included.

Where the target takes only chains there is no room for a window beside the guesses: the longest
guess is verified, or, when the pool has none, a Jacobi chain of W tokens.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from specdec.contracts import BatchState, Needs
from specdec.drafters.row import DraftRow, RowDrafter, RowRound
from specdec.errors import ConfigError
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TokenTree, TreeBuilder
from specdec.sources.ngram_pool import NgramPool

# Tokens a forward by (window, ngram, guesses), measured with a 260K-parameter story model on
# openings as in docs/benchmarks.md#recipes: fluent prose that repeats itself little, so this is a
# cautious guess.
_PRIORS: Mapping[tuple[int, int, int], float] = {
    (1, 2, 1): 1.25,
    (1, 3, 1): 1.39,
    (2, 3, 2): 1.55,
    (3, 3, 3): 1.69,
    (2, 4, 2): 1.74,
    (3, 4, 3): 1.83,
    (5, 4, 5): 2.07,
    (7, 5, 7): 2.21,
    (10, 5, 10): 2.47,
    (15, 5, 15): 2.55,
}
_FROM_WINDOW, _FROM_TEXT, _WINDOW_NODE = 0, 1, 2


@dataclass(frozen=True)
class LookaheadConfig(MethodOptions):
    """Options of `lookahead`; the paper's presets for large models on an A100 are W/N/G = 15/5/15
    (7B), 10/5/10 (13B) and 7/5/7 (33B).
    """

    window: Annotated[int, Range(0, MAX_NODES, tries=(0, 1, 2, 3, 5, 7, 10, 15))] = 7
    """Columns of the Jacobi window (W)."""
    ngram: Annotated[int, Range(2, MAX_NODES, tries=(2, 3, 4, 5))] = 5
    """Tokens of an n-gram, key included (N)."""
    guesses: Annotated[int, Range(0, MAX_NODES, tries=(1, 2, 3, 5, 7, 10, 15))] = 7
    """n-grams verified a round (G)."""
    pool_from_prompt: bool = True
    """Also collect n-grams from the prompt and the accepted text."""
    extend_guesses: bool = True
    """Continue guesses from the pool with the nodes that merging saved."""
    harvest: bool = True
    """Also collect the target's choice at every verified node, and the tails of n-grams."""
    keep_pool: bool = False
    """Keep the pool from call to call; text never depends on it, speed does."""
    seed: int = 0
    """Seed of the window's random start; independent of torch's generators."""

    def check(self) -> None:
        """A step is no larger than a round may be."""
        if self.nodes > MAX_NODES:
            raise ConfigError(
                f"lookahead verifies at most {MAX_NODES} nodes, (window + guesses) * (ngram - 1), "
                f"got window={self.window}, ngram={self.ngram}, guesses={self.guesses}"
            )

    @property
    def nodes(self) -> int:
        """Nodes of a full step below the root."""
        return max((self.window + self.guesses) * (self.ngram - 1) - 1, 0)


class JacobiWindow:
    """The window of one row: N - 1 levels of guessed tokens, refined by one level every round.

    Args:
        width: Columns W.
        ngram: N.
        seed_text: Tokens the start is drawn from.
        generator: Source of randomness.
    """

    def __init__(
        self, width: int, ngram: int, seed_text: list[int], generator: random.Random
    ) -> None:
        self.width, self._levels_wanted = width, ngram - 1
        self._seed_text, self._generator = seed_text, generator
        # Level 0 starts longer, because each warm-up round drops one column.
        self.levels = [self._random(width + ngram - 3)] if width else []
        self._heads: list[int] = []

    def _random(self, count: int) -> list[int]:
        return [self._generator.choice(self._seed_text) for _ in range(max(count, 0))]

    @property
    def is_full(self) -> bool:
        """Whether all levels are filled, so that a round yields n-grams."""
        return len(self.levels) == self._levels_wanted

    def node_count(self) -> int:
        """Nodes that `grow` adds at most."""
        return sum(map(len, self.levels))

    def shrink(self, budget: int) -> None:
        """Drops columns until at most `budget` nodes are left."""
        while self.width and self.node_count() > budget:
            self.width -= 1
            self.levels = [level[:-1] for level in self.levels] if self.width else []

    def grow(self, builder: TreeBuilder) -> None:
        """Adds the comb under the root and remembers the nodes whose picks form the next level."""
        above = [0]
        for depth, level in enumerate(self.levels):
            if depth == 0:
                for token in level:
                    above.append(builder.add(above[-1], token, _WINDOW_NODE))
            else:
                above = [
                    builder.add(parent, token, _WINDOW_NODE)
                    for parent, token in zip(above, level, strict=False)
                ]
        warming_up_level_0 = len(self.levels) == 1 and not self.is_full
        self._heads = above[1:] if warming_up_level_0 else above

    def advance(
        self, root: int, picks: list[int], pool: NgramPool, with_tails: bool = True
    ) -> None:
        """Takes the target's picks at the heads: a new level, and W n-grams once it is full."""
        if not self.levels:
            return
        new = [picks[node] for node in self._heads]
        if not self.is_full:
            fresh = new if len(self.levels) == 1 else new[1:]
            self.levels = [level[1:] for level in self.levels] + [fresh]
            return
        keep = pool.add_with_tails if with_tails else pool.add
        for column, token in enumerate(new):
            key = root if column == 0 else self.levels[0][column - 1]
            gram = [*(level[column] for level in self.levels[1:]), token]
            keep(key, gram, _FROM_WINDOW)
        moved = [*self.levels[1:], new]
        self.levels = [moved[0][1:], *moved[1:]]


class LookaheadRow(DraftRow):
    """A row's window, drawn from its text, and its pool, which is filled from it."""

    drafter: Lookahead

    def __init__(self, text: list[int], drafter: Lookahead) -> None:
        super().__init__(text, drafter)
        shared = drafter.shared_pool
        self.pool = NgramPool(self.config.guesses) if shared is None else shared
        self.window = self._new_window()
        self._proposed = 0
        self._chain: list[int] = []  # next iterate of the Jacobi chain
        if self.config.pool_from_prompt:
            self.pool.add_text(text, self.config.ngram, origin=_FROM_TEXT)

    def _new_window(self) -> JacobiWindow:
        config = self.config
        return JacobiWindow(config.window, config.ngram, self.text, self.drafter.generator)

    def propose(self, budget: int) -> TokenTree:
        """Guesses first, as a trie; then the window, shrunk to what the budget leaves."""
        if self.drafter.chains_only:
            return self._propose_chain(budget)
        if self.window.width < self.config.window and budget >= self.config.nodes:
            self.window = self._new_window()
        window = self.window
        window.shrink(budget)
        builder = TreeBuilder(self.text[-1])
        self._add_guesses(builder, budget + 1 - window.node_count())
        window.grow(builder)
        self._proposed = len(builder)
        return builder.build()

    def _propose_chain(self, budget: int) -> TokenTree:
        """The longest guess of the pool, else the Jacobi chain."""
        builder = TreeBuilder(self.text[-1])
        self._add_guesses(builder, budget + 1)
        if len(builder) == 1:
            choice, missing = self.drafter.generator.choice, self.config.window - len(self._chain)
            fill = [choice(self.text) for _ in range(missing)]
            builder.add_path([*self._chain, *fill], _WINDOW_NODE, limit=budget + 1)
        return builder.build().deepest_path()

    def _add_guesses(self, builder: TreeBuilder, room: int) -> None:
        """Breadth first: all guesses below the root, then those below where they ended."""
        deepest = (2 if self.config.extend_guesses else 1) * (self.config.ngram - 1)
        open_ends, seen = deque([(0, builder.tokens[0], 0)]), {0}
        while open_ends:
            start, key, depth = open_ends.popleft()
            for gram, origin in self.pool.guesses(key):
                if depth + len(gram) > deepest:
                    continue
                end = builder.add_path(gram, origin, limit=room, start=start)
                if end is None:
                    return
                if end not in seen:
                    seen.add(end)
                    open_ends.append((end, gram[-1], depth + len(gram)))

    def observe(self, outcome: RowRound) -> None:
        """Advances the window by one level and collects the new n-grams."""
        pool, tree, harvest = self.pool, outcome.tree, self.config.harvest
        if outcome.picks is not None:
            if harvest:
                for token, pick in zip(tree.tokens, outcome.picks, strict=False):
                    pool.add(token, (pick,), _FROM_WINDOW)
            if self.drafter.chains_only:
                self._chain = outcome.picks[len(outcome.path) + 1 : len(tree)]
            elif len(tree) == self._proposed:  # near the length limit, trees are cut
                self.window.advance(tree.tokens[0], outcome.picks, pool, harvest)
        if self.config.pool_from_prompt:
            new_from = len(self.text) - len(outcome.tokens)
            pool.add_text(self.text, self.config.ngram, start=new_from, origin=_FROM_TEXT)


class Lookahead(RowDrafter):
    """W, N, G lookahead decoding."""

    Config, Row = LookaheadConfig, LookaheadRow
    needs = Needs(node_picks=True)
    source_names = ("window n-gram", "text n-gram", "window node")
    cpu_sizes: ClassVar[Mapping[str, Any]] = {"window": 3, "ngram": 3, "guesses": 3}
    priors: ClassVar[Sequence[tuple[Mapping[str, Any], float]]] = [
        ({"window": window, "ngram": ngram, "guesses": guesses}, tokens)
        for (window, ngram, guesses), tokens in _PRIORS.items()
    ]

    def __init__(self, config: LookaheadConfig) -> None:
        super().__init__(config)
        self.generator = random.Random(config.seed)
        self.shared_pool: NgramPool | None = None

    def start(self, state: BatchState) -> None:
        """Begins a call; a kept pool lives in the memory of the augmented model."""
        if self.config.keep_pool:
            self.shared_pool = state.memory.setdefault(
                f"lookahead.pool {self.config.guesses} {self.config.ngram}",
                NgramPool(self.config.guesses),
            )
        super().start(state)
