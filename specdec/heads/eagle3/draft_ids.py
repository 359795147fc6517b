"""The draft vocabulary's ids: `d2t` holds offsets, and target id = draft id + d2t[draft id]."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec.heads.eagle3.config import Eagle3Config


def checked_target_ids(d2t: Tensor, config: Eagle3Config) -> Tensor:
    """Target ids [D] of a draft vocabulary.

    Raises:
        ConfigError: `d2t` holds no offsets that give ascending ids of the target.
    """
    if d2t.shape != (config.draft_vocab_size,) or d2t.is_floating_point():
        raise ConfigError(
            f"d2t must hold {config.draft_vocab_size} integers, got {tuple(d2t.shape)} {d2t.dtype}"
        )
    ids = d2t.cpu().long() + torch.arange(config.draft_vocab_size)
    ascending = (
        bool((ids.diff() > 0).all()) and int(ids[0]) >= 0 and int(ids[-1]) < config.vocab_size
    )
    if not ascending:
        hint = "; it looks like absolute ids" if _absolute(d2t, config) else ""
        raise ConfigError(
            "d2t must be offsets: draft id + d2t must ascend and stay below vocab_size "
            f"{config.vocab_size}{hint}"
        )
    return ids


def _absolute(d2t: Tensor, config: Eagle3Config) -> bool:
    """Whether these are ids rather than offsets."""
    return bool((d2t.diff() > 0).all()) and int(d2t.max()) < config.vocab_size
