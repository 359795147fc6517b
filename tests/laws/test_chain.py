"""Chain mode between rounds: states that are put back, and tokens that are fed again unseen."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_cache import FAULTS, Boom, assert_generator_is_plains, breaking, fault
from torch import Tensor

import specdec
from helpers.chains import FEW, families, slowly
from helpers.drafters import THROW_AWAY
from helpers.families import CHAIN_FAMILIES, VOCAB
from helpers.laws import (
    GREEDY,
    NEW_TOKENS,
    SAMPLED,
    Case,
    Ledger,
    Mode,
    options_of,
    prompts,
    reference,
)
from helpers.spies import (
    LayerState,
    Seen,
    covered_tokens,
    layer_states,
    plain_states,
    relative_error,
    state_error,
    state_tolerance,
    watch_calls,
    watched_forwards,
)
from specdec import RowDrafter, SpecConfig, TokenTree
from specdec.api import capability
from specdec.contracts import BatchState, RoundResult
from specdec.drafters.row import DraftRow, RowRound
from specdec.registry import methods
from specdec.round.tree import TreeBatch
from specdec.stats import RoundRecord

pytestmark = [
    pytest.mark.usefixtures("throw_away_methods"),
    pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning"),
]

FOLDING = tuple(name for name in CHAIN_FAMILIES if name not in ("bloom", "mpt"))
BATCHES = (1, 4)


def ending(family: str, rows: int) -> Case:
    """A batch of which one row ends long before the others."""
    endless = Case(family, GREEDY, rows)
    if rows == 1:
        return endless
    tails = reference(endless)[0][:, -NEW_TOKENS:].tolist()

    def spread(token: int) -> int:
        ends = [tail.index(token) if token in tail else len(tail) for tail in tails]
        return max(ends) - min(ends)

    eos = max({token for tail in tails for token in tail}, key=spread)
    return Case(family, GREEDY.with_options(eos_token_id=eos), rows)


# I1 for chains


@pytest.mark.parametrize("method", ["oracle", "random_trees", slowly("lookahead")])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("family", families())
def test_the_state_is_that_of_plain_decoding(
    family: str, rows: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State length + tokens to be fed again = emitted - 1, and the state is plain's after them."""
    case = ending(family, rows)
    truth, plain = Case(family, GREEDY, rows).truth(), plain_states(case)
    assert differ_by_step(plain) > 1e-2
    errors: list[float] = []
    behind: list[list[int]] = []
    ended: list[bool] = []

    def watch(seen: Seen, result: RoundResult, record: RoundRecord) -> None:
        state = seen.call.state
        lengths = [len(text) - 1 for text in state.tokens]
        assert seen.target.lengths.tolist() == state.lengths.tolist() == lengths
        positions = getattr(case.model.config, "max_position_embeddings", None)
        if positions:
            assert seen.target.depth_limit() == positions - 1 - max(lengths)
        errors.append(state_error(seen, plain))
        covered = covered_tokens(seen)
        behind.append([state.emitted(row) - 1 - n for row, n in enumerate(covered)])
        going = [n for n, active in zip(behind[-1], state.active, strict=True) if active]
        assert seen.target.refeed == max(going, default=0)
        ended.append(not all(state.active))

    watch_calls(monkeypatch, watch)
    got, _, _ = case.speculate(method, truth)
    assert torch.equal(got, reference(case)[0])
    print(f"state error of {family}, {rows} rows, {method}: {max(errors):.1e}")
    assert max(errors) <= state_tolerance(case)
    assert min(map(min, behind)) >= 0
    assert len(errors) > 5
    if rows > 1:
        assert sum(ended) > 1
    if family in FOLDING:
        assert max(map(max, behind)) > 0, "nothing was ever put back"
    elif rows == 1:
        assert max(map(max, behind)) == 0, "slots can be cut, so nothing is fed again"


def differ_by_step(states: list[list[LayerState]]) -> float:
    """Smallest difference of two states that are a token apart: what the law must tell apart."""
    gaps = []
    for before, after in pairwise(states):
        parts = [
            relative_error(new.folded[name], old.folded[name])
            for old, new in zip(before, after, strict=True)
            for name in new.folded
        ]
        gaps.append(max(parts, default=1.0))
    return min(gaps)


# Re-fed tokens are fed, paid for, and seen by nobody


class OutOfStep(RowDrafter):
    """Row 0 is wrong at its last token, row 1 right, row 2 silent, row 3 wrong at once."""

    Config = THROW_AWAY["oracle"].Config
    max_nodes = 12

    class Row(DraftRow):
        def propose(self, budget: int) -> TokenTree:
            most = min(budget, self.drafter.max_nodes)
            ahead = list(self.config.truth[self.index][len(self.text) :][:most])
            kind = (self.index + self.config.seed) % 4
            wrong = {0: len(ahead) - 1, 3: 0}.get(kind, len(ahead))
            draft = [(token + (at >= wrong)) % VOCAB for at, token in enumerate(ahead)]
            return TokenTree.chain(self.text[-1], [] if kind == 2 else draft)


