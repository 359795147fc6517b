"""Runs a drawn call plain and speculatively, turn by turn, and says what differs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import specdec
from fuzz import parts
from fuzz.compare import EXACT, ROUNDED, Outcome, differences
from fuzz.draw import Call, Turn
from helpers.chains import tolerance
from helpers.names import CACHE, OLD
from specdec.api import capability
from specdec.drafters.draft_model import loading


class NoCallError(Exception):
    """The arguments cannot be made: a `GenerationConfig` refuses them, for example."""


@dataclass
class Result:
    """What a call showed.

    Attributes:
        call: The call.
        modes: Mode of each turn, "raises" where plain and ours raise alike.
        reasons: Why turns ran as plain `generate`.
        found: Differences; empty when there are none.
    """

    call: Call
    modes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)


def check(call: Call) -> Result:
    """Runs the turns of a call up to the first one that differs."""
    result = Result(call)
    dtype = getattr(torch, call.dtype)
    model = parts.load(call.family, dtype)
    folds = capability(model).mode == "chain"  # most of these compute in float32
    exact = dtype == torch.float64 and not (folds and tolerance(model) > EXACT)
    _forget_calls(vars(model)["_specdec"].memory)
    before: tuple[Any, Any] = (None, None)
    for index, turn in enumerate(call.turns):
        try:
            with _as_told(model, turn, call, dtype):
                plain = _run(model, turn, call, before[0], None)
                ours = _run(model, turn, call, before[1], plain)
        except NoCallError:
            result.modes.append("no call")
            break
        result.modes.append("raises" if plain.failed else ours.stats[0])
        if plain.failed:
            result.reasons.append(f"raises {type(plain.value).__name__}: {plain.value}"[:120])
        elif ours.stats[0] == "plain":
            result.reasons.append(f"plain, because {ours.stats[1]}")
        wrong = differences(plain, ours, EXACT if exact else ROUNDED)
        result.found += [f"turn {index + 1}: {text}" for text in wrong]
        before = (plain.value, ours.value)
        if wrong or plain.failed:
            break
    return result


def _forget_calls(memory: dict[str, Any]) -> None:
    """Drops what earlier calls left: it could not be repeated. Drafts stay, which take seconds."""
    for name in [name for name in memory if name != loading._MEMORY]:
        del memory[name]


@contextmanager
def _as_told(model: Any, turn: Turn, call: Call, dtype: torch.dtype) -> Iterator[None]:
    """Sets mode and options of the model for a turn, and puts them back."""
    options = copy.deepcopy(model.generation_config)
    names = {**vars(parts), "family": call.family, "dtype": dtype, "model": model}
    for name, text in turn.defaults.items():
        setattr(model.generation_config, name, eval(text, names))  # noqa: S307 - our own source
    model.train(turn.training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            model.eval()
            model.generation_config = options


def _run(model: Any, turn: Turn, call: Call, before: Any, plain: Outcome | None) -> Outcome:
    """One run of a turn: plain, or, given plain's outcome, ours."""
    names = {**vars(parts), "family": call.family, "dtype": getattr(torch, call.dtype)}
    names |= {"model": model, "before": before}
    try:
        given = eval(turn.given(), names)  # noqa: S307 - our own source
    except Exception as problem:
        raise NoCallError(str(problem)) from problem
    settings: Any = False
    if plain is not None:
        names["truth"] = parts.told(plain.value, plain.given)
        settings = eval(turn.settings, names)  # noqa: S307 - our own source
        vars(model)["_specdec"].last_stats = None
    options = copy.deepcopy(vars(model.config))
    value = parts.answer(model, given, turn.seed, settings)
    after = (model.generation_config.to_dict(), model.training, model.config.to_dict())
    vars(model.config).update(options)  # an early exit that raises leaves plain's model cut short
    mask, ids = given.get("attention_mask"), given.get("input_ids", given.get("inputs"))
    if mask is None and isinstance(ids, torch.Tensor):  # as `generate` guesses it
        mask = (ids != given.get("pad_token_id", 0)).long()
    outcome = Outcome(
        value,
        torch.get_rng_state(),
        parts.shown(given),
        given,
        after,
        mask=mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None,
        stats=_stats(model),
    )
    if not outcome.failed:
        outcome.next_turn = _next_turn(model, outcome)
    return outcome


def _stats(model: Any) -> tuple[str, str]:
    handle = vars(model)["_specdec"]
    if handle.last_stats is None:
        return ("off", "")
    stats = specdec.last_stats(model)
    return (stats.mode, stats.mode_reason)


@torch.no_grad()
def _next_turn(model: Any, outcome: Outcome) -> dict[str, Any] | Exception | None:
    """What a plain turn over the cache gives that a call returned or filled."""
    caches = [parts.held(outcome.value), outcome.given.get(CACHE), outcome.given.get(OLD)]
    cache = next((found for found in caches if found is not None), None)
    if not hasattr(cache, "get_seq_length"):
        return None
    text = getattr(outcome.value, "sequences", outcome.value)
    ids = torch.cat([text[:, -1:], parts.rows(7, [2]).expand(len(text), -1)], dim=1)
    held, found = copy.deepcopy(cache), {"type": type(cache).__name__, "slots": _slots(cache)}
    mask = torch.ones(len(text), (found["slots"] or text.shape[1] - 1) + 3, dtype=torch.long)
    if outcome.mask is not None:
        copies = len(text) // len(outcome.mask)
        own = outcome.mask.repeat_interleave(copies, 0)[:, : mask.shape[1]].long()
        mask[:, : own.shape[1]] = own
    try:
        answer = type(model).generate(
            model, ids, attention_mask=mask, do_sample=False,
            **{CACHE: held}, max_new_tokens=2, min_new_tokens=2, output_logits=True,
            return_dict_in_generate=True, stop_strings=None, num_beams=1, num_return_sequences=1,
            generation_config=parts.GenerationConfig(pad_token_id=0),
        )  # fmt: skip
    except Exception as problem:  # noqa: BLE001 - compared
        return problem
    return {**found, "logits": torch.stack(answer.logits)}


def _slots(cache: Any) -> int | None:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # nothing in it counts its tokens
        return None
