"""I5 for drafters that build their batches on the device: nothing they hold changes the text.

Every proposal here carries plain's own next tokens, so that wrong masks, positions and laws would
be accepted if anything believed them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.drafters import Truth
from helpers.families import VOCAB
from helpers.laws import GREEDY, SAMPLED, Case, Mode, reference
from specdec import Needs, SpecConfig, TokenTree, TreeBatch
from specdec.contracts import BatchState, RoundResult, Shape
from specdec.errors import DrafterError
from specdec.registry import methods
from specdec.round.sealed import sealed
from specdec.round.tree import Structure

MODES = pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: mode.name)
ROWS = pytest.mark.parametrize("rows", [1, 3])


@dataclass(frozen=True)
class HostileConfig:
    truth: Truth = ()
    kind: str = ""
    sample: bool = False


class Hostile:
    """Proposes five right tokens a row, and does something to the batch or to what it was shown."""

    Config = HostileConfig
    needs = Needs(node_picks=True)
    host_needs = False
    shape: Shape = "any"
    source_names = ("draft",)
    max_nodes = 12

    def __init__(self, config: HostileConfig) -> None:
        self.config = config
        self.kept: TreeBatch | None = None

    def start(self, state: BatchState) -> None:
        """Nothing."""

    def observe_prefill(self, *_: Any) -> None:
        """Nothing."""

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        known = zip(self.config.truth, state.tokens, strict=True)
        ahead = [[*text[len(tokens) :], *([1] * 5)][:5] for text, tokens in known]
        return PROPOSALS[self.config.kind](self, state, torch.tensor(ahead))

    def observe(self, round_result: RoundResult) -> None:
        """Nothing, or as bad as it can."""
        if self.config.kind == "what it observed":
            verdict = round_result.verdict
            for tensor in (verdict.tokens, verdict.path, round_result.node_picks):
                assert tensor is not None
                tensor.add_(1)
            for row in round_result.host.tokens:
                row.append(5)
        if self.config.kind == "the batch of the last round" and self.kept is not None:
            self.kept.parents.clamp_(max=0)


def chain(state: BatchState, ahead: Tensor) -> TreeBatch:
    return TreeBatch.chains(torch.cat([state.pending[:, None], ahead], 1))


def uploaded(state: BatchState, ahead: Tensor) -> TreeBatch:
    """A comb from the host: a decoy before every right token."""
    rows = []
    for root, tokens in zip(state.pending.tolist(), ahead.tolist(), strict=True):
        nodes, parents, last = [root], [-1], 0
        for token in tokens:
            nodes += [(token + 1) % VOCAB, token]
            parents += [last, last]
            last = len(nodes) - 1
        rows.append(TokenTree(nodes, parents))
    return TreeBatch.from_rows(rows, state.pending.device)


def star(trees: TreeBatch) -> Tensor:
    return trees.parents.clamp(max=0).clone()


def later(trees: TreeBatch) -> Tensor:
    """Parents that come after their children, that are themselves, and that are nowhere."""
    parents = trees.parents.clone()
    parents[:, 1:] = torch.tensor([4, 2, 9, -5, 1])
    return parents


def written(trees: TreeBatch, **tensors: Tensor) -> TreeBatch:
    """The batch, after writing into its own tensors."""
    for name, values in tensors.items():
        getattr(trees, name).copy_(values)
    return trees


def rehung(trees: TreeBatch) -> TreeBatch:
    trees.ancestor_mask()
    flat = replace(trees, parents=trees.parents.clone())
    flat.depths()
    flat.parents.clamp_(max=0)
    return flat


def seeing_all(trees: TreeBatch) -> TreeBatch:
    trees.ancestor_mask().fill_(True)
    return trees


def flat_positions(trees: TreeBatch) -> TreeBatch:
    trees.depths().zero_()
    return trees


def kept(drafter: Hostile, trees: TreeBatch) -> TreeBatch:
    """One shape for all rounds, as the draft model has; somebody writes into it in between."""
    if drafter.kept is None or drafter.kept.size != trees.size:
        drafter.kept = trees
    return drafter.kept.with_tokens(trees.tokens)


def shown(state: BatchState, trees: TreeBatch) -> TreeBatch:
    state.pending.add_(1)
    state.lengths.add_(3)
    state.active[0] = False
    state.vocab_size, state.shape, state.depth_limit = 10**6, "any", 10**6
    for row in state.tokens:
        row[-1] = 7
        row.pop(0)
    return trees


def random_numbers(trees: TreeBatch) -> TreeBatch:
    torch.rand(3)
    torch.manual_seed(int(torch.randint(100, (1,))))
    return trees


def law_of(trees: TreeBatch, value: float = 1.0) -> Tensor:
    """A law that was never drawn from: all of its mass where the text does not go."""
    law = torch.zeros(*trees.tokens.shape, VOCAB)
    return law.scatter(2, trees.tokens[:, :, None], value)


def lying(trees: TreeBatch) -> TreeBatch:
    return replace(trees, draft_law=law_of(trees))


Proposal = Callable[[Hostile, BatchState, Tensor], TreeBatch]
PROPOSALS: dict[str, Proposal] = {
    "right": lambda d, s, a: chain(s, a),
    "right comb": lambda d, s, a: uploaded(s, a),
    # another structure than the one that the mask was made of
    "re-hung chain": lambda d, s, a: replace(chain(s, a), parents=star(chain(s, a)), max_depth=1),
    "re-hung upload": lambda d, s, a: replace(
        uploaded(s, a), parents=star(uploaded(s, a)), max_depth=1
    ),
    "written parents": lambda d, s, a: written(uploaded(s, a), parents=star(uploaded(s, a))),
    "written after the mask": lambda d, s, a: rehung(uploaded(s, a)),
    "written mask": lambda d, s, a: seeing_all(uploaded(s, a)),
    "written depths": lambda d, s, a: flat_positions(uploaded(s, a)),
    "the batch of the last round": lambda d, s, a: kept(d, uploaded(s, a)),
    # parents
    "parents that are no earlier node": lambda d, s, a: replace(
        chain(s, a), parents=later(chain(s, a))
    ),
    "parents beyond": lambda d, s, a: replace(chain(s, a), parents=chain(s, a).parents + 10**6),
    "no root": lambda d, s, a: replace(chain(s, a), parents=chain(s, a).parents + 1),
    "roots everywhere": lambda d, s, a: replace(
        chain(s, a), parents=torch.full_like(chain(s, a).parents, -1)
    ),
    # what it says about them
    "says it is flat": lambda d, s, a: replace(uploaded(s, a), max_depth=1),
    "says it has no depth": lambda d, s, a: replace(chain(s, a), max_depth=0),
    "says it is below zero": lambda d, s, a: replace(chain(s, a), max_depth=-3),
    "says it is deep": lambda d, s, a: replace(uploaded(s, a), max_depth=11),
    "no live node": lambda d, s, a: replace(chain(s, a), sizes=chain(s, a).sizes * 0),
    "sizes below zero": lambda d, s, a: replace(chain(s, a), sizes=chain(s, a).sizes - 99),
    "sizes beyond": lambda d, s, a: replace(chain(s, a), sizes=chain(s, a).sizes + 99),
    "sources nobody named": lambda d, s, a: replace(
        chain(s, a), sources=torch.full_like(chain(s, a).tokens, -7)
    ),
    "scores that are no numbers": lambda d, s, a: replace(
        chain(s, a), scores=torch.full(a.shape, torch.nan).new_full((len(a), 6), torch.nan)
    ),
    "other integers": lambda d, s, a: replace(
        chain(s, a),
        tokens=chain(s, a).tokens.to(torch.int16),
        parents=chain(s, a).parents.to(torch.int8),
        sizes=chain(s, a).sizes.to(torch.uint8),
    ),
    # what it was shown
    "what it was shown": lambda d, s, a: shown(s, chain(s, a)),
    "what it observed": lambda d, s, a: chain(s, a),
    "random numbers": lambda d, s, a: random_numbers(chain(s, a)),
    # laws of a method that does not sample
    "a law": lambda d, s, a: lying(chain(s, (a + 1) % VOCAB)),
    "no numbers for a law": lambda d, s, a: replace(
        chain(s, a), draft_law=law_of(chain(s, a)) * torch.nan
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _hostile() -> Iterator[None]:
    methods.register("hostile", Hostile)
    yield
    methods.unregister("hostile")


@MODES
@ROWS
@pytest.mark.parametrize("kind", PROPOSALS)
def test_no_batch_changes_the_text(kind: str, rows: int, mode: Mode) -> None:
    case = Case("llama", mode, rows=rows)
    config = SpecConfig("hostile", {"truth": case.truth(), "kind": kind})
    got, state = case.generate(specdec=config)
    assert torch.equal(got, reference(case)[0])
    assert torch.equal(state, reference(case)[1])


@pytest.mark.parametrize("kind", ["re-hung upload", "written mask", "the batch of the last round"])
def test_no_batch_changes_the_text_in_inference_mode(kind: str) -> None:
    """Tensors made there do not count how often they were written to."""
    case = Case("llama", SAMPLED, rows=3)
    config = SpecConfig("hostile", {"truth": case.truth(), "kind": kind})
    with torch.inference_mode():
        got, _ = case.generate(specdec=config)
    assert torch.equal(got, reference(case)[0])


def test_right_batches_are_accepted() -> None:
    """What is done to a batch costs a good drafter no round."""
    case = Case("llama", GREEDY, rows=1)
    rounds = []
    for kind in ("right", "right comb", "random numbers", "other integers", "says it is deep"):
        case.generate(specdec=SpecConfig("hostile", {"truth": case.truth(), "kind": kind}))
        rounds.append(_rounds(case))
    assert rounds == [7] * 5


def _rounds(case: Case) -> int:
    import specdec

    return specdec.last_stats(case.model).rounds


def changed(field: str, change: Callable[[Any], Any]) -> Proposal:
    """The right chain, with one of its fields changed."""

    def propose(drafter: Hostile, state: BatchState, ahead: Tensor) -> TreeBatch:
        trees, zeros = chain(state, ahead), torch.zeros(len(ahead), 6)
        trees = replace(trees, draft_law=law_of(trees), scores=zeros, sources=zeros.int())
        return replace(trees, **{field: change(getattr(trees, field))})

    return propose


REFUSED: dict[str, tuple[Proposal, str]] = {
    "narrow parents": (changed("parents", lambda t: t[:, :3]),
                       r"return parents of shape \[3, 6\], got \[3, 3\]"),
    "sizes by node": (changed("sizes", lambda t: t[:, None]), "returned sizes of 2 dimensions"),
    "no sizes": (changed("sizes", lambda t: None), r"sizes of shape \[3\], got NoneType"),
    "parents as floats": (changed("parents", lambda t: t.float()),
                          "return parents as integers, got float32"),
    "sizes as truth": (changed("sizes", lambda t: t > 0), "return sizes as integers, got bool"),
    "parents elsewhere": (changed("parents", lambda t: t.to("meta")),
                          "return parents on cpu, got meta"),
    "depth as a fraction": (changed("max_depth", lambda n: 5.0), "max_depth as an int, got float"),
    "depth on the device": (changed("max_depth", torch.tensor), "max_depth as an int, got Tensor"),
    "no depth": (changed("max_depth", lambda n: None), "max_depth as an int, got NoneType"),
    "scores of another tree": (changed("scores", lambda t: t[:, :2]), r"scores of shape \[3, 6\]"),
    "scores as integers": (changed("scores", lambda t: t.int()), "scores as floats, got int32"),
    "sources as floats": (changed("sources", lambda t: t.float()), "sources as integers"),
    "law of a row": (changed("draft_law", lambda t: t[:, 0]), r"draft_law of shape \[3, 6\]"),
    "law of integers": (changed("draft_law", lambda t: t.int()), "draft_law as floats"),
    "flat law": (changed("draft_law", lambda t: t[:, :, 0]), "draft_law of 2 dimensions"),
    "far too many": (lambda d, s, a: TreeBatch.chains(s.pending[:, None].expand(-1, 5000)),
                     "at most 4096 nodes below a root, got 4999"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_batch_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proposal, why = REFUSED[kind]
    monkeypatch.setitem(PROPOSALS, kind, proposal)
    case = Case("llama", GREEDY, rows=3)
    config = SpecConfig("hostile", {"truth": case.truth(), "kind": kind})
    with pytest.raises(DrafterError, match=why):
        case.generate(specdec=config)
    right = {"truth": case.truth(), "kind": "right"}
    got, state = case.generate(specdec=SpecConfig("hostile", right))
    assert torch.equal(got, reference(case)[0])
    assert torch.equal(state, reference(case)[1])


class Sampler(Hostile):
    """May sample, with its option `sample`; its law is wrong in the way that is asked for."""

    sampling_option = "sample"

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        trees = super().propose(state, budget)
        law = law_of(trees)
        wrong = {
            "NaN": law * torch.nan,
            "negative": -law,
            "empty": law * 0,
            "not normalised": law * 40,
            "infinite": law / 0,
            "narrow": law[:, :, :20],
        }[self.config.kind]
        return replace(trees, draft_law=wrong, parents=star(trees))

    def observe(self, round_result: RoundResult) -> None:
        """Nothing."""


LAWS = ("NaN", "negative", "empty", "not normalised", "infinite", "narrow")


@pytest.mark.parametrize("kind", LAWS)
def test_a_law_needs_the_class_and_the_option(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the option the text is the seed's; with it, wrong laws give a text all the same."""
    monkeypatch.setitem(PROPOSALS, kind, PROPOSALS["right"])
    methods.register("sampler", Sampler)
    for mode in (GREEDY, SAMPLED):
        case = Case("llama", mode, rows=3)
        options = {"truth": case.truth(), "kind": kind}
        got, _ = case.generate(specdec=SpecConfig("sampler", options))
        assert torch.equal(got, reference(case)[0])
        got, _ = case.generate(specdec=SpecConfig("sampler", {**options, "sample": True}))
        assert got.shape[1] <= reference(case)[0].shape[1] + 40
        if mode is GREEDY:
            assert torch.equal(got, reference(case)[0])


