"""What a head is to learn from a batch: where, and what the target says there.

Slot t of step s predicts token t + 2 + s and is compared with the target's distribution at position
t + 1 + s. So one row of the target's distribution, at position p, serves every step s: from slot
p - 1 - s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from specdec_training.contracts import FeatureSource, TokenBatch

_CHUNK_CPU, _CHUNK_ELSEWHERE = 2**20, 2**25  # elements of logits that are multiplied at once
_NEARLY_ALL = 0.95  # of the slots: choosing them would take longer than the others do
_SIZES = 32  # that a choice of slots may have
_BLOCK = 64  # numbers compared by value alone
_ROWS = 64  # chunks are multiples of it: libraries prepare, and keep, code for every new shape


@dataclass(frozen=True, slots=True)
class Slots:
    """Where a batch has something to learn; known on the host, before the target has run.

    Attributes:
        position: [M] int64, `row * T + p` of the positions whose next token is to be predicted.
        room: [M] int64, how many TTT steps reach it: the token stands that deep in its document.
        counts: Positions that step s reaches, for every step.
    """

    position: Tensor
    room: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, batch: TokenBatch, steps: int) -> Slots:
        """Reads them off documents and loss mask; nothing reaches across documents."""
        width, mask = batch.token_ids.shape[1], batch.loss_mask.cpu()
        positions, rooms = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
        for document in batch.documents:
            learnt = mask[document.row, document.start + 2 : document.stop].nonzero().flatten()
            positions.append(document.row * width + document.start + 1 + learnt)
            rooms.append((learnt + 1).clamp(max=steps))
        room = torch.cat(rooms)
        counts = tuple(int((room > step).sum()) for step in range(steps))
        return cls(torch.cat(positions), room, counts)

    def reached(self, size: int) -> Tensor | None:
        """[N] int64 slots that some step's loss reaches, of `size`; None for nearly all or none.

        N has `_SIZES` values, so that kernels see few shapes; any other slots make up the rest.
        """
        needed = torch.zeros(size, dtype=torch.bool)
        for step in range(len(self.counts)):
            needed[self.position[self.room > step] - 1 - step] = True
        multiple = -(-size // _SIZES)
        count = -(-int(needed.sum()) // multiple) * multiple
        if not 0 < count < _NEARLY_ALL * size:
            return None
        return needed.sort(descending=True, stable=True).indices[:count]


@dataclass(frozen=True, slots=True)
class Teacher:
    """What the target says at those positions.

    Attributes:
        position: [M] as in `Slots`, on the device.
        weight: [K, M] fp32, 1 where step s reaches the position and the target's likeliest token is
            in the draft vocabulary, else 0.
        hidden: [M, Ht] last hidden states, or None when `probs` are kept.
        probs: [M, D] fp32 over the draft vocabulary, or None when they are too large to keep.
        best: [M] draft id of the target's likeliest token; of any token where the weight is 0.
        source: Turns `hidden` into logits.
        draft_ids: [D] target ids of the draft vocabulary, None for all.
    """

    position: Tensor
    weight: Tensor
    hidden: Tensor | None
    probs: Tensor | None
    best: Tensor
    source: FeatureSource
    draft_ids: Tensor | None

    @property
    def counts(self) -> Tensor:
        """[K] fp32, tokens with a loss at every step."""
        return self.weight.sum(1)

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, D] probabilities over the draft vocabulary of positions `start` to `stop`."""
        if self.probs is not None:
            return self.probs[start:stop]
        if self.hidden is None:
            raise RuntimeError("a teacher holds hidden states or probabilities")
        return _restricted(self.source.target_logits(self.hidden[start:stop]), self.draft_ids)


