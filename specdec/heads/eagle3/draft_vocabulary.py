"""DraftVocabulary: the ids of the target that a head drafts among."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import ConfigError

_LEAST_TELLING = 16  # draft ids from which on a vocabulary without neighbours is no accident


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Draft id i is target id `ids[i]`.

    Files hold it as `d2t`, the offsets `ids[i] - i`, and `t2d`, a mask over the target's ids; a
    vocabulary of all ids is not written down.

    Attributes:
        ids: [D] int64 target ids, ascending, on the CPU.
        size: Ids V of the target.
    """

    ids: Tensor
    size: int

    def __post_init__(self) -> None:
        """Checks the ids; raises `ConfigError`."""
        ids = self.ids
        whole = ids.ndim == 1 and ids.dtype == torch.int64 and len(ids) > 0
        if not whole or not _ascend(ids, self.size):
            raise ConfigError(
                f"the ids of a draft vocabulary must ascend and stay below vocab_size {self.size}, "
                f"got {ids!r:.80}"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DraftVocabulary):
            return NotImplemented
        return self.size == other.size and torch.equal(self.ids, other.ids)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def whole(cls, size: int) -> DraftVocabulary:
        """All ids of a target."""
        return cls(torch.arange(size), size)

    @classmethod
    def read(
        cls, d2t: Tensor | None, t2d: Tensor | None, draft_size: int, size: int
    ) -> DraftVocabulary:
        """What the tensors of a file mean.

        Args:
            d2t: [D] integers, offsets; None where all ids can be drafted.
            t2d: [V] bool, or None.
            draft_size: D.
            size: V.

        Raises:
            ConfigError: `d2t` is missing or holds no offsets, or `t2d` names other tokens.
        """
        if draft_size == size:
            # Some trainers write both even so; then they must say nothing.
            if d2t is not None and bool(d2t.any()):
                raise ConfigError(
                    f"d2t must be all 0 where draft_vocab_size {draft_size} is vocab_size"
                )
            return cls.whole(size)
        if d2t is None:
            raise ConfigError(
                f"tensor 'd2t' is missing: draft_vocab_size {draft_size} is below vocab_size {size}"
            )
        if d2t.shape != (draft_size,) or d2t.is_floating_point():
            raise ConfigError(
                f"d2t must hold {draft_size} integers, got {tuple(d2t.shape)} {d2t.dtype}"
            )
        offsets, mask = d2t.cpu().long(), None if t2d is None else t2d.cpu().bool()
        ids = offsets + torch.arange(draft_size)
        if _ascend(ids, size) and mask is not None and torch.equal(mask, cls(ids, size).mask):
            return cls(ids, size)
        if _are_ids(offsets, mask, size):
            raise ConfigError(
                "d2t holds absolute ids, and it must hold offsets: the id of the target minus the "
                "id of the draft; subtract 0, 1, 2, ... from it"
            )
        if not _ascend(ids, size):
            raise ConfigError(
                "d2t must be offsets: draft id + d2t must ascend and stay below vocab_size "
                f"{size}, got {offsets!r:.80}"
            )
        if mask is not None:
            raise ConfigError("t2d and d2t name different tokens; one of them is another head's")
        return cls(ids, size)

    @property
    def is_whole(self) -> bool:
        """Whether every id of the target can be drafted."""
        return len(self.ids) == self.size

    @property
    def offsets(self) -> Tensor:
        """[D] int64, `d2t` of a file."""
        return self.ids - torch.arange(len(self.ids))

    @property
    def mask(self) -> Tensor:
        """[V] bool, `t2d` of a file."""
        return torch.zeros(self.size, dtype=torch.bool).index_fill_(0, self.ids, True)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it."""
        return {} if self.is_whole else {"d2t": self.offsets, "t2d": self.mask}


def _ascend(ids: Tensor, size: int) -> bool:
    """Whether these are different ids of a target, in order."""
    return bool((ids.diff() > 0).all()) and int(ids[0]) >= 0 and int(ids[-1]) < size


def _are_ids(numbers: Tensor, mask: Tensor | None, size: int) -> bool:
    """Whether these are ids and no offsets: the mask says so, or no vocabulary has so many gaps."""
    if not _ascend(numbers, size):
        return False
    if mask is not None:
        return int(mask.sum()) == len(numbers) and bool(mask[numbers].all())
    return len(numbers) >= _LEAST_TELLING
