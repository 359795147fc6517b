"""`RowDrafter`: the base of drafters that think in one row of host integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from specdec.contracts import BatchState, Needs, RoundResult, Shape
from specdec.errors import DrafterError
from specdec.round.tree import TokenTree, TreeBatch


@dataclass(frozen=True, slots=True)
class RowRound:
    """One row's finished round.

    Attributes:
        tree: What `Row.propose` returned, cut to the budget.
        path: Accepted nodes.
        tokens: Emitted tokens; the last one is the next pending token.
        picks: Target's greedy choice at every node, when `needs.node_picks`.
        topk: Target's candidates at every node, when `needs.node_topk`.
    """

    tree: TokenTree
    path: list[int]
    tokens: list[int]
    picks: list[int] | None = None
    topk: list[list[int]] | None = None


class DraftRow:
    """One row of a batch, and what a drafter knows of it; made when its first token is pending.

    Attributes:
        index: Its place in the batch.
        text: Prompt and output. The last token is pending, and so the root of the next tree.
        drafter: Whose row it is: for what rows share.
        config: The drafter's options.
    """

    def __init__(self, text: list[int], drafter: RowDrafter) -> None:
        self.index, self.text = len(drafter.rows), text
        self.drafter, self.config = drafter, drafter.config

    def propose(self, budget: int) -> TokenTree:
        """The row's tree: `text[-1]` is its root, `budget` the nodes allowed below it."""
        raise NotImplementedError

    def observe(self, outcome: RowRound) -> None:
        """Learns from the row's finished round, whose tokens are already in `text`."""

    def advance(self, outcome: RowRound) -> None:
        """Takes a finished round into the text, then `observe`s it."""
        self.text.extend(outcome.tokens)
        self.observe(outcome)


class RowDrafter:
    """Base of drafters that think in one row of host integers.

    A subclass names the class of its rows; this one batches their trees and uploads them once.
    Where the target takes only chains, it keeps the deepest path of every tree; a drafter that can
    do better then looks at `chains_only`.

    Attributes:
        Config: Dataclass of its options, where it has any.
        Row: Every row of a batch becomes one of these, made in order.
        size_option: Name of what its `Config` has for `max_nodes`.
        config: Its options.
        rows: Of the call; empty until its first round.
        chains_only: Whether the target takes one path a row.
    """

    needs: Needs = Needs()
    host_needs: bool = True
    shape: Shape = "any"
    source_names: tuple[str, ...] = ("draft",)
    max_nodes: int = 16
    size_option: ClassVar[str] = "nodes"
    Config: ClassVar[type]
    Row: ClassVar[type[DraftRow]] = DraftRow

    def __init__(self, config: Any = None) -> None:
        self.config = config
        size = getattr(config, self.size_option, None)
        if isinstance(size, int):  # an option of that name may mean something else
            self.max_nodes = size
        self.chains_only = False
        self.rows: list[DraftRow] = []
        self._trees: list[TokenTree] = []

    def start(self, state: BatchState) -> None:
        """Begins a call; the rows begin with their first round, when a token is pending."""
        self.rows = []
        self.chains_only = state.shape == "chain"

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        """Nothing: rows begin with their whole text."""

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """Builds the rows' trees and uploads them in one copy."""
        if not self.rows:
            for tokens in state.tokens:  # copies: a drafter may do with them what it likes
                self.rows.append(self.Row(list(tokens), self))
        self._trees = [
            self._tree(index, state, budget)
            if state.active[index]
            else TokenTree([tokens[-1]], [-1])
            for index, tokens in enumerate(state.tokens)
        ]
        if all(len(tree) == 1 for tree in self._trees):
            return TreeBatch.roots(state.pending)
        return TreeBatch.from_rows(self._trees, state.pending.device)

    def _tree(self, index: int, state: BatchState, budget: int) -> TokenTree:
        """The row's proposal, cut to what may be verified."""
        tree = rooted(self.rows[index], budget, state.tokens[index][-1])
        if state.shape == "chain":
            tree = tree.deepest_path()
        return tree.limited(budget + 1, state.room(index), state.vocab_size)

    def observe(self, round_result: RoundResult) -> None:
        """Hands each active row its outcome."""
        host = round_result.host
        for index, tree in enumerate(self._trees):
            if host.tokens[index]:
                picks = host.node_picks[index] if host.node_picks is not None else None
                topk = host.node_topk[index] if host.node_topk is not None else None
                path, tokens = list(host.paths[index]), list(host.tokens[index])
                self.rows[index].advance(RowRound(tree, path, tokens, picks, topk))

    def end(self, state: BatchState) -> None:
        """Ends a call, whether it went well or not: the place to keep what rows have learnt."""


def rooted(row: DraftRow, budget: int, pending: int) -> TokenTree:
    """What a row proposes; raises `DrafterError` unless it is a tree below the pending token."""
    tree = row.propose(budget)
    if not isinstance(tree, TokenTree) or tree.tokens[0] != pending:
        raise DrafterError(
            f"a row of {type(row.drafter).__name__} must propose a TokenTree rooted at the pending "
            f"token {pending}, got {tree!r:.80}; start the tree with text[-1]"
        )
    return tree
