"""Jacobi decoding (Santilli et al., arXiv 2305.10427): a block of guesses, refined round by round.

The block hangs below the pending token as a chain. Every round the target's picks along it become
the next block, moved on by the tokens that were emitted: a fixed-point iteration whose fixed point
is the greedy text. Models trained for it get many tokens right at once (Consistency LLMs, arXiv
2403.00835); ordinary ones hardly any. So rejected guesses are recycled, as Jacobi Forcing does:
wherever the target agreed with a guess it was shown, the run of its picks is kept as an n-gram, and
n-grams that begin with the pending token are verified as further branches.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Annotated

from specdec.contracts import BatchState, Needs
from specdec.drafters.row import DraftRow, RowDrafter, RowRound
from specdec.errors import ConfigError
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TokenTree, TreeBuilder
from specdec.sources.ngram_pool import NgramPool

_FIXED_POINT, _FILL, _RECYCLED = 0, 1, 2


@dataclass(frozen=True)
class JacobiConfig(MethodOptions):
    """Options of `jacobi`."""

    block: Annotated[int, Range(1, MAX_NODES, tries=(1, 2, 3, 5, 8, 16, 32))] = 16
    """Guessed tokens of the chain; models trained for Jacobi decoding take longer ones."""
    recycle: Annotated[int, Range(0, MAX_NODES, tries=(0, 2, 4))] = 4
    """n-grams kept for a token and verified as branches; 0 for the chain alone."""
    ngram: Annotated[int, Range(2, MAX_NODES, tries=(3, 4, 8))] = 8
    """Most tokens of a recycled n-gram, its first one included."""
    seed: int = 0
    """Seed of the guesses that fill the block; independent of torch's generators."""

    def check(self) -> None:
        """A step is no larger than a round may be."""
        if self.nodes > MAX_NODES:
            raise ConfigError(
                f"jacobi verifies at most {MAX_NODES} nodes, block + recycle * (ngram - 1), got "
                f"block={self.block}, recycle={self.recycle}, ngram={self.ngram}"
            )

    @property
    def nodes(self) -> int:
        """Nodes of a full step below the root."""
        return self.block + self.recycle * (self.ngram - 1)


class JacobiRow(DraftRow):
    """A row's block, all fresh guesses at first, and its n-grams, those of the prompt at first.

    Attributes:
        pool: Recycled n-grams and those of the text, or None when they are switched off.
        guesses: The target's picks for the tokens after the pending one.
        length: Length of the block that was last proposed.
    """

    drafter: Jacobi

    def __init__(self, text: list[int], drafter: Jacobi) -> None:
        super().__init__(text, drafter)
        self.guesses: list[int] = []
        self.length = 0
        self.pool = NgramPool(self.config.recycle) if self.config.recycle else None
        if self.pool is not None:
            self.pool.add_text(text, self.config.ngram)

    def propose(self, budget: int) -> TokenTree:
        """The block first, then recycled n-grams; a smaller budget shrinks both alike."""
        config, chains_only = self.config, self.drafter.chains_only
        share = budget if chains_only else -(-budget * config.block // config.nodes)
        builder = TreeBuilder(self.text[-1])
        self.length = min(config.block, share)
        if chains_only and self.pool is not None:
            self._add_newest(builder, self.pool)
        self._add_block(builder)
        if not chains_only and self.pool is not None:
            self._add_recycled(builder, self.pool, min(budget, config.nodes) + 1)
        return builder.build()

    def _add_newest(self, builder: TreeBuilder, pool: NgramPool) -> None:
        """Where only a chain can be verified, what the pool knows goes before the guesses."""
        node: int | None = 0
        while node is not None and len(builder) <= self.length:
            found = pool.guesses(builder.tokens[node])
            if not found:
                return
            node = builder.add_path(found[0][0], _RECYCLED, limit=self.length + 1, start=node)

    def _add_block(self, builder: TreeBuilder) -> None:
        """The guesses that go on, then tokens drawn from the text up to the block's length."""
        for depth in range(len(builder), self.length + 1):
            refined = depth <= len(self.guesses)
            token = self.guesses[depth - 1] if refined else self._fresh_guess(builder)
            builder.add(depth - 1, token, _FIXED_POINT if refined else _FILL)

    def _fresh_guess(self, builder: TreeBuilder) -> int:
        """A token of the row's text; the pending one where the model cannot take that."""
        token = self.drafter.generator.choice(self.text)
        return token if 0 <= token < self.drafter.vocab_size else builder.tokens[0]

    def _add_recycled(self, builder: TreeBuilder, pool: NgramPool, limit: int) -> None:
        """Breadth first: n-grams below the root, then those below where they ended."""
        open_ends, seen = deque([(0, 0)]), {0}
        while open_ends:
            start, depth = open_ends.popleft()
            for gram, _ in pool.guesses(builder.tokens[start]):
                if depth + len(gram) > 2 * (self.config.ngram - 1):
                    continue
                end = builder.add_path(gram, _RECYCLED, limit=limit, start=start)
                if end is None:
                    return
                if end not in seen:
                    seen.add(end)
                    open_ends.append((end, depth + len(gram)))

    def observe(self, outcome: RowRound) -> None:
        """The picks after the accepted nodes are the next guesses."""
        picks = outcome.picks
        if picks is None:
            return
        end = min(self.length, len(outcome.tree) - 1)  # near the length limit, trees are cut
        self.guesses = picks[len(outcome.path) + 1 : end + 1]
        if self.pool is not None:
            recycle(outcome.tree, picks, self.pool, self.config.ngram)
            new_from = len(self.text) - len(outcome.tokens)
            self.pool.add_text(self.text, self.config.ngram, start=new_from)


class Jacobi(RowDrafter):
    """Fixed-point block decoding; sources are refined guesses, fresh ones, and recycled n-grams."""

    Config, Row = JacobiConfig, JacobiRow
    needs = Needs(node_picks=True)
    source_names = ("fixed point", "fill", "recycled")

    def __init__(self, config: JacobiConfig) -> None:
        super().__init__(config)
        self.generator = random.Random(config.seed)
        self.vocab_size = 0

    def start(self, state: BatchState) -> None:
        """Begins a call."""
        super().start(state)
        self.vocab_size = state.vocab_size


def recycle(tree: TokenTree, picks: list[int], pool: NgramPool, ngram: int) -> None:
    """Stores, for every node, how the target went on from there, as far as the tree shows it.

    Args:
        tree: A verified tree.
        picks: The target's choice at every node.
        pool: Takes n-grams of two to `ngram` tokens; those of nodes near the root are the newest.
        ngram: Most tokens of an n-gram.
    """
    children = {(tree.parents[node], tree.tokens[node]): node for node in range(1, len(tree))}
    for node in reversed(range(len(tree))):
        run: list[int] = []
        at = node
        while len(run) < ngram - 1:
            run.append(picks[at])
            if (at, picks[at]) not in children:
                break
            at = children[at, picks[at]]
        pool.add(tree.tokens[node], run)
