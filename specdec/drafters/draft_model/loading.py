"""Finds the draft model of a call and makes sure, before any forward, that it fits the target.

What is expensive (loading a checkpoint, comparing tokenizers, the self-test) is done once and kept
in the memory of the augmented model.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from specdec.artifacts.model_files import read_draft_model, read_tokenizer
from specdec.artifacts.places import DRAFT_MODEL, locate
from specdec.artifacts.tokenizers import tokenizer_fingerprint, tokenizer_in
from specdec.audit.broken_weights import check_weights
from specdec.errors import ConfigError, SpecdecError, VocabularyMismatchError
from specdec.hf.compat import unwrap, vocabulary_size
from specdec.targets.self_test import evaluating
from specdec.targets.watched_test import WatchedTest

_MEMORY = "draft_model.drafts"
_MOST_KEPT = 4  # drafts that the memory of one target holds at a time
_NO_VOCABULARY = 16  # special tokens alone, which is what some classes make out of no files
_MOST_PADDING = 512  # ids by which embeddings of one vocabulary are seen to differ


@dataclass
class ReadyDraft:
    """A draft model that was loaded and tested.

    Attributes:
        source: What the user named: the model itself, a folder or a hub id.
        model: The model, unwrapped.
        vocab_size: Ids that it has embeddings for.
        compared: The target's tokenizer and the draft's when they were found to agree.
        test: Its self-test, which follows the model.
        reason: What the self-test found; empty before it.
        runs_ragged: Whether it can run rows of different length at once, as the self-test says.
    """

    source: Any
    model: Any
    vocab_size: int
    compared: tuple[Any, Any] | None = None
    test: WatchedTest = field(default_factory=WatchedTest)
    reason: str = ""
    runs_ragged: bool = True


def check_draft(draft: Any) -> None:
    """Checks what can be told without loading anything or running a forward.

    Raises:
        ConfigError: It is neither a causal language model nor the name of one.
    """
    if isinstance(draft, str):
        locate(draft, DRAFT_MODEL)
        return
    config = getattr(draft, "config", None)
    wanted = "draft_model takes draft=: a loaded causal language model, a folder or a hub id"
    if config is None or not hasattr(draft, "get_output_embeddings"):
        raise ConfigError(f"{wanted}; got {type(draft).__name__}")
    if getattr(config, "is_encoder_decoder", False) or draft.get_output_embeddings() is None:
        raise ConfigError(
            f"{wanted}; {type(draft).__name__} is none; load it with AutoModelForCausalLM"
        )


def ready_draft(
    draft: Any,
    tokenizers: tuple[Any, Any],
    target_vocab: int,
    device: torch.device,
    memory: dict[str, Any],
) -> ReadyDraft:
    """The draft model of a call, loaded, compared and tested; from `memory` where possible.

    Args:
        draft: A model, a folder or a hub id.
        tokenizers: The target's and the draft's, None where they are not given.
        target_vocab: Ids that the target has embeddings for.
        device: Where a draft that is loaded here goes.
        memory: Survives from call to call.

    Raises:
        ConfigError: The draft cannot be loaded or cannot draft.
        VocabularyMismatchError: Its ids do not mean what the target's mean.
    """
    drafts: dict[str, ReadyDraft] = memory.setdefault(_MEMORY, {})
    key = f"{draft} on {device}" if isinstance(draft, str) else f"object {id(draft)}"
    found = drafts.get(key)
    if found is None or not (found.source is draft or found.source == key):
        model = _whole_model(draft, device)
        source = key if isinstance(draft, str) else draft
        found = ReadyDraft(source, model, vocabulary_size(model))
        while len(drafts) >= _MOST_KEPT:
            drafts.pop(next(iter(drafts)), None)
        drafts[key] = found
    _compare(found, draft, tokenizers, target_vocab)
    is_training = any(module.training for module in found.model.modules())
    with evaluating(found.model) if is_training else nullcontext():  # as it drafts
        capability = found.test.verdict(found.model)
    if capability.mode == "plain":
        raise ConfigError(
            f"draft {type(found.model).__name__} cannot draft, because {capability.reason}; "
            "choose another draft model"
        )
    found.reason, found.runs_ragged = capability.reason, capability.mode == "tree"
    return found


def _whole_model(draft: Any, device: torch.device) -> Any:
    """The draft model, unwrapped or loaded, with weights that can draft."""
    try:
        if isinstance(draft, str):
            return read_draft_model(draft).to(device)
        model = unwrap(draft)
        check_weights(model, f"draft {type(model).__name__}")
        return model
    except SpecdecError as problem:
        raise ConfigError(str(problem)) from problem  # it names the draft


def _compare(found: ReadyDraft, draft: Any, tokenizers: tuple[Any, Any], target_vocab: int) -> None:
    """Raises `VocabularyMismatchError` unless both models speak of the same tokens."""
    ours, theirs = tokenizers
    before = found.compared
    if before is not None and before[0] is ours and (theirs is None or theirs is before[1]):
        return
    if ours is not None and theirs is None and isinstance(draft, str):
        theirs = _tokenizer_of(draft)
    if ours is None or theirs is None:
        _compare_sizes(found, target_vocab)
    elif tokenizer_fingerprint(ours) != tokenizer_fingerprint(theirs):
        sizes = [len(tokenizer_in(one).get_vocab()) for one in (theirs, ours)]
        raise VocabularyMismatchError(
            f"the draft's tokenizer is not the target's: {sizes[0]} and {sizes[1]} tokens, or "
            "other rules; choose a draft of the target's own family"
        )
    found.compared = (ours, theirs)


def _compare_sizes(found: ReadyDraft, target_vocab: int) -> None:
    """Raises `VocabularyMismatchError` for numbers of ids that padding does not explain."""
    difference, larger = abs(found.vocab_size - target_vocab), max(found.vocab_size, target_vocab)
    if difference > min(_MOST_PADDING, larger // 16):
        raise VocabularyMismatchError(
            f"the draft has {found.vocab_size} token ids and the target {target_vocab}, more apart "
            "than padded embeddings are; choose a draft with the target's tokenizer, or pass "
            "tokenizer= and draft_tokenizer= to show that it has it"
        )


def _tokenizer_of(name: str) -> Any:
    """The tokenizer beside a checkpoint, or None where there is none."""
    try:
        found = read_tokenizer(locate(name, DRAFT_MODEL))
    except SpecdecError:  # without one, the sizes have to do
        return None
    return found if len(found) > _NO_VOCABULARY else None
