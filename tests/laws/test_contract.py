"""What loop, drafters, target and picker promise each other, on a batch of unequal rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.drafters import Oracle
from helpers.families import REPRESENTATIVE, VOCAB, model_of
from helpers.laws import GREEDY, MODES, SAMPLED, Case, Ledger, Mode, reference
from helpers.spies import Seen, tolerance, watch_calls
from specdec import TokenTree, TreeBatch
from specdec.caches.tree_cache import TreeCache
from specdec.contracts import BatchState, Needs, RoundResult
from specdec.drafters.row import RowRound
from specdec.generate import call
from specdec.round import verify as verification
from specdec.round.pickers import picker_of
from specdec.round.tree import bucket_size
from specdec.round.verify import walk_on_device
from specdec.stats import RoundRecord
from specdec.targets.prompts import Prompt
from specdec.targets.tree_target import HFTarget

pytestmark = [
    pytest.mark.usefixtures("throw_away_methods"),
    pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning"),
]

BUCKETS = {1, 2, 4, 8, 12, 16, 24, 32, 48, 64}
WARPED = Mode("warped", {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9})
CPU = torch.device("cpu")


def pick(everywhere: bool) -> Any:
    """A picker that picks one way, whatever the call would choose."""

    def build(*args: Any, along_path: bool, **kwargs: Any) -> Any:
        kwargs["along_path"] = not everywhere
        return picker_of(*args, **kwargs)

    return build


# A batch of three


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("method", ["device_bigrams", "prompt_lookup"])
def test_three_rows_accept_unequally(
    method: str, mode: Mode, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("gemma3", mode, rows=3)
    lengths, sizes = set(), set()

    def watch(seen: Seen, result: RoundResult, record: RoundRecord) -> None:
        if all(record.tokens):
            lengths.add(tuple(map(len, record.tokens)))
        sizes.add(result.trees.size)

    watch_calls(monkeypatch, watch)
    stats = case.check(ledger, method, case.truth())
    ledger.settle()
    assert any(len(set(row_lengths)) > 1 for row_lengths in lengths)
    assert stats.device_to_host_copies <= stats.rounds + 1
    if method == "device_bigrams":
        assert sizes <= BUCKETS
        assert max(sizes) > 1


def test_a_throw_away_drafter_is_short() -> None:
    assert len(inspect.getsource(Oracle).splitlines()) <= 25


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_padded_trees_give_the_same_text(
    mode: Mode, rows: int, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host trees padded to a bucket, as they are on a GPU."""
    padding: list[int] = []

    def propose(self: Oracle, state: BatchState, budget: int) -> TreeBatch:
        exact = plain_propose(self, state, budget)
        padded = TreeBatch.from_rows(self._trees, CPU, size=bucket_size(exact.size))
        padding.append(padded.size - exact.size)
        return padded

    plain_propose = Oracle.propose
    monkeypatch.setattr(Oracle, "propose", propose)
    case = Case("llama4_text", mode, rows)
    case.check(ledger, "oracle", case.truth())
    ledger.settle()
    assert max(padding) > 0


# Host copies


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU: reads of a value, and shapes that depend on values."""

    _WAITING = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.is_nonzero,
        torch.ops.aten.equal,
        torch.ops.aten._unique2,
    )
    _INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet in self._INDEXING and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += packet in self._WAITING or by_mask
        return func(*args, **kwargs or {})


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    """The dispatcher sees item() and bool(); copies that never reach it on a CPU are patched."""
    reads: Any = HostReads()

    def counting(method: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            reads.count += 1
            return method(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch, reads:
        for name in ("tolist", "numpy", "cpu", "__array__"):
            patch.setattr(Tensor, name, counting(getattr(Tensor, name)))
        yield reads


def test_the_counter_of_host_reads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(2)
    reads_of = [
        lambda: ones[0].item(), lambda: bool(ones[0]), lambda: int(ones[0]), lambda: ones.tolist(),
        lambda: ones.cpu(), lambda: ones.numpy(), lambda: ones.nonzero(), lambda: ones[ones > 0],
    ]  # fmt: skip
    with counted_reads(monkeypatch) as reads:
        (ones + ones).argmax(-1)
        assert reads.count == 0
    for index, read in enumerate(reads_of):
        with counted_reads(monkeypatch) as reads:
            read()
        assert reads.count >= 1, index


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", [GREEDY, WARPED], ids=lambda mode: mode.name)
def test_one_host_copy_a_round(mode: Mode, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything between two rounds is counted, the model included, on the path that a GPU takes:
    picks at all nodes and the walk on the device. (On a CPU the loop walks on the host.)
    """
    monkeypatch.setattr(verification, "walk_on_host", walk_on_device)
    monkeypatch.setattr(call, "picker_of", pick(everywhere=True))
    case = Case("llama", mode, rows)
    by_round: list[int] = []

    def watch(seen: Seen, result: RoundResult, record: RoundRecord) -> None:
        by_round.append(reads.count - sum(by_round))

    watch_calls(monkeypatch, watch)
    truth, wanted = case.truth(), reference(case)
    with counted_reads(monkeypatch) as reads:
        got, state, stats = case.speculate("device_bigrams", truth)
    assert torch.equal(got, wanted[0])
    assert torch.equal(state, wanted[1])
    assert len(by_round) == stats.rounds + 1
    assert stats.acceptance_length > 1.5
    assert by_round[1:] == [1] * stats.rounds
    assert stats.device_to_host_copies == stats.rounds + 1


