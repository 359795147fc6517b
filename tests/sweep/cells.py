"""What the sweep checks for one class: every method's text against the class's own `generate`."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import specdec
from helpers import families
from helpers.drafters import THROW_AWAY, Truth
from helpers.heads import head_for
from specdec import SpecConfig, register_drafter
from specdec.api import capability
from specdec.hf.compat import vocabulary_size
from specdec.registry import methods
from sweep import judge, tiny
from sweep.situations import NEW_TOKENS, SITUATIONS, Situation, call, prompts

SCALES = (8.0, 4.0, 2.0, 16.0, 1.0)
VARIED = 8  # distinct tokens in a text that is not a loop
QUIET, STRUCTURAL = 1e-5, 1e-2  # noise of a good scale; what is beyond the other is no rounding


@dataclass
class Cell:
    """One call of one method. Outcome: "same", "margin", "differs" or "error"."""

    situation: str
    method: str
    outcome: str
    mode: str = ""
    reason: str = ""
    tokens_per_forward: float = 0.0
    detail: str = ""


@dataclass
class Report:
    """Everything found out about one model type.

    Attributes:
        mode: What the self-test chose.
        reason: And why.
        setup: Dtype and attention that the cells ran with.
        noise: Largest difference of the logits, in parts of the largest logit, between decoding
            and one forward over the whole text; None when it was not measured.
        distinct: Distinct tokens of the least varied text.
        excluded: Situations whose plain call fails or does not repeat, and why.
        unbuilt: Why the class takes no part at all; empty when it does.
        failed: Why the sweep of the class did not end; counted as an error.
    """

    model_type: str
    class_name: str
    mode: str = ""
    reason: str = ""
    setup: str = ""
    noise: float | None = None
    distinct: int = 0
    cells: list[Cell] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    unbuilt: str = ""
    failed: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        return cls(**{**data, "cells": [Cell(**cell) for cell in data["cells"]]})


@dataclass
class Plain:
    """A plain call: its text, the generator's state after it, its logits [steps, rows, V]."""

    sequences: Tensor
    state: Tensor
    logits: Tensor | None = None


@dataclass
class Setup:
    """A model made ready, and its plain texts by situation."""

    name: str
    model: Any
    plain: dict[str, Plain | str]

    @property
    def usable(self) -> int:
        return sum(isinstance(found, Plain) for found in self.plain.values())


def register_own_drafters() -> None:
    """Adds the drafters of the test suite to the methods of this process."""
    for name, drafter in THROW_AWAY.items():
        register_drafter(name, drafter)


def sweep(model_type: str) -> Report:
    """All cells of a model type. Never raises for what the class does."""
    report = Report(model_type, tiny.class_name(model_type))
    report.unbuilt = tiny.UNBUILT.get(model_type, "")
    if report.unbuilt:
        return report
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            setup = prepare(model_type)
        except Exception as problem:  # noqa: BLE001 - reported
            report.unbuilt = f"cannot be built: {short(problem)}"
            return report
        _fill(report, setup)
    return report


def _fill(report: Report, setup: Setup) -> None:
    """Adds what a class does in each situation."""
    texts = {name: found for name, found in setup.plain.items() if isinstance(found, Plain)}
    report.setup = setup.name
    report.excluded = {name: why for name, why in setup.plain.items() if isinstance(why, str)}
    if not texts:
        return
    report.noise = noise(setup.model, texts.get(SITUATIONS[0].name))
    whole = [found for name, found in texts.items() if "end" not in name]
    report.distinct = min(map(distinct, whole or texts.values()))
    try:
        model = specdec.augment(setup.model, "none")
    except Exception as problem:  # noqa: BLE001 - counted as an error
        report.cells.append(Cell("augment", "", "error", detail=short(problem)))
        return
    found = capability(model)
    report.mode, report.reason = found.mode, found.reason
    report.cells = [
        check(model, situation, method, texts[situation.name])
        for situation in SITUATIONS
        if situation.name in texts
        for method in methods.names()
    ]


def prepare(model_type: str) -> Setup:
    """The most exact setup in which most situations repeat: float64 wherever the class can."""
    best: Setup | None = None
    for name, model in _setups(model_type):
        found = Setup(name, model, {s.name: plain_text(model, s) for s in SITUATIONS})
        if best is None or found.usable > best.usable:
            best = found
        if best.usable == len(SITUATIONS):
            break
    assert best is not None
    return best


def _setups(model_type: str) -> Iterator[tuple[str, Any]]:
    model = _varied(model_type)
    yield "float64", model.double()
    if model.config._attn_implementation == "eager":
        try:
            model.set_attn_implementation(families._EXACT_EAGER)
        except (ValueError, AttributeError, KeyError):
            pass
        else:
            yield "float64, eager", model
    yield "float32", _varied(model_type)


