"""Rounds of drafters that look at nothing but the text: replayed on plain's text, without a model.

Exact: what such a drafter proposes depends on the text so far, which is plain's text always.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from specdec.contracts import BatchState, RoundResult, TargetOutput
from specdec.registry import methods
from specdec.round.pickers import Picks
from specdec.round.tree import TokenTree, TreeBatch
from specdec.round.verify import HostVerdict, Verdict
from specdec_bench.contracts import Unit
from specdec_bench.tune.grid import Candidate
from specdec_bench.tune.measured import Rounds

TEXT_ONLY = ("prompt_lookup", "suffix")
"""Methods that this serves."""

_DEEP = 1 << 20


def replay(candidate: Candidate, unit: Unit, vocab_size: int) -> Rounds:
    """The rounds of one unit, with the seconds that the drafter took on this host."""
    drafter = methods.create(candidate.method, candidate.mapping)
    state = forced_state(unit, vocab_size)
    state.depth_limit = _DEEP
    found, texts = Rounds(), unit.text_ids
    drafter.start(state)
    advance(state, [[row[0]] for row in texts])
    while any(state.active):
        begin = time.perf_counter()
        trees = drafter.propose(state, drafter.max_nodes)
        drafted = time.perf_counter()
        rows = trees.to_rows()
        paths = [walk(tree, text[state.emitted(row) :]) if on else []
                 for row, (tree, text, on) in enumerate(zip(rows, texts, state.active, strict=True))
                 ]  # fmt: skip
        host = emit(state, texts, paths)
        nothing = torch.empty(0)
        output, picks = TargetOutput(nothing), Picks(nothing)
        result = RoundResult(trees, output, picks, no_verdict(len(rows)), host)
        before = time.perf_counter()
        advance(state, host.tokens)
        drafter.observe(result)
        seconds = {"draft": drafted - begin, "observe": time.perf_counter() - before}
        note(found, trees.size, host, seconds)
        close(state, texts)
    drafter_end = getattr(drafter, "end", None)
    if drafter_end is not None:
        drafter_end(state)
    return found


def forced_state(unit: Unit, vocab_size: int) -> BatchState:
    """Rows at the start of a call."""
    prompts = [list(prompt) for prompt in unit.prompt_ids]
    device = unit.input_ids.device
    last = torch.tensor([prompt[-1] for prompt in prompts], device=device)
    return BatchState(
        tokens=prompts,
        prompt_lengths=[len(prompt) for prompt in prompts],
        active=[True] * len(prompts),
        pending=last,
        lengths=torch.tensor([len(prompt) for prompt in prompts], device=device),
        vocab_size=vocab_size,
        max_new_tokens=unit.record.new_tokens,
    )


def walk(tree: TokenTree, text: Sequence[int]) -> list[int]:
    """Nodes of the tree along the text; one token of it is left for the target to add."""
    children = {(tree.parents[node], tree.tokens[node]): node
                for node in range(len(tree) - 1, 0, -1)}  # fmt: skip
    path: list[int] = []
    node = 0
    for token in text[:-1]:
        child = children.get((node, token))
        if child is None:
            break
        path.append(child)
        node = child
    return path


def emit(
    state: BatchState, texts: Sequence[Sequence[int]], paths: Sequence[list[int]]
) -> HostVerdict:
    """What the rows emit when these paths are accepted."""
    tokens = [
        list(text[state.emitted(row) :][: len(path) + 1]) if state.active[row] else []
        for row, (text, path) in enumerate(zip(texts, paths, strict=True))
    ]
    return HostVerdict(list(paths), tokens, drafted=[0] * len(paths))


def advance(state: BatchState, tokens: list[list[int]]) -> None:
    """Takes the tokens over; ended rows keep their last one."""
    last = [emitted[-1] if emitted else state.tokens[row][-1]
            for row, emitted in enumerate(tokens)]  # fmt: skip
    pending = torch.tensor(last, device=state.pending.device)
    state.advance(tokens, pending, state.lengths)


def close(state: BatchState, texts: Sequence[Sequence[int]]) -> None:
    """Ends the rows whose text is complete."""
    for row, text in enumerate(texts):
        state.active[row] = state.emitted(row) < len(text)


def note(found: Rounds, size: int, host: HostVerdict, seconds: dict[str, float]) -> None:
    """Adds a round."""
    found.sizes.append(size)
    found.tokens += [len(row) for row in host.tokens if row]
    for stage, taken in seconds.items():
        found.stages.setdefault(stage, []).append(taken)


def no_verdict(rows: int) -> Verdict:
    """A verdict on the device that nobody looks at."""
    empty = torch.empty(rows, 0, dtype=torch.int32)
    return Verdict(empty, torch.zeros(rows, dtype=torch.long), torch.zeros(rows, 1).long())


def roots(state: BatchState) -> TreeBatch:
    """Trees without a draft."""
    return TreeBatch.roots(state.pending)
