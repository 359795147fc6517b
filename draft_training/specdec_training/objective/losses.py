"""The loss of an EAGLE-3 head: what it drafts against what the target would say.

Slot t of step s predicts token t + 2 + s and is compared with the target's distribution at position
t + 1 + s. So one row of the target's distribution, at position p, serves every step s: from slot
p - 1 - s. Logits of the head exist for a chunk of such positions at a time, and the output matrix
gets its gradient chunk by chunk, so that no [T, D] tensor outlives the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from specdec_training.contracts import FeatureSource, TokenBatch

LossKind = Literal["ce", "kl", "tv", "lk"]

_LK_SHARPNESS = 3.0  # eta of arXiv 2602.23881
# Elements of logits that are multiplied at once, and of those that are looked at: tiles stay in a
# processor's nearest cache.
_CHUNK_CPU, _TILE_CPU, _CHUNK_ELSEWHERE = 2**20, 2**17, 2**25
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
        source: The target.
        last_hidden: [B, T, Ht] of the batch.
        slots: Where to ask.
        steps: TTT steps K.
        draft_ids: [D] ascending target ids of the draft vocabulary on the device, None for all.
        keep_bytes: Probabilities that take at most this much are kept, others are computed again
            from the hidden states when the loss needs them.
    """
    device = last_hidden.device
    position, room = (_rounded_up(x).to(device) for x in (slots.position, slots.room))
    hidden = last_hidden.flatten(0, 1)[position]
    size = 0 if not len(hidden) else _vocabulary(source, hidden, draft_ids)
    probs: Tensor | None = None
    if len(hidden) * size * 4 <= keep_bytes:
        wide = torch.promote_types(torch.float32, hidden.dtype)
        probs = hidden.new_empty(len(hidden), size, dtype=wide)
    best, valid = torch.zeros_like(position), torch.zeros_like(position, dtype=torch.bool)
    for start, stop in _chunks(len(hidden), max(size, 1), device):
        logits = source.target_logits(hidden[start:stop])
        best[start:stop], valid[start:stop] = _in_draft(likeliest(logits), draft_ids)
        if probs is not None:
            probs[start:stop] = _restricted(logits, draft_ids)
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


