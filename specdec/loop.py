"""The main loop: propose a tree, verify it in one target forward, commit what was accepted.

Knows nothing about transformers, tokenizers or particular drafters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from specdec.drafters.base import (
    BatchState,
    BudgetPolicy,
    Drafter,
    RoundResult,
    TargetModel,
    TargetOutput,
)
from specdec.sampling import StopCheck, TokenPicker, kept_generators
from specdec.sealed import sealed
from specdec.stats import GenerationStats, RoundRecord
from specdec.tree import TreeBatch
from specdec.verify import CopyCounter, HostVerdict, verify


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
        state: The rows.
        picker: Chooses the target's tokens.
        stops: Ends rows.
        budget: Nodes a round may verify.
        stats: Filled in by the loop.
        observers: Told about every round.
        show_trees: Whether records carry the proposed trees (costs host copies).
        sampled_drafts: Whether a `draft_law` counts: the method samples its drafts, and was told to
            (`Registry.samples_drafts`).
    """

    state: BatchState
    picker: TokenPicker
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
    state = call.state
    state.shape = target.allowed_shape
    seen = state.shown()
    try:
        with kept_generators(state.pending.device):
            drafter.start(seen)
        _prefill(target, drafter, call, seen)
        while any(state.active):
            clock = _Clock()
            trees = _propose(target, drafter, call, seen)
            clock.lap("draft")
            output = target.forward_tree(trees)
            clock.lap("forward")
            result = _decide(drafter, call, trees, output)
            clock.lap("verify")
            target.commit(result.verdict.path, result.host.paths, result.rows)
            state.advance(result.host.tokens, result.verdict.pending(), target.lengths)
            seen.follow(state)
            clock.lap("commit")
            with kept_generators(state.pending.device):
                drafter.observe(result)
            clock.lap("observe")
            record = _record(call, result, call.stats.rounds + 1, clock.seconds)
            call.stats.add_round(record, result.host, drafter.source_names)
            _report(call, result, record)
    except BaseException:
        target.rollback()
        raise
    finally:
        call.picker.finish(max(map(state.emitted, range(len(state.tokens)))))
        if hasattr(drafter, "end"):  # a drafter that is no RowDrafter need not have it
            with kept_generators(state.pending.device):
                drafter.end(seen)


def _prefill(target: TargetModel, drafter: Drafter, call: Call, seen: BatchState) -> None:
    """Round 0: the last prompt token is a tree of its own, already in the cache."""
    with kept_generators(call.state.pending.device):
        output = target.prefill(drafter)
    result = _decide(drafter, call, TreeBatch.roots(call.state.pending), output)
    call.state.advance(result.host.tokens, result.verdict.pending(), target.lengths)
    seen.follow(call.state)
    call.stats.add_prefill(result.host, target.prefill_forwards)
    _report(call, result, _record(call, result, 0, {}))


def _propose(target: TargetModel, drafter: Drafter, call: Call, seen: BatchState) -> TreeBatch:
    """The drafter's trees, or bare roots where they reach beyond the last position."""
    state = call.state
    state.depth_limit = seen.depth_limit = target.depth_limit()
    budget = call.budget.nodes(state) if state.depth_limit > 0 else 0
    if target.refeed:  # never more than the method's own size, or re-feeding would grow with it
        budget = max(min(budget, drafter.max_nodes) - target.refeed, 0)
    with kept_generators(state.pending.device):
        proposed = drafter.propose(seen, budget)
    trees = sealed(
        proposed,
        state.pending,
        state.vocab_size,
        chain=state.shape == "chain",
        sampled=call.sampled_drafts,
        whose=type(drafter).__name__,
    )
    fits = trees.size > 1 and 0 < state.depth_limit >= trees.max_depth
    return trees if fits else TreeBatch.roots(state.pending)


def _decide(drafter: Drafter, call: Call, trees: TreeBatch, output: TargetOutput) -> RoundResult:
    """Picks, walks, makes the round's one host copy, and cuts it by the stop rules (I3)."""
    needs, state = drafter.needs, call.state
    picks = call.picker.picks(trees, output.logits, state, call.stops)
    verdict = verify(trees, picks)
    node_picks = None
    if needs.node_picks:
        node_picks = picks if call.picker.picks_are_argmax else output.logits.float().argmax(-1)
        node_picks = node_picks.to(picks.device)
    node_topk = None
    if needs.node_topk:
        node_topk = output.logits.topk(needs.node_topk, -1).indices.to(picks.device)
    extras = (node_picks, node_topk) if drafter.host_needs else (None, None)
    counter = CopyCounter()
    host = call.stops.cut(verdict.host(trees, *extras, counter=counter), state)
    call.stats.device_to_host_copies += counter.copies
    return RoundResult(trees, output, verdict, host, node_picks, node_topk)


def _record(call: Call, result: RoundResult, index: int, seconds: dict[str, float]) -> RoundRecord:
    return RoundRecord(
        index=index,
        nodes=result.trees.size,
        tokens=result.host.tokens,
        paths=result.host.paths,
        seconds=seconds,
        trees=result.trees.to_rows() if call.show_trees else None,
    )


def _report(call: Call, result: RoundResult, record: RoundRecord) -> None:
    for observer in call.observers:
        observer(result, record)
    state = call.state
    call.picker.release([state.emitted(row) for row, on in enumerate(state.active) if on])


class _Clock:
    """Adds the host seconds between laps to a dictionary."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, stage: str) -> None:
        now = perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
