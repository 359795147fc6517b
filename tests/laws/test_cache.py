"""The state between rounds: cache, prefixes shown to processors, generator, and after a failure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.drafters import THROW_AWAY, Oracle
from helpers.families import REPRESENTATIVE, TREE_FAMILIES
from helpers.laws import (
    GREEDY,
    MODES,
    NEW_TOKENS,
    SAMPLED,
    Case,
    Ledger,
    Mode,
    options_of,
    prompts,
    reference,
)
from helpers.spies import Seen, cache_error, tolerance, watch_calls
from specdec import SpecConfig
from specdec.contracts import RoundResult
from specdec.registry import methods
from specdec.stats import RoundRecord

pytestmark = [
    pytest.mark.usefixtures("throw_away_methods"),
    pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning"),
]

METHODS = [*methods.names(), *THROW_AWAY]
FAST = (*REPRESENTATIVE, "phi3_sw", "gemma3n_kvshare", "olmo3")
ALL_FAMILIES = [
    pytest.param(family, marks=[] if family in FAST else [pytest.mark.slow])
    for family in TREE_FAMILIES
]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_cache_is_a_fresh_prefill_after_every_round(
    family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1; the oracle commits non-contiguous paths, and one row ends long before the others."""
    endless = Case(family, GREEDY, rows)
    case = endless
    if rows > 1:
        eos = _most_unequal_end(reference(endless)[0][:, -NEW_TOKENS:].tolist())
        case = Case(family, GREEDY.with_options(eos_token_id=eos), rows)
    errors: list[float] = []
    gaps: list[list[int]] = []
    ended: list[bool] = []

    def watch(seen: Seen, result: RoundResult, record: RoundRecord) -> None:
        errors.append(cache_error(case.model, seen.target.cache, seen.texts()))
        gaps.extend(path for path in record.paths if path != list(range(1, len(path) + 1)))
        ended.append(not all(seen.call.state.active))

    watch_calls(monkeypatch, watch)
    case.speculate("oracle", endless.truth())
    print(f"cache error of {family}: {max(errors):.1e}")
    assert max(errors) <= tolerance(family)
    assert len(errors) > 5
    assert gaps
    assert rows == 1 or sum(ended) > 1


def _most_unequal_end(tails: list[list[int]]) -> int:
    """The token that, as EOS, ends rows furthest apart."""

    def spread(token: int) -> int:
        ends = [tail.index(token) if token in tail else len(tail) for tail in tails]
        return max(ends) - min(ends)

    return max(set(tails[0] + tails[-1]), key=spread)


class Recording:
    """A processor or criterion that keeps what it was shown, and may fail at its n-th call."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.shown: list[list[int]] = []
        self._fails_at = fails_at

    def _look(self, ids: Tensor) -> None:
        self.shown.append(ids[0].tolist())
        if len(self.shown) == self._fails_at:
            raise Boom


class Boom(Exception):
    """What the tests throw into a call."""


class RecordingProcessor(Recording):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._look(input_ids)
        return scores


class RecordingCriterion(Recording):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._look(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED, MODES[-1]], ids=lambda mode: mode.name)
@pytest.mark.parametrize("method", METHODS)
def test_processors_and_criteria_see_the_emitted_prefixes(method: str, mode: Mode) -> None:
    """I4, I6: each prefix once, in order, nothing that was merely drafted."""
    case = Case("gemma3", mode)
    seen = []
    for how in (False, SpecConfig(method, options_of(method, case.truth(), case))):
        processor, criterion = RecordingProcessor(), RecordingCriterion()
        sequences, _ = case.generate(
            specdec=how, logits_processor=[processor], stopping_criteria=[criterion]
        )
        text = sequences[0].tolist()
        start = prompts(1)["input_ids"].shape[1]
        assert processor.shown == [text[:end] for end in range(start, len(text))]
        assert criterion.shown == [text[:end] for end in range(start + 1, len(text) + 1)]
        seen.append(text)
    assert seen[0] == seen[1]


def breaking(method: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The method, failing at its `at`-th call."""
    calls = count(1)

    def broken(*args: Any) -> Any:
        if next(calls) == at:
            raise Boom
        return method(*args)

    return broken


def fault(where: str, at: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Plants a failure at the n-th call of something and returns arguments of `generate`."""
    if where == "processor":
        return {"logits_processor": [RecordingProcessor(at)]}
    if where == "criterion":
        return {"stopping_criteria": [RecordingCriterion(at)]}
    if where != "on_round":
        monkeypatch.setattr(Oracle, where, breaking(getattr(Oracle, where), at))
    return {}


def assert_generator_is_plains(
    case: Case, state: Tensor, where: str, at: int, broken: Seen
) -> None:
    """After the same failure where plain can have it, else after as many steps."""
    steps = max(map(broken.call.state.emitted, range(case.rows)))
    if where in ("processor", "criterion"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Boom):
            case.generate(specdec=False, **fault(where, at, patch))
        assert torch.equal(state, torch.get_rng_state())
    elif steps:
        shorter = Case(case.family, case.mode.with_options(max_new_tokens=steps), case.rows)
        assert torch.equal(state, reference(shorter)[1])


FAULTS = [
    *(("start", 1, rows) for rows in (1, 4)),
    *((where, at, rows) for where in ("propose", "observe") for at in (1, 4) for rows in (1, 4)),
    *(("on_round", at, rows) for at in (1, 4) for rows in (1, 4)),
    *((where, at, 1) for where in ("processor", "criterion") for at in (1, 2, 9, 15)),
]


@pytest.mark.fault
@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: mode.name)
@pytest.mark.parametrize(("where", "at", "rows"), FAULTS)
def test_a_failure_leaves_the_last_commit(
    where: str,
    at: int,
    rows: int,
    mode: Mode,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """I7: cache at the last commit, generator where plain's stands; usable."""
    case = Case("gemma3", mode, rows)
    truth = case.truth()
    calls = watch_calls(monkeypatch)
    on_round = breaking(lambda record: None, at) if where == "on_round" else None
    config = SpecConfig("oracle", {"truth": truth}, on_round=on_round)
    with monkeypatch.context() as patch, pytest.raises(Boom):
        case.generate(specdec=config, **fault(where, at, patch))
    state_after = torch.get_rng_state()
    broken = calls[-1]
    if where == "start":  # before the prefill
        assert broken.target.cache.host_lengths == [0] * rows
    else:
        assert cache_error(case.model, broken.target.cache, _committed(broken, truth)) <= 1e-12
    assert_generator_is_plains(case, state_after, where, at, broken)
    case.check(ledger, "oracle", truth)
    case.check(ledger, "lookahead", truth)
    ledger.settle()


def _committed(seen: Seen, truth: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """The texts after the last commit; a failing first pick leaves the prompt without a token."""
    texts = []
    for row, text in enumerate(seen.texts()):
        assert list(truth[row][: len(text)]) == text
        begun = seen.call.state.emitted(row) > 0
        texts.append(text if begun else [*text, truth[row][len(text)]])
    return texts
