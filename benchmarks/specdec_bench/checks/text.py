"""Compares what an arm wrote with what plain decoding wrote, token by token.

In fp32 and fp64 the text is the same or it is wrong. In half precision everything that is not
plain's own forward rounds differently, so texts may part at near-ties; there the regret rule of
`specdec.audit.exactness` decides about every token from the first difference on, each on the
prefix that the arm itself wrote. A verifier that lets an unchecked token through fails it at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from specdec.audit.exactness import reference_model
from specdec.errors import ConfigError, SpecdecError
from specdec.hf.attention import attention_name
from specdec_bench.checks.teacher_forced import Requests, judge
from specdec_bench.contracts import Unit
from specdec_bench.results.records import Setting
from specdec_bench.results.values import Verdict

Finding = tuple[Verdict, dict[str, int], tuple[int, int] | None, float | None]
"""Verdict, tokens by verdict, [row, position] of the first difference, worst regret over noise."""

_HALF = ("bfloat16", "float16")
_WHOLE = ("float32", "float64")
_FP64_OVER_HALF = 4.5  # memory of the reference over that of the model, with room to work in


class ReferenceModel:
    """The fp64 copy of the model in use, made when a text first differs, and once for each model.

    Only one copy is held. It lies beside the model where the device has room for it and can
    compute in fp64, else on the CPU.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[Any] | None = None
        self._copy: Any = None
        self._trusted: set[Setting] = set()

    @property
    def made(self) -> bool:
        """Whether a copy is held."""
        return self._copy is not None

    def of(self, model: Any) -> Any:
        """The fp64 copy of `model`.

        Raises:
            SpecdecError: The model has no fp64 form, as quantised ones have not.
        """
        if self._model is None or self._model() is not model:
            self._copy, self._trusted = None, set()  # before the new one: never two at a time
            self._copy = _fp64_copy(model)
            self._model = weakref.ref(model)
        return self._copy

    def trusts(self, setting: Setting) -> bool:
        """Whether plain's own greedy text was seen to pass the rule in this setting."""
        return setting in self._trusted

    def trust(self, setting: Setting) -> None:
        """Notes that it did."""
        self._trusted.add(setting)


def _fp64_copy(model: Any) -> Any:
    """`reference_model`, on a device that can hold it, with an attention that has fp64."""
    attention = attention_name(model.config) or "sdpa"
    try:
        reference = reference_model(model, None if _fits(model) else "cpu")
        if attention not in ("sdpa", "eager"):
            reference.set_attn_implementation("eager")
    except (ValueError, RuntimeError, TypeError) as problem:
        raise SpecdecError(
            f"no fp64 copy of {type(model).__name__} to judge half-precision text with: {problem}; "
            "measure in float32, or leave the text check out and say so"
        ) from problem
    return reference


def _fits(model: Any) -> bool:
    """Whether the model's device has room for the copy; Apple's has no fp64 at all."""
    parameters = list(model.parameters())
    device = parameters[0].device
    if device.type == "cpu":
        return True
    if device.type != "cuda":
        return False
    size = sum(p.numel() * p.element_size() for p in parameters)
    free: int = torch.cuda.mem_get_info(device)[0]
    return bool(free > _FP64_OVER_HALF * size)


def check_text(
    reference: ReferenceModel,
    model: Any,
    unit: Unit,
    emitted: Sequence[Sequence[int]],
    setting: Setting,
) -> Finding:
    """Judges one arm's text of one unit.

    Args:
        reference: Makes the fp64 model when it is needed.
        model: The target in the setting's dtype; only its plain forward is used.
        unit: Prompts, plain's texts and the seed.
        emitted: New tokens of each row, prompt not included.
        setting: dtype, batch and temperature.

    Returns:
        The verdict; tokens by "exact", "near_tie" and "wrong" (together, all that plain emitted and
        what came too much); [row, position] of the first difference, None when there is none; the
        largest regret over rounding noise, None where no regret was measured. In fp32 and fp64,
        all of a row from its first difference on is wrong: the promise is the text.

    Raises:
        ConfigError: The setting's dtype is unknown, or rows are missing.
        SpecdecError: Plain's own text breaks the rule, so that the rule cannot judge: processors
            or warpers beyond the temperature are set.
    """
    if setting.dtype not in _HALF + _WHOLE:
        known = ", ".join(_WHOLE + _HALF)
        raise ConfigError(f"no text rule for dtype {setting.dtype!r}; known are {known}")
    texts = [list(row) for row in unit.text_ids]
    rows = [list(row) for row in emitted]
    if len(rows) != len(texts):
        raise ConfigError(f"an arm gave {len(rows)} rows where plain has {len(texts)}")
    firsts = [_first_difference(row, text) for row, text in zip(rows, texts, strict=True)]
    parted = [(row, first) for row, first in enumerate(firsts) if first is not None]
    if not parted:
        return "exact", _counts(exact=sum(map(len, texts))), None, None
    if setting.dtype in _WHOLE or _impossible(rows, model):
        return _wrong_from(parted, rows, texts)
    _check_rule(reference, model, unit, setting)
    return _by_regret(reference, model, unit, rows, firsts, setting)


