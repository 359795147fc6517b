"""Replays recorded answers through drafters: how many tokens a step would have emitted.

The recorded token is the target's choice. The drafter proposes what it would have proposed, the
proposal is walked along the answer, and the drafter sees the outcome, round by round, as in the
loop: the prefill emits the first token, every round the accepted drafts and one more. An answer's
length is taken as the limit of its call, so nothing is drafted beyond it. No model runs, so there
is no time to report; greedy text replays exactly, and so does sampled text, for what is sampled
does not depend on what was drafted.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.audit.loops import loop_start
from specdec.contracts import BatchState
from specdec.drafters.row import RowDrafter, RowRound, rooted
from specdec.registry import methods
from specdec.round.tree import TokenTree
from specdec.sources.suffix_store import SuffixStore
from specdec_bench.arm_names import ArmSpec
from specdec_bench.replay.encoding import Encoder
from specdec_bench.replay.methods import SPACE, create
from specdec_bench.replay.traces import Answer
from specdec_bench.summary.acceptance import Acceptance, Counts
from specdec_bench.summary.intervals import Ratio, mean_ratio_of_counts


@dataclass(frozen=True, slots=True)
class Encoded:
    """An answer as ids.

    Attributes:
        answer: Whose ids they are.
        prompt: Ids of all that was said before.
        tokens: Ids of the answer, cut where it begins to loop.
        looping: How many were cut off.
    """

    answer: Answer
    prompt: list[int]
    tokens: list[int]
    looping: int


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one method did with one answer.

    Attributes:
        answer: The answer.
        counts: What was counted.
    """

    answer: Answer
    counts: Counts


@dataclass(frozen=True)
class Figures:
    """One row of a table.

    Attributes:
        tau: Tokens a step with its interval over prompts.
        acceptance: Everything else.
    """

    tau: Ratio
    acceptance: Acceptance


def encode(answers: Sequence[Answer], encoder: Encoder, keep_loops: bool = False) -> list[Encoded]:
    """Ids of all answers; those of a single token have no round, and no prompt is empty."""
    found = []
    for answer in answers:
        prompt, tokens = encoder.arrange(answer.said), encoder.encode(answer.text)
        cut = None if keep_loops else loop_start(tokens)
        kept = tokens if cut is None else tokens[:cut]
        found.append(Encoded(answer, prompt, kept, len(tokens) - len(kept)))
    return found


def replay(
    answers: Sequence[Encoded],
    method: ArmSpec,
    encoder: Encoder,
    chains: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> list[Replayed]:
    """All answers through one method, each with a fresh drafter.

    Args:
        answers: Those of a single token are left out.
        method: The method.
        encoder: What made the ids.
        chains: One path a round instead of a tree.
        tick: Called after every answer.
    """
    found = []
    memory: dict[str, Any] = {}
    with _store(method, encoder) as store:
        # A store learns an answer when all answers to the same prompt are done.
        for group in _by_cluster(answers):
            for one in group:
                if len(one.tokens) > 1:
                    folder = None if store is None else store.folder
                    drafter = create(method, folder, encoder.fingerprint)
                    state = _state(one, encoder.size, chains, memory)
                    counts = walk(drafter, state, one.tokens, method.budget)
                    found.append(Replayed(one.answer, counts))
                tick()
            if store is not None:
                for one in group:
                    store.writer.add(one.tokens)
    return found


def walk(
    drafter: RowDrafter, state: BatchState, answer: Sequence[int], budget: int | None = None
) -> Counts:
    """One answer through one drafter.

    Args:
        drafter: Fresh.
        state: One row, holding the prompt.
        answer: What the target wrote, at least two tokens.
        budget: Nodes a round may hold; None for the drafter's own size.

    Raises:
        DrafterError: A tree does not begin with the pending token.
    """
    budget = drafter.max_nodes if budget is None else min(budget, drafter.max_nodes)
    drafter.start(state)
    row = drafter.Row([*state.tokens[0], answer[0]], drafter)
    drafter.rows.append(row)
    histogram: Counter[int] = Counter()
    drafted, chain, at, last = 0, True, 1, 0
    while at < len(answer):
        tree = rooted(row, budget, answer[at - 1])
        if state.shape == "chain":
            tree = tree.deepest_path()
        tree = tree.limited(budget + 1, len(answer) - at - 1, state.vocab_size)
        path = _accepted(tree, answer, at)
        last = len(path) + 1
        emitted = list(answer[at : at + last])
        chain = chain and all(parent == node - 1 for node, parent in enumerate(tree.parents))
        drafted += len(tree) - 1
        histogram[last] += 1
        at += last
        row.advance(RowRound(tree, path, emitted))
    state.tokens[0] += answer
    drafter.end(state)
    return Counts(histogram, drafted, chain, (last,))


def _accepted(tree: TokenTree, answer: Sequence[int], at: int) -> list[int]:
    """Nodes along the answer from its token `at` on."""
    path: list[int] = []
    for token in answer[at:]:
        child = tree.child(path[-1] if path else 0, token)
        if child is None:
            break
        path.append(child)
    return path


def figures(replayed: Sequence[Replayed]) -> Figures:
    """Acceptance over several answers, and tau with an interval clustered by prompt.

    Raises:
        SpecdecError: There is none.
    """
    acceptance = Acceptance.of_requests([one.counts for one in replayed])
    histograms = [one.counts.histogram for one in replayed]
    tokens = [sum(int(n) * times for n, times in found.items()) for found in histograms]
    rounds = [sum(found.values()) for found in histograms]
    clusters = [one.answer.cluster for one in replayed]
    strata = [one.answer.category for one in replayed]
    return Figures(mean_ratio_of_counts(tokens, rounds, clusters, strata), acceptance)


def by_category(replayed: Sequence[Replayed]) -> dict[str, list[Replayed]]:
    """The answers of each category, in the order in which categories appear."""
    found: dict[str, list[Replayed]] = {}
    for one in replayed:
        found.setdefault(one.answer.category, []).append(one)
    return found


def _state(one: Encoded, vocab_size: int, chains: bool, memory: dict[str, Any]) -> BatchState:
    return BatchState(
        tokens=[list(one.prompt)],
        prompt_lengths=[len(one.prompt)],
        active=[True],
        pending=torch.tensor([one.tokens[0]]),
        lengths=torch.tensor([len(one.prompt)]),
        vocab_size=vocab_size,
        max_new_tokens=len(one.tokens),
        depth_limit=len(one.tokens),
        shape="chain" if chains else "any",
        memory=memory,
    )


def _by_cluster(answers: Sequence[Encoded]) -> list[list[Encoded]]:
    groups: dict[str, list[Encoded]] = {}
    for one in answers:
        groups.setdefault(one.answer.cluster, []).append(one)
    return list(groups.values())


@dataclass(frozen=True)
class _Store:
    """A store that lasts as long as the replay, and what writes into it."""

    folder: Path
    writer: SuffixStore


@contextmanager
def _store(method: ArmSpec, encoder: Encoder) -> Iterator[_Store | None]:
    if not method.store:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        limit = methods.configure(method.method, method.options).store_tokens
        yield _Store(Path(folder), SuffixStore(folder, SPACE, encoder.fingerprint, limit))
