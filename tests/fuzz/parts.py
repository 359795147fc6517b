"""What the source of a drawn call may name: models, prompts, caches, processors, streamers.

A printed call is Python that runs after `from fuzz.parts import *`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import specdec
from helpers.chains import truth_of
from helpers.drafters import THROW_AWAY
from helpers.families import VOCAB, draft_of, model_of
from helpers.heads import head_for
from helpers.names import CACHE
from specdec import SpecConfig
from specdec.demo import load_target, load_tokenizer
from specdec.registry import methods

__all__ = [
    "Banning",
    "Counting",
    "DynamicCache",
    "EndAt",
    "EndOn",
    "EosTokenCriteria",
    "FailAt",
    "GenerationConfig",
    "LogitsProcessorList",
    "MaxLengthCriteria",
    "Nudge",
    "SpecConfig",
    "StaticCache",
    "StoppingCriteriaList",
    "Stream",
    "Unsure",
    "WatermarkingConfig",
    "answer",
    "draft",
    "filled",
    "grown",
    "head",
    "held",
    "load",
    "longer",
    "new_ids",
    "padding",
    "register",
    "rows",
    "tokenizer_of",
    "told",
    "torch",
]


def register() -> None:
    """Adds the drafters of the test suite, which are told the text, to the methods."""
    for name, drafter in THROW_AWAY.items():
        methods.register(name, drafter)


def answer(model: Any, given: Mapping[str, Any], seed: int, settings: Any) -> Any:
    """What a call returns, or the exception that it raises."""
    arguments = dict(given)
    first = [arguments.pop("inputs")] if "inputs" in arguments else []
    torch.manual_seed(seed)
    try:
        return model.generate(*first, **arguments, specdec=settings)
    except Exception as problem:  # noqa: BLE001 - compared
        return problem


def told(output: Any, given: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """The text of a call's rows, for the drafters that are told it; nothing where there is none."""
    call = {**given, "input_ids": given.get("input_ids", given.get("inputs"))}
    try:
        return truth_of(output, call)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError):
        return ()


@cache
def load(family: str, dtype: torch.dtype) -> Any:
    """An augmented model that drafts nothing unless a call asks for it; "demo" is the bundled."""
    if family == "demo":
        return specdec.augment(load_target(dtype), "none")
    return model_of(family, dtype)


@cache
def draft(family: str, dtype: torch.dtype) -> Any:
    """A draft model that often agrees with the family's; the bundled model drafts for itself."""
    return load_target(dtype) if family == "demo" else draft_of(family, dtype)


@cache
def head(family: str, dtype: torch.dtype) -> Any:
    """A random EAGLE-3 head for the family's model."""
    return head_for(load(family, dtype))


@cache
def tokenizer_of(family: str) -> Any:
    """The bundled model's tokenizer, or one of a character a token for the tiny models."""
    if family == "demo":
        return load_tokenizer()
    inner = Tokenizer(BPE({chr(32 + index): index for index in range(VOCAB)}, []))
    inner.decoder = Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=chr(32), clean_up_tokenization_spaces=False
    )


def rows(seed: int, lengths: Sequence[int], pad: int = 0) -> Tensor:
    """[B, S] left-padded ids; each row repeats itself, so that n-grams find something."""
    ids = torch.full((len(lengths), max(lengths)), pad)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        half = torch.randint(3, VOCAB, (length // 2 + 1,), generator=generator)
        ids[row, max(lengths) - length :] = torch.cat([half, half])[:length]
    return ids


def padding(lengths: Sequence[int], holes: Sequence[tuple[int, int]] = ()) -> Tensor:
    """[B, S] mask of `rows`, with holes at (row, column)."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, max(lengths) - length :] = 1
    for row, column in holes:
        mask[row, column] = 0
    return mask


def new_ids(before: Any, seed: int, count: int) -> Tensor:
    """[B, 1 + count] the earlier turn's last token, which no cache holds yet, and what follows."""
    return longer(before, seed, count)[:, -1 - count :]


def longer(before: Any, seed: int, count: int) -> Tensor:
    """[B, S + count] the earlier turn's whole text, and more."""
    text = before.sequences
    return torch.cat([text, rows(seed, [count] * len(text))], dim=1)


def grown(before: Any, mask: Tensor, count: int) -> Tensor:
    """[B, S + count] the mask of the first turn's prompt, with ones for all that came after."""
    text = before.sequences
    mask = mask.repeat_interleave(len(text) // len(mask), 0)
    width = text.shape[1] + count - mask.shape[1]
    return torch.cat([mask, mask.new_ones(len(mask), width)], dim=1)


def held(output: Any) -> Any:
    """The cache that a call returned, or None."""
    names = [name for name in (CACHE, "cache_params") if getattr(output, name, None) is not None]
    return getattr(output, names[0]) if names else None


def filled(model: Any, cache: Any, ids: Tensor, mask: Tensor) -> Any:
    """The cache after an earlier plain turn over `ids`."""
    with torch.random.fork_rng():
        call = {"attention_mask": mask, CACHE: cache, "max_new_tokens": 1, "do_sample": False}
        type(model).generate(model, ids, **call)
    return cache


class Nudge(LogitsProcessor):
    """Depends on its arguments alone, and writes down what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.tolist())
        return scores + 2 * torch.sin(torch.arange(scores.shape[1]) * input_ids.shape[1])


class Banning(Nudge):
    """Counts its calls, and bans other tokens every time."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.tolist())
        scores = scores.clone()
        scores[:, len(self.seen) % 5 :: 5] = -float("inf")
        return scores


class FailAt(Nudge):
    """Raises in its call number `step`; as processor, criterion or streamer."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    @property
    def has_failed(self) -> bool:
        return len(self.seen) >= self.step

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.put(input_ids)
        return scores if isinstance(scores, Tensor) else torch.zeros(len(input_ids)).bool()

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())
        if self.has_failed:
            raise LookupError(f"call number {self.step}")

    def end(self) -> None:
        self.seen.append("end")


class EndAt(StoppingCriteria):
    """Ends all rows at a length."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, list[Any]()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append((input_ids.tolist(), None if scores is None else len(scores)))
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class EndOn(EndAt):
    """Ends a row with any of the tokens below `length`."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(input_ids.tolist())
        return input_ids[:, -1] < self.length


class Counting(EndAt):
    """Ends all rows in its call number `length`."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(input_ids.tolist())
        return torch.full((len(input_ids),), len(self.seen) >= self.length)


class Unsure(EndAt):
    """Ends rows whose last scores are flat; without scores, those that have `length` tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(input_ids.tolist())
        if not scores:
            return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)
        return scores[-1].softmax(-1).amax(-1) < 0.2


class Stream(BaseStreamer):
    """Writes down all that it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def shown(arguments: Mapping[str, Any]) -> list[list[Any]]:
    """What the processors, criteria and streamers among the arguments have seen."""
    found = []
    for value in arguments.values():
        for each in value if isinstance(value, list) else [value]:
            if hasattr(each, "seen"):
                found.append(each.seen)
    return found
