"""Every method, on every family, in every mode: the text of plain `generate`, to the token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product

import pytest
import torch

from helpers import laws
from helpers.chains import SLOW
from helpers.drafters import THROW_AWAY
from helpers.families import CHAIN_FAMILIES, FAMILIES, REPRESENTATIVE
from helpers.laws import (
    Case,
    Ledger,
    Mode,
    below_noise,
    plain_scores,
    reference,
)
from specdec import SpecConfig, augment
from specdec.registry import methods

pytestmark = [
    pytest.mark.usefixtures("throw_away_methods"),
    pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning"),
]

METHODS = [*methods.names(), *THROW_AWAY]
TREES_ONLY = ("device_bigrams",)
HYBRID = ("qwen3_5", "bloom")  # for the fast grid: states beside attention, and attention alone
WHOLE = ("none", "lookahead", "oracle", "eagle3")  # for it: every mode, on one family
DEPTHS = (0, 1, 2, 3, 5, 8)
BUDGETS = (0, 1, 2, 4, 8)
BATCHES = (1, 4)
NEW_TOKENS = 26  # enough for windows of 8 to be left behind, on prompts of 4 to 11 tokens
GREEDY, SAMPLED, *OTHERS = [mode.with_options(max_new_tokens=NEW_TOKENS) for mode in laws.MODES]
BOTH, MODES = [GREEDY, SAMPLED], [GREEDY, SAMPLED, *OTHERS]


def grid(fast: Callable[[str, str, str], bool], modes: list[Mode]) -> Iterator[object]:
    """Family x method x mode; what `fast` does not choose is marked slow."""
    for family, method, mode in product(FAMILIES, METHODS, modes):
        if FAMILIES[family].mode == "chain" and method in TREES_ONLY:
            continue
        marks = [] if fast(family, method, mode.name) else [pytest.mark.slow]
        yield pytest.param(family, method, mode, id=f"{family}-{method}-{mode.name}", marks=marks)


def over(fast: Callable[[str, str, str], bool], modes: list[Mode]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("family", "method", "mode"), list(grid(fast, modes)))


def in_turn(family: str, method: str, mode: str, modes: list[Mode]) -> bool:
    """Whether it is this mode's turn: families and methods meet once each, in modes that rotate."""
    turn = (list(FAMILIES).index(family) + METHODS.index(method)) % len(modes)
    return modes[turn].name == mode


def chosen(family: str, method: str, mode: str) -> bool:
    """Four methods on one family whole; else every pair of a family and a method, or lookahead.

    The oracle's long paths show more than any other: they are taken greedily and sampled.
    """
    believed = method == "oracle" and family in (*REPRESENTATIVE, *HYBRID)
    if believed and mode in (GREEDY.name, SAMPLED.name):
        return True
    if family in REPRESENTATIVE:
        whole = family == REPRESENTATIVE[0] and method in WHOLE
        return whole or in_turn(family, method, mode, MODES)
    in_short = (family in CHAIN_FAMILIES and family not in SLOW) or method == "lookahead"
    return in_short and in_turn(family, method, mode, BOTH)


def chosen_in_fp32(family: str, method: str, mode: str) -> bool:
    """Lookahead where `chosen` has the other mode, in every second family."""
    modes = mode in (GREEDY.name, SAMPLED.name) and list(FAMILIES).index(family) % 2 == 0
    return method == "lookahead" and modes and not in_turn(family, method, mode, BOTH)


def test_the_models_have_something_to_say() -> None:
    """A text that repeats one token would pass with a wrong mask."""
    for family in FAMILIES:
        tail = reference(Case(family, SAMPLED))[0][0, -NEW_TOKENS:].tolist()
        assert len(set(tail)) >= 6, family


@over(chosen, MODES)
def test_fp64(family: str, method: str, mode: Mode, ledger: Ledger) -> None:
    for rows in BATCHES:
        case = Case(family, mode, rows)
        case.check(ledger, method, case.truth())
    ledger.settle()


@over(chosen_in_fp32, MODES)
def test_fp32(family: str, method: str, mode: Mode, ledger: Ledger) -> None:
    """A difference passes only where the fp64 margin lies below the measured fp32 noise."""
    for rows in BATCHES:
        case = Case(family, mode, rows, torch.float32)
        case.check(ledger, method, case.truth())
    ledger.settle()