@pytest.fixture(scope="module", autouse=True)
def _out_of_step() -> Iterator[None]:
    methods.register("out_of_step", OutOfStep)
    yield
    methods.unregister("out_of_step")


class Feeds:
    """The ids of every forward of one speculative call, and what they have to be.

    Attributes:
        text: What the call returned.
        ids: Input ids of every forward, the prompt's first.
        wanted: For every round and row, the tokens that the state lacks and the draft.
        rounds: Results of the rounds, the prefill's first.
    """

    def __init__(
        self, case: Case, config: SpecConfig, monkeypatch: pytest.MonkeyPatch, **call: Any
    ) -> None:
        self.ids: list[list[list[int]]] = []
        self.wanted: list[list[list[int]]] = []
        self.rounds: list[RoundResult] = []
        self._covered: list[int] = []
        with monkeypatch.context() as patch, watched_forwards(case.model, self._forward):
            watch_calls(patch, self._round)
            self.text, _ = case.generate(specdec=config, **call)

    def _forward(self, kwargs: dict[str, Any], output: Any) -> None:
        self.ids.append(kwargs["input_ids"].tolist())

    def _round(self, seen: Seen, result: RoundResult, record: RoundRecord) -> None:
        texts = [list(text) for text in seen.texts()]
        before = [
            text[: len(text) - len(tokens)]
            for text, tokens in zip(texts, result.host.tokens, strict=True)
        ]
        if record.index:
            chains = result.trees.tokens.tolist()
            self.wanted.append([
                text[covered:-1] + chain
                for text, covered, chain in zip(before, self._covered, chains, strict=True)
            ])  # fmt: skip
        lengths = seen.call.state.prompt_lengths
        done = zip(covered_tokens(seen), lengths, strict=True)
        self._covered = [count + prompt for count, prompt in done]
        self.rounds.append(result)

    @property
    def widths(self) -> list[int]:
        """Tokens a row of every forward after the prompt."""
        return [len(ids[0]) for ids in self.ids[1:]]


