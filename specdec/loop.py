"""The main loop: propose a tree, verify it in one target forward, commit what was accepted.

Knows nothing about transformers, tokenizers or particular drafters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from torch import Tensor

from specdec.drafters.base import (
    BatchState,
    BudgetPolicy,
    Drafter,
    RoundResult,
    TargetModel,
    TargetOutput,
)
from specdec.sampling import StopCheck, TokenPicker
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
    """

    state: BatchState
    picker: TokenPicker
    stops: StopRules
    budget: BudgetPolicy
    stats: GenerationStats
    observers: Sequence[Observer] = ()
    show_trees: bool = False


def speculative_generate(target: TargetModel, drafter: Drafter, call: Call) -> None:
    """Generates until every row has ended; the tokens are left in `call.state`.

    Raises whatever target, drafter, processors or observers raise; the target then stands at its
    last commit (I7) and the generator where plain `generate` would be after the same tokens.
    """
    state = call.state
    try:
        output = target.prefill(drafter)
        call.stats.prefill_forwards = target.prefill_forwards
        _settle(target, drafter, call, TreeBatch.roots(state.pending), output, {})
        drafter.start(state)
        while any(state.active):
            clock = _Clock()
            trees = drafter.propose(state, call.budget.nodes(state))
            clock.lap("draft")
            output = target.forward_tree(trees)
            clock.lap("forward")
            _settle(target, drafter, call, trees, output, clock.seconds)
    except BaseException:
        target.rollback()
        raise
    finally:
        call.picker.finish(max(map(state.emitted, range(len(state.tokens)))))


def _settle(
    target: TargetModel,
    drafter: Drafter,
    call: Call,
    trees: TreeBatch,
    output: TargetOutput,
    seconds: dict[str, float],
) -> None:
    """Verifies, cuts, commits and reports one round; `seconds` is empty for the prefill."""
    state, prefill, clock = call.state, not seconds, _Clock(seconds)
    was_active = list(state.active)
    picks = call.picker.picks(trees, output.logits, state, call.stops)
    verdict = verify(trees, picks)
    node_picks, node_topk = (None, None) if prefill else _node_choices(drafter, output)
    counter = CopyCounter()
    uncut = verdict.host(
        trees,
        node_picks if drafter.host_needs else None,
        node_topk if drafter.host_needs else None,
        counter,
    )
    host = call.stops.cut(uncut, state)
    clock.lap("verify")
    if not prefill:
        target.commit(verdict.path, host.paths, was_active)
    for row, tokens in enumerate(host.tokens):
        state.tokens[row].extend(tokens)
    # Rows that have ended may hold -1; they still take part in the forward, so give them a token.
    state.pending = verdict.tokens.gather(1, verdict.length[:, None])[:, 0].clamp(min=0)
    state.lengths = target.lengths
    clock.lap("commit")
    result = RoundResult(trees, output, verdict, host, node_picks, node_topk)
    if not prefill:
        drafter.observe(result)
        clock.lap("observe")
    _report(call, drafter, result, seconds, prefill, counter.copies)
    call.picker.release([state.emitted(row) for row, on in enumerate(state.active) if on])


def _node_choices(drafter: Drafter, output: TargetOutput) -> tuple[Tensor | None, Tensor | None]:
    needs = drafter.needs
    picks = output.logits.argmax(-1) if needs.node_picks else None
    topk = output.logits.topk(needs.node_topk, -1).indices if needs.node_topk else None
    return picks, topk


def _report(
    call: Call,
    drafter: Drafter,
    result: RoundResult,
    seconds: dict[str, float],
    prefill: bool,
    copies: int,
) -> None:
    stats, host = call.stats, result.host
    record = RoundRecord(
        index=0 if prefill else stats.rounds + 1,
        nodes=result.trees.size,
        tokens=host.tokens,
        paths=host.paths,
        seconds=dict(seconds),
        trees=result.trees.to_rows() if call.show_trees else None,
    )
    if prefill:
        stats.new_tokens += sum(map(len, host.tokens))
        stats.tokens_by_source["target"] += stats.new_tokens
    else:
        stats.add_round(record, host, drafter.source_names)
    stats.device_to_host_copies += copies
    for observer in call.observers:
        observer(result, record)


class _Clock:
    """Adds the host seconds between laps to a dictionary."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = {} if seconds is None else seconds
        self._last = perf_counter()

    def lap(self, stage: str) -> None:
        now = perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
