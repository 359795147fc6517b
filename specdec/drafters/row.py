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
        tree: What `propose_row` returned, cut to the budget.
        path: Accepted nodes.
        tokens: Emitted tokens; the last one is the next pending token.
        picks: Target's greedy choice at every node, when `needs.node_picks`.
        topk: Target's candidates at every node, when `needs.node_topk`.
    """

    tree: TokenTree
    path: list[int]
    tokens: list[int]
    picks: list[int] | None
    topk: list[list[int]] | None


class RowDrafter:
    """Base of drafters that think in one row of host integers.

    Subclasses override `propose_row`, and `start_row` and `observe_row` where they keep state; this
    class batches the trees and uploads them once. Where the target takes only chains, it keeps the
    deepest path of every tree; a drafter that can do better then looks at `chains_only`.
    """

    needs: Needs = Needs()
    host_needs: bool = True
    shape: Shape = "any"
    source_names: tuple[str, ...] = ("draft",)
    max_nodes: int = 16
    Config: ClassVar[type]

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.chains_only = False
        self._trees: list[TokenTree] = []
        self._started = False
        self._histories: list[list[int]] = []

    def start_row(self, row: int, prompt: list[int]) -> None:
        """Begins a row; `prompt` ends with the first emitted token, which is pending."""

    def propose_row(self, row: int, history: list[int], budget: int) -> TokenTree:
        """The row's tree: `history[-1]` is its root, `budget` the nodes allowed below it."""
        raise NotImplementedError

    def observe_row(self, row: int, outcome: RowRound) -> None:
        """Learns from the row's finished round."""

    def start(self, state: BatchState) -> None:
        """Begins a call; the rows begin with their first round, when a token is pending."""
        self._started = False
        self.chains_only = state.shape == "chain"

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        """Nothing: rows learn their prompt in `start_row`."""

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """Builds the rows' trees and uploads them in one copy."""
        if not self._started:
            # Copies, for a drafter may do with them what it likes and never change the text.
            self._histories = [list(tokens) for tokens in state.tokens]
            for row, tokens in enumerate(state.tokens):
                self.start_row(row, list(tokens))
            self._started = True
        self._trees = [
            self._row_tree(row, state, budget)
            if state.active[row]
            else TokenTree([history[-1]], [-1])
            for row, history in enumerate(state.tokens)
        ]
        if all(len(tree) == 1 for tree in self._trees):
            return TreeBatch.roots(state.pending)
        on_cpu = state.pending.device.type == "cpu"  # no kernels or graphs to keep shapes for
        return TreeBatch.from_rows(self._trees, state.pending.device, bucket=not on_cpu)

    def _row_tree(self, row: int, state: BatchState, budget: int) -> TokenTree:
        """The row's proposal, cut to what may be verified."""
        pending = state.tokens[row][-1]
        tree = self.propose_row(row, self._histories[row], budget)
        if not isinstance(tree, TokenTree) or tree.tokens[0] != pending:
            raise DrafterError(
                f"{type(self).__name__}.propose_row must return a TokenTree rooted at the pending "
                f"token {pending}, got {tree!r:.80}; start the tree with history[-1]"
            )
        remaining = state.max_new_tokens - state.emitted(row) - 1
        depth = min(state.depth_limit, remaining)
        if state.shape == "chain":
            tree = tree.deepest_path()
        return tree.limited(budget + 1, depth, state.vocab_size)

    def observe(self, round_result: RoundResult) -> None:
        """Hands each active row its outcome."""
        host = round_result.host
        for row, tree in enumerate(self._trees):
            if host.tokens[row]:
                self._histories[row].extend(host.tokens[row])
                picks = host.node_picks[row] if host.node_picks is not None else None
                topk = host.node_topk[row] if host.node_topk is not None else None
                outcome = RowRound(tree, host.paths[row], host.tokens[row], picks, topk)
                self.observe_row(row, outcome)

    def end(self, state: BatchState) -> None:
        """Ends a call, whether it went well or not: the place to keep what rows have learnt."""