@pytest.mark.parametrize("method", ["oracle", "random_trees", "out_of_step", slowly("lookahead")])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("family", [*FEW[:2], *map(slowly, FEW[2:])])
def test_a_forward_takes_what_is_missing_and_the_draft(
    family: str, rows: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row: the tokens that its state lacks, its chain, and filling that nobody looks at."""
    case, truth = ending(family, rows), Case(family, GREEDY, rows).truth()
    wanted_text = reference(case)[0]
    options = options_of(method, truth, case) or {"truth": truth}
    feeds = Feeds(case, SpecConfig(method, options), monkeypatch)
    assert torch.equal(feeds.text, wanted_text)
    stats = specdec.last_stats(case.model)
    assert len(feeds.ids) == stats.rounds + stats.prefill_forwards == len(feeds.wanted) + 1
    again = []
    for fed, wanted, result in zip(feeds.ids[1:], feeds.wanted, feeds.rounds[1:], strict=True):
        again.append(len(fed[0]) - result.trees.size)
        taking_part = [row for row, tokens in enumerate(result.host.tokens) if tokens]
        for row in taking_part:
            assert fed[row][: len(wanted[row])] == wanted[row]
        assert len(fed[0]) == max(len(wanted[row]) for row in taking_part)
    assert (max(again) > 0) == (family in FOLDING)


class Listener:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, tokens: Tensor) -> None:
        self.heard.append(tokens.tolist())

    def end(self) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("method", [slowly("oracle"), "out_of_step"])
@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("family", ["qwen3_5", "mamba2"])
def test_nobody_sees_what_is_fed_again(
    family: str, rows: int, mode: Mode, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafter, statistics, records and streamer know emitted tokens and drafts, nothing else."""
    case = Case(family, mode, rows)
    drafter_class = {"oracle": THROW_AWAY["oracle"], "out_of_step": OutOfStep}[method]
    proposed: list[TreeBatch] = []
    outcomes: list[tuple[int, RowRound]] = []

    def propose(self: Any, state: BatchState, budget: int) -> TreeBatch:
        proposed.append(RowDrafter.propose(self, state, budget))
        return proposed[-1]

    monkeypatch.setattr(drafter_class, "propose", propose)
    monkeypatch.setattr(
        drafter_class.Row, "observe", lambda row, outcome: outcomes.append((row.index, outcome))
    )
    records: list[RoundRecord] = []
    call = {"streamer": Listener()} if rows == 1 else {}
    wanted_text = reference(case)[0]
    config = SpecConfig(method, {"truth": case.truth()}, on_round=records.append)
    feeds = Feeds(case, config, monkeypatch, **call)
    assert torch.equal(feeds.text, wanted_text)
    text = wanted_text[:, prompts(rows)["input_ids"].shape[1] :].tolist()
    sizes = [trees.size for trees in proposed]
    assert any(wide > size for wide, size in zip(feeds.widths, sizes, strict=True))
    assert [record.nodes for record in records[1:]] == sizes
    for record, trees, result in zip(records[1:], proposed, feeds.rounds[1:], strict=True):
        assert record.trees is not None
        for row, tree in enumerate(trees.to_rows()):
            assert not record.tokens[row] or record.trees[row] == tree
        assert result.output.logits.shape[:2] == trees.tokens.shape
    for row in range(rows):
        told = [outcome.tokens for at, outcome in outcomes if at == row]
        for blocks in ([record.tokens[row] for record in records], [records[0].tokens[row], *told]):
            assert [token for block in blocks for token in block] == text[row]
    stats = specdec.last_stats(case.model)
    taking_part = [(r, row) for r in records[1:] for row in range(rows) if r.tokens[row]]
    assert stats.drafted_nodes == sum(len(r.trees[row]) - 1 for r, row in taking_part if r.trees)
    assert stats.histogram.total() == len(taking_part)
    assert sum(n * times for n, times in stats.histogram.items()) + rows == stats.new_tokens
    assert sum(stats.tokens_by_source.values()) == stats.new_tokens == rows * NEW_TOKENS
    if rows == 1:
        ids = prompts(1)["input_ids"].tolist()
        assert call["streamer"].heard == [ids, *([token] for token in text[0]), "end"]


def draft_out_of_step(
    family: str, rows: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Widths of all forwards of calls whose text is checked."""
    case, widths = Case(family, GREEDY, rows), []
    truth, wanted_text = case.truth(), reference(case)[0]
    for seed in range(4):
        config = SpecConfig("out_of_step", {"truth": truth, "seed": seed}, budget=budget)
        feeds = Feeds(case, config, monkeypatch)
        assert torch.equal(feeds.text, wanted_text), f"seed {seed}"
        assert len(feeds.widths) < NEW_TOKENS
        widths += feeds.widths
    return widths


@pytest.mark.parametrize("budget", [slowly(0), slowly(1), slowly(2), 5, slowly(12)])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("family", ["qwen3_5", slowly("mamba2"), slowly("bloom")])
def test_the_budget_pays_for_what_is_fed_again(
    family: str, rows: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However drafts fail and rows fall out of step, no forward is wider than budget + 1."""
    widths = draft_out_of_step(family, rows, budget, monkeypatch)
    assert max(widths) <= budget + 1
    assert budget < 5 or max(widths) > 3


@pytest.mark.parametrize("rows", BATCHES)
def test_a_boundless_budget_is_no_leave_to_feed_all_again(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft that is wrong at its end each time is put back each time; the work must not grow."""
    widths = draft_out_of_step("qwen3_5", rows, 1000, monkeypatch)
    assert max(widths) <= OutOfStep.max_nodes + 1


# I7


@pytest.mark.fault
@pytest.mark.parametrize(
    "mode", [pytest.param(GREEDY, marks=pytest.mark.slow), SAMPLED], ids=lambda mode: mode.name
)
@pytest.mark.parametrize(("where", "at", "rows"), FAULTS)
def test_a_failure_leaves_the_last_commit(
    where: str,
    at: int,
    rows: int,
    mode: Mode,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state is plain's after as many tokens, the generator where plain's is; both usable."""
    case = Case("qwen3_5", mode, rows)
    truth, plain = case.truth(), plain_states(case)
    calls = watch_calls(monkeypatch)
    on_round = breaking(lambda record: None, at) if where == "on_round" else None
    config = SpecConfig("oracle", {"truth": truth}, on_round=on_round)
    with monkeypatch.context() as patch, pytest.raises(Boom):
        case.generate(specdec=config, **fault(where, at, patch))
    generator_after = torch.get_rng_state()
    broken = calls[-1]
    if where == "start":  # before the prefill
        assert not any(
            part.slots or part.folded for part in layer_states(broken.target.cache.cache)
        )
    else:
        assert state_error(broken, plain) <= state_tolerance(case)
    assert_generator_is_plains(case, generator_after, where, at, broken)
    case.check(ledger, "oracle", truth)
    ledger.settle()


@pytest.mark.fault
@pytest.mark.parametrize("at", [2, 5])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", [*FEW[:2], *map(slowly, FEW[2:])])
def test_a_failure_inside_a_forward_is_put_back(
    family: str, layer: int, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers have taken the tokens when it happens, others have not."""
    case = Case(family, GREEDY, 4)
    truth, plain = case.truth(), plain_states(case)
    calls = watch_calls(monkeypatch)
    stack = next(part for part in case.model.modules() if isinstance(part, torch.nn.ModuleList))
    known = capability(case.model)
    hook = stack[layer].register_forward_hook(breaking(lambda *_: None, at))
    case.model._specdec.test.assume(case.model, known)  # no self-test runs into it
    try:
        with pytest.raises(Boom):
            case.generate(specdec=SpecConfig("oracle", {"truth": truth}))
    finally:
        hook.remove()
    assert state_error(calls[-1], plain) <= state_tolerance(case)
    assert torch.equal(case.speculate("oracle", truth)[0], reference(case)[0])