# Two ways to pick


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mode", [GREEDY, WARPED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("method", ["random_trees", "oracle", "lookahead"])
def test_both_ways_to_pick_give_plain_text(
    method: str,
    mode: Mode,
    rows: int,
    everywhere: bool,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(call, "picker_of", pick(everywhere))
    case = Case("gemma3", mode, rows)
    case.check(ledger, method, case.truth())
    ledger.settle()


# The capacity view


@torch.no_grad()
def outputs_under(view: str, family: str) -> list[Tensor]:
    """Logits of prefill, a tree, and a tree after committing a branch of unequal length."""
    model, generator = model_of(family), torch.Generator().manual_seed(3)
    ids = torch.randint(15, VOCAB, (2, 17), generator=generator)
    cache = TreeCache(2, CPU, 64, view)  # type: ignore[arg-type]
    target = HFTarget(model, Prompt(ids, None, [17, 11]), cache)
    found = [target.prefill().logits]
    for _ in range(2):
        tokens = torch.randint(15, VOCAB, (7,), generator=generator).tolist()
        tree = TokenTree(tokens, [-1, 0, 1, 2, 0, 4, 5])
        trees = TreeBatch.from_rows([tree, tree.limited(5, 9, VOCAB)], CPU)
        live = trees.live()[..., None]
        found.append(target.forward_tree(trees).logits * live)
        target.commit(torch.tensor([[4, 5, 6], [4, -1, -1]]), [[4, 5, 6], [4]], [True, True])
    if view == "capacity":
        assert cache.stop == 64
    return found


@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_capacity_view_equals_live_view(family: str) -> None:
    views = [outputs_under(view, family) for view in ("live", "capacity")]
    for live, whole in zip(*views, strict=True):
        assert float((live - whole).abs().max() / live.abs().max()) <= tolerance(family)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_capacity_view_gives_the_same_text(
    family: str, mode: Mode, rows: int, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "TreeCache", partial(TreeCache, view="capacity"))
    case = Case(family, mode, rows)
    case.check(ledger, "oracle", case.truth())
    case.check(ledger, "device_bigrams", case.truth())
    ledger.settle()


# What a drafter is given


@pytest.mark.parametrize("rows", [1, 3])
def test_needs_are_met(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taps are the hidden states of the emitted prefixes; picks and top-k those of the logits."""
    outcomes: list[RowRound] = []
    features: list[list[Tensor]] = [[] for _ in range(rows)]

    def observe_prefill(
        self: Oracle, which: Any, token_ids: Tensor, found: Tensor, offset: int
    ) -> None:
        assert offset == 0
        for index, row in enumerate(which):
            features[row].extend(found[index])

    def watch(seen: Seen, result: RoundResult, record: RoundRecord) -> None:
        for row, path in enumerate(record.paths if record.index else []):
            if record.tokens[row]:
                assert result.output.features is not None
                features[row].extend(result.output.features[row, [0, *path]])

    monkeypatch.setattr(Oracle, "needs", Needs(taps=(0, 1), node_picks=True, node_topk=3))
    monkeypatch.setattr(Oracle, "observe_prefill", observe_prefill)
    monkeypatch.setattr(Oracle.Row, "observe", lambda row, outcome: outcomes.append(outcome))
    calls = watch_calls(monkeypatch, watch)
    case = Case("llama", GREEDY, rows)
    case.speculate("oracle", case.truth())
    for outcome in outcomes:
        assert outcome.picks is not None
        assert outcome.topk is not None
        assert [best[0] for best in outcome.topk] == outcome.picks
        assert [outcome.picks[node] for node in [0, *outcome.path]] == outcome.tokens
    for row, text in enumerate(calls[-1].texts()):
        ids = torch.tensor([text[:-1]])
        with torch.no_grad():
            output = case.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        wanted = torch.cat([output.hidden_states[1][0], output.hidden_states[2][0]], -1)
        got = torch.stack(features[row])
        assert got.shape == wanted.shape
        assert float((got - wanted).abs().max() / wanted.abs().max()) <= 1e-12
