"""The vocabulary of a round: what loop, target, drafter and budget say to each other.

A drafter can never change the text, only the speed (I5): whatever it proposes is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from specdec.round.pickers import Picks
from specdec.round.tree import TreeBatch
from specdec.round.verify import HostVerdict, Verdict
from specdec.stats import RoundRecord

Shape = Literal["tree", "chain", "any"]

ShowPrompt = Callable[[Sequence[int], Tensor, "Tensor | None", int], None]
"""Takes what `Drafter.observe_prefill` takes."""


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
        dtype: That the target computes in.
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

    def room(self, row: int) -> int:
        """Levels below its root that a tree of `row` can still use; 0 for one that has ended."""
        left = self.max_new_tokens - self.emitted(row) - 1
        return max(min(self.depth_limit, left), 0) if self.active[row] else 0

    def deepest_room(self) -> int:
        """The most levels that any row can still use."""
        return max(map(self.room, range(len(self.tokens))))

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
        picks: Its tokens, and the scores that they were picked by.
        verdict: Acceptance on the device, before the stop rules.
        host: Acceptance on the host, cut by the stop rules; finished rows are empty.
        node_picks: [B, T] target's greedy choices, if needed.
        node_topk: [B, T, k] target's candidates, if needed.
    """

    trees: TreeBatch
    output: TargetOutput
    picks: Picks
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

    What else callers may ask of a class, through `specdec.registry.methods`: `draft_kind`, for one
    with an option `draft`, is what that names (`specdec.artifacts.places.DRAFT_HEAD` or
    `DRAFT_MODEL`); `cpu_sizes` are options for where every node of a forward costs; `priors` says
    how many tokens a forward emits at some sizes, so that they can be chosen by what a node costs.
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

    def prefill(self, show: ShowPrompt | None = None) -> TargetOutput:
        """Runs the prompt; logits [B, 1, V] of the last tokens only.

        Args:
            show: Is shown the prompt, chunk by chunk, as `Drafter.observe_prefill` is.
        """
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
    """Decides how many nodes a round may verify, and learns from what that brought."""

    def nodes(self, state: BatchState) -> int:
        """Nodes beyond the root for the coming round; 0 means no speculation."""
        ...

    def observe(self, record: RoundRecord) -> None:
        """Learns from a finished round: nodes, emitted tokens, seconds by stage."""
        ...


@dataclass(frozen=True, slots=True)
class FixedBudget:
    """The same number of nodes every round."""

    size: int

    def nodes(self, state: BatchState) -> int:
        """`size`."""
        return self.size

    def observe(self, record: RoundRecord) -> None:
        """Learns nothing."""