def _chunks(count: int, size: int, device: torch.device) -> list[tuple[int, int]]:
    most = _CHUNK_CPU if device.type == "cpu" else _CHUNK_ELSEWHERE
    step = max(most // size // _ROWS * _ROWS, _ROWS)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


@dataclass(frozen=True, slots=True)
class LossJob:
    """All of a loss but the head.

    Attributes:
        teacher: What to learn.
        scale: [K] fp32, factor of every step's sum: its weight over the tokens it is averaged over.
        kind: Which loss.
        lk_mix: [K] fp32, share of the Kullback-Leibler part in LK.
    """

    teacher: Teacher
    scale: Tensor
    kind: LossKind = "ce"
    lk_mix: Tensor | None = None


def soft_target_loss(
    states: Sequence[Tensor], weight: Tensor, job: LossJob
) -> tuple[Tensor, Tensor]:
    """(loss, [3, K] sums of losses, agreements and expected acceptances at every step).

    The loss is `sum_s scale[s] * sum(losses of step s)`. An agreement is a position at which head
    and target have the same likeliest token; the expected acceptance at a position is the sum of
    min(p, q), with the target's p renormalised over the draft vocabulary.

    Args:
        states: [B, T, H] after the final norm, for every TTT step.
        weight: [D, H] output matrix of the head.
        job: The rest.
    """
    position = job.teacher.position
    # Where a step does not reach, the index is anything valid: the weight there is 0.
    picked = [state.flatten(0, 1)[(position - 1 - step).clamp(min=0)]
              for step, state in enumerate(states)]  # fmt: skip
    found: tuple[Tensor, Tensor]
    found = _SoftTargetLoss.apply(torch.stack(picked, 1), weight, job)  # type: ignore[no-untyped-call]
    return found


class _SoftTargetLoss(torch.autograd.Function):
    """Output matrix and loss in one: the gradient is made in the forward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, job: LossJob) -> tuple[Tensor, Tensor]:
        device = states.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            return _forward(ctx, states, weight, job, low or states.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_states, d_weight = ctx.saved_tensors
        return d_states * grads[0], d_weight * grads[0], None


def _forward(
    ctx: Any, states: Tensor, weight: Tensor, job: LossJob, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    count, steps, _ = states.shape
    learns = any(ctx.needs_input_grad[:2])
    low_weight = weight.to(dtype)
    d_states = torch.empty_like(states) if learns else None
    wide = torch.promote_types(torch.float32, weight.dtype)
    d_weight = torch.zeros_like(weight, dtype=wide) if learns else None
    sums = torch.zeros(3, steps, device=states.device, dtype=wide)
    chunks = _chunks(count, steps * len(weight), states.device)
    # All chunks use the same memory: to get as much from the system anew takes longer than to fill.
    room = states.new_empty(max((b - a for a, b in chunks), default=0), steps, len(weight),
                            dtype=dtype)  # fmt: skip
    for start, stop in chunks:
        part, logits = states[start:stop].flatten(0, 1), room[: stop - start]
        torch.mm(part.to(dtype), low_weight.T, out=logits.flatten(0, 1))
        mask = job.teacher.weight[:, start:stop].T
        values = _losses_by_tiles(logits, job.teacher.rows(start, stop).to(wide),
                                  job.teacher.best[start:stop], job)  # fmt: skip
        sums += (values * mask).sum(1)
        if d_states is None or d_weight is None:
            continue
        gradient = logits.flatten(0, 1)
        # The rows' factors go to the narrower side of both products.
        scale = (mask * job.scale).reshape(-1, 1)
        torch.mul(gradient @ low_weight, scale, out=d_states[start:stop].flatten(0, 1))
        scaled = (part * scale).to(dtype)
        if dtype == wide:
            d_weight.addmm_(gradient.T, scaled)
        else:
            d_weight += gradient.T @ scaled
    if d_weight is not None:
        ctx.save_for_backward(d_states, d_weight.to(weight.dtype))
    loss = (sums[0] * job.scale).sum()
    ctx.mark_non_differentiable(sums)
    return loss, sums


def _losses_by_tiles(logits: Tensor, target: Tensor, wanted: Tensor, job: LossJob) -> Tensor:
    """[3, n, K] losses, agreements and acceptances; turns `logits` into the losses' gradient.

    Args:
        logits: [n, K, D] in any type.
        target: [n, D] probabilities, fp32 or wider; what is computed has their type.
        wanted: [n] the likeliest of them.
        job: Which loss.
    """
    count, steps, size = logits.shape
    tile = max(_TILE_CPU // (steps * size), 1) if logits.device.type == "cpu" else max(count, 1)
    spare = target.new_empty(min(tile, count), steps, size)
    wide = None if logits.dtype == spare.dtype else torch.empty_like(spare)
    values = target.new_empty(3, count, steps)
    for start in range(0, count, tile):
        at = slice(start, start + tile)
        rows = logits[at]
        work = rows if wide is None else wide[: len(rows)].copy_(rows)
        found, gradient = _losses(work, spare[: len(rows)], target[at], wanted[at], job)
        torch.stack(found, out=values[:, at])
        if gradient is not rows:
            rows.copy_(gradient)
    return values


def _losses(
    logits: Tensor, spare: Tensor, target: Tensor, wanted: Tensor, job: LossJob
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(losses, agreements, acceptances; each [n, K]) and the losses' gradient [n, K, D].

    Args:
        logits: [n, K, D]; the memory is used again.
        spare: As large, to be written to.
        target: [n, D] probabilities.
        wanted: [n] the likeliest of them.
        job: Which loss.
    """
    target = target[:, None]
    best = likeliest(logits)
    agree = (best == wanted[:, None]).to(logits.dtype)
    top = logits.gather(-1, best[..., None])[..., 0]
    dots = torch.mul(logits, target, out=spare).sum(-1)
    draft = torch.softmax(logits, -1, out=logits)
    log_total = top - draft.gather(-1, best[..., None])[..., 0].log()
    entropy = log_total - dots  # cross-entropy: -sum p log q
    accepted = torch.minimum(draft, target, out=spare).sum(-1)
    if job.kind in ("ce", "kl"):
        if job.kind == "kl":
            entropy = entropy - torch.special.entr(target).sum(-1)
        return (entropy, agree, accepted), draft.sub_(target)
    away = 1 - accepted
    difference = torch.sub(draft, target, out=spare)
    sign = difference.sign().mul_(0.5)
    pull = draft * (sign - torch.linalg.vecdot(draft, sign)[..., None])
    if job.kind == "tv":
        return (away, agree, accepted), pull
    if job.lk_mix is None:
        raise RuntimeError("the LK loss needs its mix")
    mix = job.lk_mix
    divergence = entropy - torch.special.entr(target).sum(-1)
    mixed = mix * divergence + (1 - mix) * away
    return (mixed, agree, accepted), mix[..., None] * difference + (1 - mix[..., None]) * pull


def lk_mix(acceptance: Tensor) -> Tensor:
    """[K] share of the Kullback-Leibler part from the last step's mean acceptances [K].

    The mix of arXiv 2602.23881 uses the acceptance of the batch itself; that of the optimiser step
    before it moves little and does not depend on how a batch is split.
    """
    return torch.exp(-_LK_SHARPNESS * acceptance)


def simulated_length(accuracies: Sequence[float]) -> float:
    """Acceptance length of a chain that agrees at every depth with these probabilities."""
    length, reach = 1.0, 1.0
    for accuracy in accuracies:
        reach *= accuracy
        length += reach
    return length
