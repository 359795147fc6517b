"""The main loop: propose a tree, verify it in one target forward, commit what was accepted.

Knows nothing about transformers, tokenizers or particular drafters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from specdec.contracts import (
    BatchState,
    BudgetPolicy,
    Drafter,
    RoundResult,
    TargetModel,
    TargetOutput,
)
from specdec.round.noise import kept_generators
from specdec.round.pickers import Picker, StopCheck
from specdec.round.sealed import sealed
from specdec.round.tree import TreeBatch
from specdec.round.verify import CopyCounter, HostVerdict, verify
from specdec.stats import GenerationStats, RoundRecord, timed


class StopRules(StopCheck, Protocol):
    """Ends rows; consulted before anything is committed, streamed or counted (I3)."""

    def cut(self, verdict: HostVerdict, state: BatchState) -> HostVerdict:
        """The verdict up to each row's last token; marks finished rows inactive."""
        ...


Observer = Callable[[RoundResult, RoundRecord], None]
"""Called after every round, prefill included (as round 0): streamer, recorder, trace."""


@dataclass(slots=True)
class Call:
    """Everything one call needs besides target and drafter.

    Attributes:
        state: Progress of all rows, which the loop advances.
        picker: Chooses the target's tokens.
        stops: Rules that cut every round before it is committed.
        budget: Nodes a round may verify.
        stats: Filled in by the loop.
        observers: Told about every round.
        show_trees: Whether records carry the proposed trees (costs host copies).
        sampled_drafts: Whether a `draft_law` counts: the method samples its drafts, and was told to
            (`Registry.samples_drafts`).
    """

    state: BatchState
    picker: Picker
    stops: StopRules
    budget: BudgetPolicy
    stats: GenerationStats
    observers: Sequence[Observer] = ()
    show_trees: bool = False
    sampled_drafts: bool = False


def speculative_generate(target: TargetModel, drafter: Drafter, call: Call) -> None:
    """Generates until every row has ended; the tokens are left in `call.state`.

    Raises whatever target, drafter, processors or observers raise; the target then stands at its
    last commit (I7) and the generator where plain `generate` would be after the same tokens.

    The drafter sees a copy of the state, and a generator that it moves is put back (I5).
    """
    with _Rounds(target, drafter, call) as rounds:
        rounds.prefill()
        while any(call.state.active):
            trees = rounds.propose()
            output = rounds.forward(trees)
            result = rounds.decide(trees, output)
            rounds.commit(result)
            rounds.observe(result)
            rounds.report(result)


class _Rounds:
    """The steps of a round, on one target with one drafter."""

    def __init__(self, target: TargetModel, drafter: Drafter, call: Call) -> None:
        self.target, self.drafter, self.call, self.state = target, drafter, call, call.state
        self.state.shape = target.allowed_shape
        self.seen = self.state.shown()
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> _Rounds:
        try:
            with kept_generators(self.state.pending.device):
                self.drafter.start(self.seen)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        state = self.state
        try:
            if failed:
                self.target.rollback()
        finally:
            self.call.picker.finish(max(map(state.emitted, range(len(state.tokens)))))
            if hasattr(self.drafter, "end"):  # a drafter that is no RowDrafter need not have it
                with kept_generators(state.pending.device):
                    self.drafter.end(self.seen)

    def prefill(self) -> None:
        """Round 0: the last prompt token is a tree of its own, already in the cache."""
        call, state = self.call, self.state
        with kept_generators(state.pending.device):
            output = self.target.prefill(self.drafter.observe_prefill)
        result = self.decide(TreeBatch.roots(state.pending), output)
        self._advance(result)
        call.stats.add_prefill(result.host, self.target.prefill_forwards)
        self.seconds.clear()
        self._tell(result, 0)

    @timed("draft")
    def propose(self) -> TreeBatch:
        """The drafter's trees, or bare roots where they reach beyond the last position."""
        state, call, target = self.state, self.call, self.target
        state.depth_limit = self.seen.depth_limit = target.depth_limit()
        budget = call.budget.nodes(state) if state.depth_limit > 0 else 0
        if target.refeed:  # never more than the method's own size, or re-feeding would grow with it
            budget = max(min(budget, self.drafter.max_nodes) - target.refeed, 0)
        with kept_generators(state.pending.device):
            proposed = self.drafter.propose(self.seen, budget)
        trees = sealed(
            proposed,
            state.pending,
            state.vocab_size,
            chain=state.shape == "chain",
            sampled=call.sampled_drafts,
            whose=type(self.drafter).__name__,
        )
        fits = trees.size > 1 and 0 < state.depth_limit >= trees.max_depth
        return trees if fits else TreeBatch.roots(state.pending)

    @timed("forward")
    def forward(self, trees: TreeBatch) -> TargetOutput:
        """The target's answer at every node."""
        return self.target.forward_tree(trees)

    @timed("verify")
    def decide(self, trees: TreeBatch, output: TargetOutput) -> RoundResult:
        """Picks, walks, makes the round's one host copy, and cuts it by the stop rules (I3)."""
        call, needs = self.call, self.drafter.needs
        picks = call.picker.picks(trees, output.logits, self.state, call.stops)
        verdict = verify(trees, picks.ids)
        node_picks = None
        if needs.node_picks:
            greedy = picks.ids if call.picker.are_argmax else output.logits.float().argmax(-1)
            node_picks = greedy.to(picks.ids.device)
        node_topk = None
        if needs.node_topk:
            node_topk = output.logits.topk(needs.node_topk, -1).indices.to(picks.ids.device)
        extras = (node_picks, node_topk) if self.drafter.host_needs else (None, None)
        counter = CopyCounter()
        host = call.stops.cut(verdict.host(trees, *extras, counter=counter), self.state)
        call.stats.device_to_host_copies += counter.copies
        return RoundResult(trees, output, picks, verdict, host, node_picks, node_topk)

    @timed("commit")
    def commit(self, result: RoundResult) -> None:
        """Keeps what was accepted, in the cache and in the text."""
        self.target.commit(result.verdict.path, result.host.paths, result.rows)
        self._advance(result)

    @timed("observe")
    def observe(self, result: RoundResult) -> None:
        """Lets the drafter learn."""
        with kept_generators(self.state.pending.device):
            self.drafter.observe(result)

    def report(self, result: RoundResult) -> None:
        """Counts the round, lets the budget learn from it, and tells whoever watches."""
        self._tell(result, self.call.stats.rounds + 1)

    def _advance(self, result: RoundResult) -> None:
        pending, lengths = result.verdict.pending(), self.target.lengths
        self.state.advance(result.host.tokens, pending, lengths)
        self.seen.follow(self.state)

    def _tell(self, result: RoundResult, index: int) -> None:
        call, host = self.call, result.host
        trees = result.trees.to_rows() if call.show_trees else None
        seconds, self.seconds = self.seconds, {}
        record = RoundRecord(index, result.trees.size, host.tokens, host.paths, seconds, trees)
        if index:
            call.stats.add_round(record, host, self.drafter.source_names)
            call.budget.observe(record)
        for observer in call.observers:
            observer(result, record)
        going = [self.state.emitted(row) for row, on in enumerate(self.state.active) if on]
        call.picker.release(going)
