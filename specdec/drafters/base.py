"""The contract between the loop and a drafter, and `RowDrafter`, which makes simple ones simple.

A drafter can never change the text, only the speed (I5): whatever it proposes is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from specdec.errors import DrafterError
from specdec.tree import TokenTree, TreeBatch
from specdec.verify import HostVerdict, Verdict

Shape = Literal["tree", "chain", "any"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a drafter wants from the target; the loop computes just that, on the device.

    Attributes:
        taps: Layers whose output hidden states it reads, concatenated in this order. For the last
            layer Hugging Face models give the state after the final norm.
        node_picks: The target's greedy choice at every node.
        node_topk: How many top candidates at every node.
    """

    taps: tuple[int, ...] = ()
    node_picks: bool = False
    node_topk: int = 0


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a drafter may know of the target, and share with it, before any call.

    Attributes:
        config: The text model's configuration, as Hugging Face has it.
        embeddings: [V, H] input embeddings.
        output_embeddings: [V, H] output matrix, or None.
        device: Where the drafter's tensors belong.
        dtype: The target's own.
        memory: Survives from call to call on the same augmented model.
    """

    config: Any
    embeddings: Tensor
    output_embeddings: Tensor | None
    device: torch.device
    dtype: torch.dtype
    memory: dict[str, Any]


@dataclass(slots=True)
class BatchState:
    """Where the rows of a batch stand.

    Attributes:
        tokens: Per row, the known ids: prompt without padding, then the emitted tokens.
        prompt_lengths: Per row, how many of them are prompt.
        active: Which rows still generate.
        pending: [B] int64, the emitted token that is not yet in the target's cache.
        lengths: [B] int64, committed slots of the target's cache.
        vocab_size: Ids at or above it must not be proposed.
        max_new_tokens: Limit of the call, for sizing buffers.
        depth_limit: Levels below the root that the coming round may hold; nothing deeper could be
            emitted, or has a position.
        shape: Trees that the target can verify; "chain" where one path a row is all it takes.
        memory: Survives from call to call on the same augmented model; empty at first.
    """

    tokens: list[list[int]]
    prompt_lengths: list[int]
    active: list[bool]
    pending: Tensor
    lengths: Tensor
    vocab_size: int
    max_new_tokens: int
    depth_limit: int = 0
    shape: Shape = "any"
    memory: dict[str, Any] = field(default_factory=dict)

    def emitted(self, row: int) -> int:
        """Tokens emitted so far in `row`."""
        return len(self.tokens[row]) - self.prompt_lengths[row]

    def shown(self) -> BatchState:
        """A copy for a drafter: nothing that is done to it is done to the rows; `memory` is shared.

        It is kept level by `follow`.
        """
        return replace(
            self,
            tokens=[list(row) for row in self.tokens],
            prompt_lengths=list(self.prompt_lengths),
            active=list(self.active),
            pending=self.pending.clone(),
            lengths=self.lengths.clone(),
        )

    def follow(self, other: BatchState) -> None:
        """Takes over where the rows of `other` stand; only new tokens are copied."""
        for own, row in zip(self.tokens, other.tokens, strict=True):
            own.extend(row[len(own) :])
        self.active = list(other.active)
        self.pending, self.lengths = other.pending.clone(), other.lengths.clone()

    def advance(self, tokens: Sequence[Sequence[int]], pending: Tensor, lengths: Tensor) -> None:
        """Takes over a finished round: emitted tokens by row, new pending tokens, cache lengths."""
        for row, emitted in enumerate(tokens):
            self.tokens[row].extend(emitted)
        self.pending, self.lengths = pending, lengths


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """A target forward over a batch of trees, on the device.

    Attributes:
        logits: [B, T, V] in the model's dtype.
        features: [B, T, F] concatenated tapped hidden states, or None.
        hidden_states: Per layer [B, T, H], when the call returns them.
    """

    logits: Tensor
    features: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class RoundResult:
    """A finished round, after the stop rules.

    Attributes:
        trees: What was proposed.
        output: The target's answer.
        verdict: Acceptance on the device, before the stop rules.
        host: Acceptance on the host, cut by the stop rules; finished rows are empty.
        node_picks: [B, T] target's greedy choices, if needed.
        node_topk: [B, T, k] target's candidates, if needed.
    """

    trees: TreeBatch
    output: TargetOutput
    verdict: Verdict
    host: HostVerdict
    node_picks: Tensor | None = None
    node_topk: Tensor | None = None

    @property
    def rows(self) -> list[bool]:
        """Which rows took part: an active row emits at least one token."""
        return [bool(tokens) for tokens in self.host.tokens]


class Drafter(Protocol):
    """Proposes token trees for all rows of a batch.

    A drafter may also have a method `end(state)`; the loop calls it last, after an exception too.
    And it may have a method `meet(target: TargetFacts)`, called when a model is augmented and
    before every call, ahead of everything else: the place to load what depends on the target, and
    to refuse a target with a `ConfigError`. What it needs may depend on it.

    Attributes:
        needs: What it reads from the target.
        host_needs: Whether node picks and top-k should also come in the round's host copy.
        shape: Trees it proposes: "any" ones look at `BatchState.shape` and keep to chains where the
            target takes nothing else; "tree" ones cannot run on such a target.
        source_names: Names of the values in `TreeBatch.sources`.
        max_nodes: Nodes beyond the root it would like to have verified.

    A class that samples its drafts, and puts their law into `TreeBatch.draft_law`, says so with an
    attribute `sampling_option`: the name of the switch among the method's options that makes it do
    so. Without the attribute, or with the switch off, a law is not looked at, because sampled
    drafts keep the law of the text but not the text that the seed gives.
    """

    needs: Needs
    host_needs: bool
    shape: Shape
    source_names: tuple[str, ...]
    max_nodes: int

    def start(self, state: BatchState) -> None:
        """Begins a call, before the prefill: the prompt is known."""
        ...

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        """Sees a part of the prompt; without padding, so rows that differ come in several calls.

        Args:
            rows: Batch rows of this part.
            token_ids: [rows, n] int64.
            features: [rows, n, F], or None without taps.
            offset: Position of the first token; > 0 at once when a cache was adopted.
        """
        ...

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """Trees with at most `budget` nodes below the root, none deeper than the depth limit.

        A budget of 0 is allowed. Deeper trees are replaced by their roots. On a target that takes
        only chains, the nodes of a row are verified as one path, in their order.
        """
        ...

    def observe(self, round_result: RoundResult) -> None:
        """Learns from a finished round."""
        ...


class TargetModel(Protocol):
    """A model behind a KV cache that token trees can be written into.

    Attributes:
        allowed_shape: Trees it can verify.
        lengths: [B] int64 committed slots of each row.
        prefill_forwards: Forwards that `prefill` ran.
        refeed: Tokens that the next forward has to run again besides its trees, in the longest row;
            a round's budget pays for them.
    """

    allowed_shape: Shape
    prefill_forwards: int

    @property
    def refeed(self) -> int:
        """Accepted tokens that the state does not hold yet; 0 where accepted slots are kept."""
        ...

    @property
    def lengths(self) -> Tensor:
        """[B] int64 committed slots of each row, on the device."""
        ...

    def depth_limit(self) -> int:
        """Levels below the root for which every row still has a position."""
        ...

    def prefill(self, drafter: Drafter) -> TargetOutput:
        """Runs the prompt, shows it to `drafter`; logits [B, 1, V] of the last tokens only."""
        ...

    def forward_tree(self, trees: TreeBatch) -> TargetOutput:
        """One forward over all nodes; writes provisional cache slots."""
        ...

    def commit(self, path: Tensor, accepted: Sequence[Sequence[int]], rows: Sequence[bool]) -> None:
        """Keeps root and accepted nodes of the active rows (I1), drops the others."""
        ...

    def rollback(self) -> None:
        """Drops provisional slots; the cache stands at the last commit (I7)."""
        ...


class BudgetPolicy(Protocol):
    """Decides how many nodes a round may verify."""

    def nodes(self, state: BatchState) -> int:
        """Nodes beyond the root for the coming round; 0 means no speculation."""
        ...


@dataclass(frozen=True, slots=True)
class FixedBudget:
    """The same number of nodes every round."""

    size: int

    def nodes(self, state: BatchState) -> int:
        """`size`."""
        return self.size


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
