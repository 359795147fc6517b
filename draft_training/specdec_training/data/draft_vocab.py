"""Chooses the draft vocabulary: the part of the target's tokens that a head can propose.

Most of what a target says is a small part of its vocabulary, and a head that scores only that part
is cheaper by as much. A token outside it costs one rejected draft, never a wrong text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec.heads.checkpoints.load import load_head
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary

_ROOM_FOR_SPECIALS = 16  # all special ids are taken when they fill at most a 16th


def build(counts: Tensor, size: int, always: Iterable[int] = ()) -> DraftVocabulary:
    """The `size` most frequent tokens, or all of them; equal counts go to the smaller id.

    Args:
        counts: int64 [V], how often the target says each token.
        size: D, entries of the draft vocabulary.
        always: Ids that belong to it however rare they are, EOS above all.

    Raises:
        ConfigError: D is below 1 or below the number of `always`, or an id is outside V.
    """
    counts = _checked(counts)
    vocabulary = len(counts)
    if size < 1:
        raise ConfigError(f"--draft-vocab must be at least 1, got {size}")
    if size >= vocabulary:
        return DraftVocabulary.whole(vocabulary)
    first = sorted({int(token) for token in always})
    outside = [token for token in first if not 0 <= token < vocabulary]
    if outside:
        raise ConfigError(f"token {outside[0]} is outside the vocabulary of {vocabulary} tokens")
    if len(first) > size:
        raise ConfigError(
            f"--draft-vocab {size} is too small for the {len(first)} tokens that every draft "
            "vocabulary holds; raise it"
        )
    ranked = counts.clone()
    ranked[first] = torch.iinfo(torch.int64).max
    # Sorting is stable: of equal counts, unseen ones included, the smaller id comes first.
    order = torch.sort(ranked, descending=True, stable=True).indices
    return DraftVocabulary(order[:size].sort().values, vocabulary)


def of_head(head: str, target: TargetFingerprint) -> DraftVocabulary:
    """The draft vocabulary of a head that is there already.

    Args:
        head: Folder or hub id.
        target: What the head must have been made for.

    Raises:
        ConfigError: It cannot be read, is another target's, or knows only a part of its ids.
    """
    found = load_head(head, target=target).head
    if found.config.vocab_size != target.vocab_size:
        raise ConfigError(
            f"--draft-vocab-of {head!r}: the head's vocab_size is {found.config.vocab_size}, the "
            f"target's {target.vocab_size}; train a new head"
        )
    return found.vocabulary


def coverage(counts: Tensor, vocabulary: DraftVocabulary) -> float:
    """Share of the counted tokens that the draft vocabulary holds, 0 to 1.

    Args:
        counts: int64 [V], how often each token is to be learnt.
        vocabulary: Of a head.
    """
    total = int(counts.sum())
    if vocabulary.is_whole or total == 0:
        return 1.0 if vocabulary.is_whole else 0.0
    return int(counts[vocabulary.ids].sum()) / total


def always_ids(tokenizer: Any, stop_ids: Iterable[int], used: Tensor, size: int) -> list[int]:
    """Ids that a draft vocabulary should hold whatever the counts say.

    Args:
        stop_ids: Ids that end an answer.
        used: int64 [V], how often each token occurs in the examples, prompts included.
        size: D, of the draft vocabulary that is to be chosen.

    Returns:
        Stop ids, BOS, and the special ids that occur (turn markers of the chat template); and all
        other special ids where they take up little of the draft vocabulary. Ascending.
    """
    vocabulary = len(used)
    specials = {int(token) for token in tokenizer.all_special_ids}
    needed = {int(token) for token in stop_ids}
    needed |= {t for t in (tokenizer.eos_token_id, tokenizer.bos_token_id) if t is not None}
    needed |= {token for token in specials if token < vocabulary and int(used[token])}
    if len(needed | specials) * _ROOM_FOR_SPECIALS <= size:
        needed |= specials
    return sorted(token for token in needed if 0 <= token < vocabulary)


def _checked(counts: Tensor) -> Tensor:
    if counts.ndim != 1 or not len(counts) or counts.is_floating_point():
        raise ConfigError(
            f"counts must be whole numbers [V], got {counts.dtype} {list(counts.shape)}"
        )
    if int(counts.min()) < 0:
        raise ConfigError("counts must not be negative; count the tokens again")
    return counts.to(torch.int64)