def test_new_tokens_keep_what_follows_from_the_parents() -> None:
    trees = uploaded_of([3, 4, 5])
    again = trees.with_tokens(trees.tokens + 1)
    assert again.known_structure() is trees.known_structure() is not None
    assert again.scores is None
    assert replace(trees, tokens=trees.tokens + 1).known_structure() is None
    trees.parents[0, 2] = 0
    assert again.known_structure() is None
    assert int(again.depths()[0, 2]) == 1


def test_every_node_hangs_where_it_says() -> None:
    """Whatever the parents and the depth: earlier parents, no deeper node, a mask that fits."""
    generator = torch.Generator().manual_seed(0)
    pending, sizes = torch.tensor([3, 4]), torch.full((2,), 9)
    deepest = set()
    for round_index in range(60):
        parents = torch.randint(-3, 9 if round_index % 2 else 12, (2, 9), generator=generator)
        if round_index % 3 == 0:
            parents = torch.arange(-1, 8).expand(2, 9)
        trees = TreeBatch(torch.full((2, 9), 5), parents, sizes, round_index % 11 - 1)
        own = sealed(trees, pending, VOCAB, chain=False, sampled=False, whose="Random")
        found = Structure.found(own.parents)
        assert bool((own.parents < torch.arange(9)).all())
        assert bool(((own.parents >= 0).sum(1) == 8).all())
        assert torch.equal(own.ancestor_mask(), found.mask)
        assert torch.equal(own.depths(), found.depths)
        assert int(own.depths().max()) <= own.max_depth <= 8
        deepest.add(int(own.depths().max()))
    assert deepest >= {1, 2, 8}


def uploaded_of(tokens: list[int]) -> TreeBatch:
    return TreeBatch.from_rows([TokenTree.chain(tokens[0], tokens[1:])], torch.device("cpu"))