def _varied(model_type: str) -> Any:
    """The model at the first scale that makes its greedy text varied and little noisy."""
    model, now = tiny.build(model_type), 1.0
    found: dict[float, int] = {}
    for scale in SCALES:
        tiny.scale(model, scale / now)
        now = scale
        text = plain_text(model, SITUATIONS[0])
        if isinstance(text, str):
            continue
        shaky = QUIET < (noise(model, text) or 0.0) < STRUCTURAL
        found[scale] = 0 if shaky else distinct(text)
        if found[scale] >= VARIED:
            return model
    best = max(found, key=lambda scale: found[scale], default=now)
    tiny.scale(model, best / now)
    return model


def distinct(text: Plain) -> int:
    """Distinct tokens that the first row generated."""
    return len(set(text.sequences[0, -NEW_TOKENS:].tolist()))


@torch.no_grad()
def noise(model: Any, text: Plain | None) -> float | None:
    """How far decoding is from one forward over the whole text, in parts of the largest logit."""
    if text is None or text.logits is None or len(text.sequences) > 1:
        return None
    try:
        whole = model(input_ids=text.sequences[:, :-1], use_cache=False).logits
    except Exception:  # noqa: BLE001 - then it is unknown
        return None
    steps = text.logits[:, 0]
    return float((whole[0, -len(steps) :] - steps).abs().max() / steps.abs().max())


def plain_text(model: Any, situation: Situation) -> Plain | str:
    """What the class's own `generate` gives, or why there is nothing to compare with."""
    try:
        first = Plain(*call(model, situation))
        if not torch.is_tensor(first.sequences) or first.sequences.ndim != 2:
            return "plain generate returns no rows of tokens"
        again = _with_logits(model, situation) or Plain(*call(model, situation))
    except Exception as problem:  # noqa: BLE001 - a class may fail in any way
        return f"plain generate fails: {short(problem)}"
    if not torch.equal(first.sequences, again.sequences):
        return "plain generate does not repeat itself"
    if again.logits is not None and bool(again.logits.isnan().any()):
        return "plain generate computes NaN"
    return again


def _with_logits(model: Any, situation: Situation) -> Plain | None:
    """The call again, with the logits of every step; None when the class does not return them."""
    try:
        output, state = call(model, situation, output_logits=True, return_dict_in_generate=True)
        return Plain(output.sequences, state, torch.stack(output.logits))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def short(problem: Exception) -> str:
    """The kind and the first line of an exception, and where it was raised."""
    line = (str(problem).strip().splitlines() or [""])[0][:160]
    place = traceback.extract_tb(problem.__traceback__)[-1]
    return f"{type(problem).__name__}: {line} ({place.filename.rpartition('/')[2]}:{place.lineno})"


def _draft_for(model: Any) -> Any:
    family = families.FAMILIES["llama"]
    vocab = {"vocab_size": vocabulary_size(model)}
    return replace(family, options={**family.options, **vocab}).build(torch.float32)


OPTIONS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "lookahead": lambda _: {"window": 4, "ngram": 4, "guesses": 4},
    "draft_model": lambda model: {"draft": _draft_for(model)},
    "eagle3": lambda model: {"draft": head_for(model), "depth": 3, "top_k": 3, "nodes": 9},
}
"""Options of methods that need some, or whose default sizes are more than a tiny text can use."""


def options_of(method: str, model: Any, truth: Truth) -> dict[str, Any]:
    """Options of a method; the drafters of the test suite are told the text."""
    if method in THROW_AWAY:
        return {"truth": truth}
    return OPTIONS[method](model) if method in OPTIONS else {}


def check(model: Any, situation: Situation, method: str, plain: Plain) -> Cell:
    """One cell."""
    starts = prompts(situation.rows)["attention_mask"].argmax(1).tolist()
    rows = zip(plain.sequences.tolist(), starts, strict=True)
    truth = tuple(tuple(row[start:]) for row, start in rows)
    cell = Cell(situation.name, method, "same")
    try:
        config = SpecConfig(method, options_of(method, model, truth))
        got, state = call(model, situation, specdec=config)
        stats = specdec.last_stats(model)
    except Exception as problem:  # noqa: BLE001 - counted as an error
        cell.outcome, cell.detail = "error", short(problem)
        return cell
    cell.mode, cell.reason = stats.mode, stats.mode_reason
    cell.tokens_per_forward = stats.tokens_per_forward
    if not torch.equal(got, plain.sequences):
        judged = judge.near_ties(model, situation, got, plain.sequences)
        cell.outcome, cell.detail = "margin" if judged else "differs", _parting(got, plain)
    elif not torch.equal(state, plain.state):
        cell.outcome, cell.detail = "differs", "the generator's state"
    return cell


def _parting(got: Tensor, plain: Plain) -> str:
    """Where two texts part."""
    shared = min(got.shape[1], plain.sequences.shape[1])
    places = (got[:, :shared] != plain.sequences[:, :shared]).nonzero().tolist()
    return f"first at [row, column] {places[0]}" if places else f"shape {list(got.shape)}"
