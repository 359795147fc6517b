"""Compares what two runs of one call gave: values, exceptions, generator, and all that they left.

What differs by design is named here, and nowhere else:

- A streamer is told of a round at its end: when it raises, generator and processors are ahead.
- Slots of padding in a returned cache hold nothing: a next turn has to mask them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EXACT, ROUNDED = 1e-6, 2e-3
"""Largest difference between values that is rounding, in parts of the largest of them: of models in
float64, whose scores and logits are reported in float32; and of those that compute in float32."""

_BY_STEP = ("scores", "logits", "hidden_states")


@dataclass
class Outcome:
    """What one run of a call gave, and what it left behind.

    Attributes:
        value: What was returned, or the exception.
        generator: State of the generator.
        seen: What processors, criteria and streamers were shown.
        given: The arguments after the call.
        model: Options and mode of the model after the call.
        next_turn: What a plain turn over the cache gave; None without a cache.
        mask: [B, S] of the prompt; None without one.
    """

    value: Any
    generator: Tensor
    seen: list[list[Any]]
    given: Mapping[str, Any]
    model: Any
    next_turn: Any = None
    mask: Tensor | None = None
    stats: Any = field(default=None, compare=False)

    @property
    def failed(self) -> bool:
        return isinstance(self.value, Exception)


def differences(plain: Outcome, ours: Outcome, bound: float = EXACT) -> list[str]:
    """What differs, in words; empty when nothing does."""
    if plain.failed or ours.failed:
        found = _exceptions(plain.value, ours.value)
    else:
        found = list(_returned(plain, ours, bound))
    ahead = plain.failed and getattr(plain.given.get("streamer"), "has_failed", False)
    if not ahead and not torch.equal(plain.generator, ours.generator):
        found.append("the generator stands elsewhere")
    if not ahead and plain.seen != ours.seen:
        found.append(f"processors, criteria or streamers saw {_first(plain.seen, ours.seen)}")
    found += [
        f"the argument {name!r} was changed"
        for name, value in plain.given.items()
        if isinstance(value, Tensor) and not torch.equal(value, ours.given[name])
    ]
    if plain.model != ours.model:
        found.append("the model's options or mode were changed")
    return found


def _exceptions(plain: Any, ours: Any) -> list[str]:
    texts = [
        f"{type(value).__name__}: {value}" if isinstance(value, Exception) else "an answer"
        for value in (plain, ours)
    ]
    return [] if texts[0] == texts[1] else [f"plain gave {texts[0]!r}, ours {texts[1]!r}"]


def _returned(plain: Outcome, ours: Outcome, bound: float) -> Iterator[str]:
    if type(plain.value) is not type(ours.value):
        yield f"plain returned a {type(plain.value).__name__}, ours a {type(ours.value).__name__}"
        return
    sequences = [getattr(outcome.value, "sequences", outcome.value) for outcome in (plain, ours)]
    if not _same_ids(*sequences):
        yield f"text: plain {_listed(sequences[0])}, ours {_listed(sequences[1])}"
        return
    if isinstance(plain.value, Tensor):
        yield from _next_turn(plain.next_turn, ours.next_turn, bound)
        return
    if list(plain.value.keys()) != list(ours.value.keys()):
        yield f"plain returned {list(plain.value.keys())}, ours {list(ours.value.keys())}"
        return
    for name, value in plain.value.items():
        other = ours.value[name]
        if name in _BY_STEP:
            yield from _steps(name, value, other, bound)
        elif "cache" not in name and "past" not in name and name != "sequences":
            yield from _tensors(name, value, other, bound)
    yield from _next_turn(plain.next_turn, ours.next_turn, bound)


def _same_ids(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.dtype == other.dtype and torch.equal(one, other)


def _steps(name: str, one: Any, other: Any, bound: float) -> Iterator[str]:
    """Entries step by step, padding before the prompt and after a row's end included."""
    if one is None or other is None or len(one) != len(other):
        if one is not other:
            yield f"{name}: plain has {_length(one)} entries, ours {_length(other)}"
        return
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for layer, (left, right) in enumerate(zip(_layers(a), _layers(b), strict=False)):
            if left.shape != right.shape or left.dtype != right.dtype:
                yield (
                    f"{name} of step {step}: {left.dtype} {tuple(left.shape)}, ours "
                    f"{right.dtype} {tuple(right.shape)}"
                )
                return
            if not _close(left, right, bound):
                yield (
                    f"{name} of step {step}, layer {layer}, differ by {_distance(left, right):.1e}"
                )
                return


def _layers(entry: Any) -> tuple[Tensor, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _tensors(name: str, one: Any, other: Any, bound: float) -> Iterator[str]:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        for a, b in zip(one, other, strict=True):
            yield from _tensors(name, a, b, bound)
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or not _close(one, other, bound):
            yield f"{name} differs"
    elif type(one) is not type(other):
        yield f"{name}: plain has a {type(one).__name__}, ours a {type(other).__name__}"


def _next_turn(one: Any, other: Any, bound: float) -> Iterator[str]:
    """Of a plain turn over the caches that the calls left."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        yield from (f"the next turn: {text}" for text in _exceptions(one, other))
    elif one is None or other is None:
        if one is not other:
            yield f"the cache: plain left {type(one).__name__}, ours {type(other).__name__}"
    elif one.keys() != other.keys():
        yield f"the cache: plain has {one.keys()}, ours {other.keys()}"
    else:
        for name, value in one.items():
            if isinstance(value, Tensor) and not _close(value, other[name], 10 * bound):
                yield f"the next turn's {name} differs by {_distance(value, other[name]):.1e}"
            elif not isinstance(value, Tensor) and value != other[name]:
                yield f"the cache's {name}: plain {value}, ours {other[name]}"


def _close(one: Tensor, other: Tensor, bound: float) -> bool:
    if one.shape != other.shape:
        return False
    if not one.numel():
        return True
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    kept = one.isfinite()
    if not torch.equal(one[~kept].nan_to_num(7.0), other[~kept].nan_to_num(7.0)):
        return False
    if not bool(kept.any()):
        return True
    size = max(float(one[kept].abs().max()), 1e-3)
    return float((one[kept] - other[kept]).abs().max()) <= bound * size


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("nan")
    return float((one.double() - other.double()).abs().nan_to_num(0.0).max())


def _length(value: Any) -> object:
    return None if value is None else len(value)


def _listed(ids: Any) -> Any:
    return ids.tolist() if isinstance(ids, Tensor) else ids


def _first(one: list[list[Any]], other: list[list[Any]]) -> str:
    """Where two records part."""
    for a, b in zip(one, other, strict=False):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            if at is None:
                return f"{len(a)} things with plain, {len(b)} with ours"
            return f"{a[at]} as number {at} with plain, {b[at]} with ours"
    return "more or less"
