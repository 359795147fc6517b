"""A drafter that breaks its contract gets an error that says how, or is put right.

Either way the text stays plain's, and the model usable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.drafters import TruthConfig
from helpers.laws import GREEDY, SAMPLED, Case, Mode, reference
from specdec import RowDrafter, SpecConfig, TokenTree, TreeBatch
from specdec.contracts import BatchState
from specdec.drafters.row import DraftRow
from specdec.errors import DrafterError
from specdec.registry import methods


class WrongRoot(RowDrafter):
    """Starts its tree with the token after the pending one."""

    class Row(DraftRow):
        def propose(self, budget: int) -> TokenTree:
            return TokenTree.chain((self.text[-1] + 1) % 90, [5])


class NoTree(RowDrafter):
    """Returns the tokens alone."""

    class Row(DraftRow):
        def propose(self, budget: int) -> Any:
            return [self.text[-1], 5]


class NoBatch(RowDrafter):
    """Returns its trees without uploading them."""

    def propose(self, state: BatchState, budget: int) -> Any:
        return [TokenTree.chain(row[-1], [5]) for row in state.tokens]


class TooFewRows(RowDrafter):
    """Leaves the last row out."""

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        return TreeBatch.roots(state.pending[:-1])


class Cycle(RowDrafter):
    """Hangs a node below a later one."""

    class Row(DraftRow):
        def propose(self, budget: int) -> TokenTree:
            return TokenTree([self.text[-1], 5, 6], [-1, 2, 0])


MISTAKES = {
    WrongRoot: r"a row of WrongRoot must propose a TokenTree rooted at the pending token \d+",
    NoTree: r"a row of NoTree must propose a TokenTree rooted .* got \[",
    NoBatch: r"NoBatch.propose must return a TreeBatch of 3 rows, got list",
    TooFewRows: r"TooFewRows.propose must return a TreeBatch of 3 rows",
    Cycle: r"node 1 has parent 2; a parent must come before its child",
}


@pytest.fixture(params=MISTAKES, ids=lambda drafter: drafter.__name__)
def mistaken(request: pytest.FixtureRequest) -> Iterator[type[RowDrafter]]:
    methods.register("mistaken", request.param)
    yield request.param
    methods.unregister("mistaken")


def test_a_mistake_is_named(mistaken: type[RowDrafter]) -> None:
    case = Case("llama", GREEDY, rows=3)
    with pytest.raises(DrafterError, match=MISTAKES[mistaken]):
        case.generate(specdec=SpecConfig("mistaken"))
    got, state = case.generate(specdec=SpecConfig("prompt_lookup"))
    assert torch.equal(got, reference(case)[0])
    assert torch.equal(state, reference(case)[1])


class WrongRootOnDevice(RowDrafter):
    """Puts another token where the pending one belongs, without asking the host."""

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        return TreeBatch.chains(torch.stack([(state.pending + 1) % 90, state.pending], dim=1))

    def observe(self, round_result: Any) -> None:
        """Nothing."""


class ImpossibleIds(WrongRootOnDevice):
    """Proposes ids that no embedding has."""

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        beyond = torch.full_like(state.pending, state.vocab_size + 7)
        return TreeBatch.chains(torch.stack([state.pending, beyond, -beyond], dim=1))


class DeeperThanItSays(WrongRootOnDevice):
    """Proposes plain's own text as a chain, and says that it is one level deep, or flat."""

    Config = TruthConfig
    says = 1

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        rows = [
            self.config.truth[row][len(text) - 1 :][:6] for row, text in enumerate(state.tokens)
        ]
        padded = [[*row, *[0] * 6][:6] for row in rows]
        return replace(TreeBatch.chains(torch.tensor(padded)), max_depth=self.says)


class FlatItSays(DeeperThanItSays):
    says = 0


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
@pytest.mark.parametrize(
    "drafter", [WrongRootOnDevice, ImpossibleIds, DeeperThanItSays, FlatItSays]
)
def test_what_a_device_drafter_puts_down_is_only_a_draft(
    drafter: type[RowDrafter], family: str
) -> None:
    """I5 without a copy to the host: roots are the loop's, ids are made possible."""
    case = Case(family, GREEDY, rows=3)
    methods.register("mistaken", drafter)
    options = {"truth": case.truth()} if hasattr(drafter, "says") else {}
    got, _ = case.generate(specdec=SpecConfig("mistaken", options))
    assert torch.equal(got, reference(case)[0])


class DeviceDrafter(RowDrafter):
    """Builds its own batches of two nodes a row, of which nobody reads the tokens."""

    def nodes(self, pending: Tensor) -> Tensor:
        """[B, 2] root and draft."""
        raise NotImplementedError

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        if budget == 0:
            return TreeBatch.roots(state.pending)
        return TreeBatch.chains(self.nodes(state.pending))

    def observe(self, round_result: Any) -> None:
        """Nothing."""


class AnotherRoot(DeviceDrafter):
    def nodes(self, pending: Tensor) -> Tensor:
        return torch.stack([(pending + 1) % 90, pending], 1)


class BeyondTheVocabulary(DeviceDrafter):
    def nodes(self, pending: Tensor) -> Tensor:
        return torch.stack([pending, torch.full_like(pending, 10**6)], 1)


class BelowZero(DeviceDrafter):
    def nodes(self, pending: Tensor) -> Tensor:
        return torch.stack([pending, torch.full_like(pending, -7)], 1)


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("drafter", [AnotherRoot, BeyondTheVocabulary, BelowZero])
def test_nodes_that_nobody_reads_cannot_change_the_text(
    drafter: type[DeviceDrafter], mode: Mode
) -> None:
    case = Case("llama", mode, rows=3)
    methods.register("mistaken", drafter)
    got, state = case.generate(specdec=SpecConfig("mistaken"))
    assert torch.equal(got, reference(case)[0])
    assert torch.equal(state, reference(case)[1])