def _counts(exact: int = 0, near_tie: int = 0, wrong: int = 0) -> dict[str, int]:
    return {"exact": exact, "near_tie": near_tie, "wrong": wrong}


def _first_difference(row: Sequence[int], text: Sequence[int]) -> int | None:
    """Where two rows part, the end of the shorter one included."""
    for index, (mine, plain) in enumerate(zip(row, text, strict=False)):
        if mine != plain:
            return index
    return None if len(row) == len(text) else min(len(row), len(text))


def _impossible(rows: Sequence[Sequence[int]], model: Any) -> bool:
    """Whether a row holds an id that the target does not have."""
    vocabulary = model.config.get_text_config().vocab_size
    return any(not 0 <= token < vocabulary for row in rows for token in row)


def _wrong_from(
    parted: Sequence[tuple[int, int]], rows: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> Finding:
    """The verdict where the text is the promise."""
    wrong = sum(max(len(rows[row]), len(texts[row])) - first for row, first in parted)
    total = sum(max(len(row), len(text)) for row, text in zip(rows, texts, strict=True))
    return "wrong", _counts(exact=total - wrong, wrong=wrong), parted[0], None


def _check_rule(reference: ReferenceModel, model: Any, unit: Unit, setting: Setting) -> None:
    """Raises unless plain's own text passes; sampled texts are tried each, greedy ones once."""
    if reference.trusts(setting):
        return
    judged = judge(reference.of(model), model, _requests(unit, setting), unit.text_ids)
    if bool(judged.wrong().any()):
        raise SpecdecError(
            "plain's own text breaks the regret rule, so the rule cannot judge the others: the "
            "call changes scores in other ways than by temperature (see top_k, top_p, "
            "repetition_penalty in the model's generation config)"
        )
    if setting.temperature == 0:
        reference.trust(setting)


def _requests(unit: Unit, setting: Setting) -> Requests:
    return Requests(unit.prompt_ids, unit.record.seed, setting.temperature)


def _by_regret(
    reference: ReferenceModel,
    model: Any,
    unit: Unit,
    rows: Sequence[Sequence[int]],
    firsts: Sequence[int | None],
    setting: Setting,
) -> Finding:
    """The verdict of half precision."""
    texts = unit.text_ids
    # Rows must be equally long to share forwards as in the run; what plain wrote fills them up.
    filled = [[*row[: len(text)], *text[len(row) :]] for row, text in zip(rows, texts, strict=True)]
    judged = judge(reference.of(model), model, _requests(unit, setting), filled)
    bad, plain = judged.wrong().tolist(), judged.is_plains.tolist()
    ratios = judged.ratios().tolist()
    counts, worst = _counts(), 0.0
    for index, (row, text, first) in enumerate(zip(rows, texts, firsts, strict=True)):
        start = len(text) if first is None else first
        counts["exact"] += start
        counts["wrong"] += abs(len(row) - len(text))
        for position in range(start, min(len(row), len(text))):
            good = "exact" if plain[index][position] else "near_tie"
            counts["wrong" if bad[index][position] else good] += 1
            worst = max(worst, ratios[index][position])
    first_row = next(index for index, first in enumerate(firsts) if first is not None)
    verdict: Verdict = "wrong" if counts["wrong"] else "near_tie"
    return verdict, counts, (first_row, firsts[first_row] or 0), worst
