"""The loss of an EAGLE-3 head: what it drafts against what the target would say.

Logits of the head exist for a chunk of positions at a time, and the output matrix gets its gradient
chunk by chunk, so that no [T, D] tensor outlives the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specdec_kernels import soft_cross_entropy
from specdec_training.objective.teacher import Teacher, chunks, likeliest

LossKind = Literal["ce", "kl", "tv", "lk"]

_LK_SHARPNESS = 3.0  # eta of arXiv 2602.23881
_TILE_CPU = 2**17  # elements of logits that are looked at: they stay in a processor's nearest cache


@dataclass(frozen=True, slots=True)
class LossJob:
    """All of a loss but the head.

    Attributes:
        teacher: The target's distribution at every position with a loss.
        scale: [K] fp32, factor of every step's sum: its weight over the tokens it is averaged over.
        kind: Loss per token: "ce", "kl", "tv" or "lk".
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
    """
    position = job.teacher.position
    # Where a step does not reach, the index is anything valid: the weight there is 0.
    picked = [state.flatten(0, 1)[(position - 1 - step).clamp(min=0)]
              for step, state in enumerate(states)]  # fmt: skip
    stacked = torch.stack(picked, 1)
    if stacked.device.type == "cuda" and job.kind in ("ce", "kl"):
        return loss_by_kernel(stacked, weight, job)
    found: tuple[Tensor, Tensor]
    found = _SoftTargetLoss.apply(stacked, weight, job)  # type: ignore[no-untyped-call]
    return found


def loss_by_kernel(states: Tensor, weight: Tensor, job: LossJob) -> tuple[Tensor, Tensor]:
    """`soft_target_loss` by the fused kernel, for the two kinds that have the gradient q - p.

    Args:
        states: [M, K, H], what every step says at the teacher's positions.
        weight: [D, H] output matrix of the head.
        job: Of kind "ce" or "kl".
    """
    mask = job.teacher.weight.T
    parts = chunks(len(states), states.shape[1] * len(weight), states.device)
    factor = mask * job.scale
    loss, values = soft_cross_entropy(
        states, weight, _Distributions(job.teacher), factor,
        chunk=max((stop - start for start, stop in parts), default=1),
    )  # fmt: skip
    losses, agree, accepted, entropy = values
    if job.kind == "kl":
        losses, loss = losses - entropy, loss - (entropy * factor).sum()
    return loss, (torch.stack([losses, agree, accepted]) * mask).sum(1)


@dataclass(frozen=True, slots=True)
class _Distributions:
    """A teacher as the kernel asks for it."""

    teacher: Teacher
    are_logits: bool = False

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, D] probabilities."""
        return self.teacher.rows(start, stop)


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
    parts = chunks(count, steps * len(weight), states.device)
    # All chunks use the same memory: to get as much from the system anew takes longer than to fill.
    room = states.new_empty(max((b - a for a, b in parts), default=0), steps, len(weight),
                            dtype=dtype)  # fmt: skip
    for start, stop in parts:
        # 1. Logits of these positions at all steps.
        part, logits = states[start:stop].flatten(0, 1), room[: stop - start]
        torch.mm(part.to(dtype), low_weight.T, out=logits.flatten(0, 1))
        # 2. Losses, and in the place of the logits their gradient.
        mask = job.teacher.weight[:, start:stop].T
        values = _losses_by_tiles(logits, job.teacher.rows(start, stop).to(wide),
                                  job.teacher.best[start:stop], job)  # fmt: skip
        sums += (values * mask).sum(1)
        if d_states is None or d_weight is None:
            continue
        # 3. Back through the output matrix; the rows' factors go to the narrower side of both
        #    products.
        gradient = logits.flatten(0, 1)
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
    """
    # 1. Whether the likeliest tokens agree.
    target = target[:, None]
    best = likeliest(logits)
    agree = (best == wanted[:, None]).to(logits.dtype)
    top = logits.gather(-1, best[..., None])[..., 0]
    # 2. q, the head's distribution, and -sum p log q without a logarithm of all of it.
    dots = torch.mul(logits, target, out=spare).sum(-1)
    draft = torch.softmax(logits, -1, out=logits)
    log_total = top - draft.gather(-1, best[..., None])[..., 0].log()
    entropy = log_total - dots
    accepted = torch.minimum(draft, target, out=spare).sum(-1)
    # 3. The loss that was asked for and its gradient by the logits. That of the first two is q - p;
    #    that of total variation q (s - <q, s>), where s is half the sign of q - p.
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