@lru_cache(maxsize=2 * len(BOTH) * len(BATCHES))  # every method meets the same, and plain runs once
def that_end(endless: Case) -> list[Case]:
    """The same call with ends of text that its own text holds, one by one and three at once."""
    tails = reference(endless)[0][:, -NEW_TOKENS:].tolist()
    choices = [[tails[depth % len(tails)][depth]] for depth in DEPTHS]
    choices.append([tails[0][9], tails[-1][13], tails[0][21]])
    return [replace(endless, mode=endless.mode.with_options(eos_token_id=eos)) for eos in choices]


@over(
    lambda f, m, mode: (
        f in ("llama", "gemma3", HYBRID[0])
        and m in ("none", "lookahead", "oracle")
        and (m == "oracle" or in_turn(f, m, mode, BOTH))
    ),
    BOTH,
)
def test_eos_at_every_depth(family: str, method: str, mode: Mode, ledger: Ledger) -> None:
    """The k-th token of a row ends it; drafts, which know the longer text, run past it."""
    for rows in BATCHES:
        endless = Case(family, mode, rows)
        for case in that_end(endless):
            case.check(ledger, method, endless.truth())
    ledger.settle()


@over(
    lambda f, m, mode: (
        f in ("gemma3", HYBRID[0]) and m in (*WHOLE, "suffix") and in_turn(f, m, mode, BOTH)
    ),
    BOTH,
)
def test_budgets(family: str, method: str, mode: Mode, ledger: Ledger) -> None:
    """However few nodes a round may verify, down to none at all."""
    for rows, budget in product(BATCHES, BUDGETS):
        case = Case(family, mode, rows)
        stats = case.check(ledger, method, case.truth(), budget)
        rows_of_a_round = sum(stats.histogram.values())
        assert stats.drafted_nodes <= budget * rows_of_a_round
    ledger.settle()


@pytest.mark.parametrize("family", [*REPRESENTATIVE, *CHAIN_FAMILIES])
def test_the_oracle_is_believed(family: str) -> None:
    """The laws above verify long non-contiguous paths, not just rejections."""
    case = Case(family, GREEDY)
    _, _, stats = case.speculate("oracle", case.truth())
    assert stats.acceptance_length > 3


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED, MODES[-1]], ids=lambda mode: mode.name)
@pytest.mark.parametrize("rows", BATCHES)
def test_the_fp32_judge(rows: int, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """It rebuilds plain's scores, refuses a wrong token, and lets a model's own noise pass."""
    exact, case = Case("gemma3", mode, rows), Case("gemma3", mode, rows, torch.float32)
    wanted = reference(exact)[0]
    width = laws.prompts(rows)["input_ids"].shape[1]
    for row, at in product(range(rows), (width, width + 3)):
        scores = plain_scores(exact, wanted[row, :at], row, whole=False)
        assert int(scores.argmax()) == int(wanted[row, at])
        wrong = wanted.clone()
        wrong[row, at] = int(scores.argsort()[-3])
        assert not below_noise(case, wrong, wanted)
    noisy = FAMILIES["gemma3"].build(torch.float32)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.mul_(1 + 0.03 * torch.randn_like(parameter))
    noisy = augment(noisy, "none")
    clean = laws.model_of
    models = {torch.float32: noisy, torch.float64: clean("gemma3")}
    monkeypatch.setattr(laws, "model_of", lambda _, dtype: models[dtype])
    shaken, _ = case.generate(specdec=False)
    assert not torch.equal(shaken, wanted)
    assert below_noise(case, shaken, wanted)


def test_drafts_past_the_end_of_a_position_table() -> None:
    """A learned position table that ends with the call's last token: nodes below it get no row."""
    length = sum(laws.prompts(1)["input_ids"].shape) - 1 + NEW_TOKENS
    family = FAMILIES["gpt2"]
    short = replace(family, base={**family.base, "n_positions": length})
    model = augment(short.build(torch.float64), "none")
    limits = {**laws.prompts(1), "max_new_tokens": NEW_TOKENS}
    wanted = model.generate(**limits, specdec=False)
    truth = (tuple(wanted[0].tolist()) + (1,) * 20,)
    got = model.generate(**limits, specdec=SpecConfig("oracle", {"truth": truth}))
    assert torch.equal(got, wanted)