@torch.no_grad()
def make_teacher(
    source: FeatureSource,
    last_hidden: Tensor,
    slots: Slots,
    steps: int,
    draft_ids: Tensor | None,
    keep_bytes: int,
) -> Teacher:
    """Asks the target once for every position with something to learn.

    Args:
        source: Asked for logits; the target itself, or recorded features.
        last_hidden: [B, T, Ht] of the batch.
        slots: Positions with a loss at some step.
        steps: TTT steps K.
        draft_ids: [D] ascending target ids of the draft vocabulary on the device, None for all.
        keep_bytes: Probabilities that take at most this much are kept, others are computed again
            from the hidden states when the loss needs them.
    """
    # 1. The states of every position that something is to be learnt of, whichever row it is in.
    device = last_hidden.device
    position, room = (_rounded_up(x).to(device) for x in (slots.position, slots.room))
    hidden = last_hidden.flatten(0, 1)[position]
    size = 0 if not len(hidden) else _vocabulary(source, hidden, draft_ids)
    probs: Tensor | None = None
    if len(hidden) * size * 4 <= keep_bytes:
        wide = torch.promote_types(torch.float32, hidden.dtype)
        probs = hidden.new_empty(len(hidden), size, dtype=wide)

    # 2. Their logits, a chunk at a time; the likeliest token, and whether it can be drafted.
    best, valid = torch.zeros_like(position), torch.zeros_like(position, dtype=torch.bool)
    for start, stop in chunks(len(hidden), max(size, 1), device):
        logits = source.target_logits(hidden[start:stop])
        best[start:stop], valid[start:stop] = _in_draft(likeliest(logits), draft_ids)
        if probs is not None:
            probs[start:stop] = _restricted(logits, draft_ids)

    # 3. A step learns from a position that it reaches and whose token it can draft.
    reached = room > torch.arange(steps, device=device)[:, None]
    weight = (reached & valid).float()
    if device.type == "cpu":  # counting what is valid costs no waiting there
        some = weight[0].sort(descending=True, stable=True).indices
        some = some[: -(-int(weight[0].sum()) // _ROWS) * _ROWS]
        if len(some) < len(position):
            position, best, hidden = position[some], best[some], hidden[some]
            weight = weight[:, some]
            probs = None if probs is None else probs[some]
    kept = hidden if probs is None else None
    return Teacher(position, weight, kept, probs, best, source, draft_ids)


def _rounded_up(rows: Tensor) -> Tensor:
    """Rows of zeros behind, up to a multiple of `_ROWS`; no step reaches them."""
    return functional.pad(rows, (0, -len(rows) % _ROWS))


def _vocabulary(source: FeatureSource, hidden: Tensor, draft_ids: Tensor | None) -> int:
    return len(draft_ids) if draft_ids is not None else source.target_logits(hidden[:1]).shape[-1]


def likeliest(logits: Tensor) -> Tensor:
    """[...] `logits.argmax(-1)` of [..., n].

    On a CPU torch looks for the place of a maximum one number at a time, but for its value with
    the whole width of the processor. So blocks are compared by value, then one is searched.
    """
    size = logits.shape[-1]
    if logits.device.type != "cpu" or size % _BLOCK or not size:
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, _BLOCK))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.take_along_dim(block[..., None], -2)[..., 0, :].argmax(-1)
    found: Tensor = block[..., 0] * _BLOCK + inside
    return found


def _in_draft(best: Tensor, draft_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """([n] draft ids of the target's likeliest tokens, [n] whether they are draft ids at all)."""
    if draft_ids is None:
        return best, torch.ones_like(best, dtype=torch.bool)
    at = torch.searchsorted(draft_ids, best).clamp(max=len(draft_ids) - 1)
    return at, draft_ids[at] == best


def _restricted(logits: Tensor, draft_ids: Tensor | None) -> Tensor:
    """The target's distribution over the draft vocabulary, renormalised; fp32."""
    wide = torch.promote_types(torch.float32, logits.dtype)
    return (logits if draft_ids is None else logits.index_select(1, draft_ids)).to(wide).softmax(-1)


def chunks(count: int, size: int, device: torch.device) -> list[tuple[int, int]]:
    """[start, stop) of the rows that are multiplied at once, of `count` rows of `size` logits."""
    most = _CHUNK_CPU if device.type == "cpu" else _CHUNK_ELSEWHERE
    step = max(most // size // _ROWS * _ROWS, _ROWS)
    return [(start, min(start + step, count)) for start in range(0, count, step)]
