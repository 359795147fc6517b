"""One optimiser step of a head, from token batches to new weights: `TrainStep`, top to bottom.

Capitals at the end of a name are its shape: B rows, T slots of a row, F tapped states side by side,
H width of the head, K TTT steps. What the target does with a batch is `taught_batch`, what the head
does `HeadWithLoss`; how many processes work as one is `stepping`. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from specdec.heads.draft_head import DraftHead
from specdec_training.contracts import FeatureSource, TokenBatch
from specdec_training.objective.batch import (
    HeadWithLoss,
    LossPlan,
    draft_ids_of,
    spans_of,
    taught_batch,
)
from specdec_training.objective.losses import LossJob, lk_mix, simulated_length
from specdec_training.run.optim import Guard, lr_factor, make_optimizer
from specdec_training.run.options import TrainOptions
from specdec_training.run.stepping import make_stepper


class Told(NamedTuple):
    """What the processes of a run tell each other in a step: summed up with its counts.

    Attributes:
        stopped: Processes that a signal asked to stop.
        early: Whether patience has run out; the leading process says so.
        share: Of the run that is over after this step; the leading process says so.
        due: Whether to measure after it; the leading process says so.
    """

    stopped: float = 0.0
    early: float = 0.0
    share: float = 0.0
    due: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """What is known on the host after a step.

    Attributes:
        record: Figures for the log: losses, accuracy by TTT step, learning rate, and so on.
        told: Sums over all processes.
        updated: Whether the head has new weights: loss and gradient were finite.
    """

    record: dict[str, Any]
    told: Told
    updated: bool


class TrainStep:
    """Everything that a step needs and that stays from one to the next.

    Args:
        source: The target, or what was recorded of it.
        options: Resolved for the head's width.
    """

    def __init__(
        self, accelerator: Any, head: DraftHead, source: FeatureSource, options: TrainOptions
    ) -> None:
        self.device = head.step_weight.device
        self.processes, self.rank = int(accelerator.num_processes), int(accelerator.process_index)
        self.plan = LossPlan(
            steps=options.ttt_steps or 1,
            kind=options.loss,
            decay=options.step_decay,
            over_all=options.reduction == "all",
            noise=options.noise,
        )
        self.guard = Guard(options.max_bad_steps)
        self.acceptance = torch.zeros(self.plan.steps, device=self.device)
        self._accelerator, self._source, self._options = accelerator, source, options
        self._draft_ids = draft_ids_of(head)
        module = HeadWithLoss(head, self.plan.steps, options.recompute)
        weights = cast(nn.Module, head)  # which every head is, and a protocol cannot say
        self.stepper = make_stepper(accelerator, module, weights, make_optimizer(weights, options))

    def __call__(
        self, batches: Sequence[TokenBatch], told: Told, seed: int, update: bool = True
    ) -> StepResult:
        """Learns from a global batch.

        Args:
            batches: This process's parts of it.
            told: By this process to all.
            seed: Of this step's feature noise.
            update: False to leave head and optimiser as they are: a rehearsal.
        """
        options, plan, K = self._options, self.plan, self.plan.steps

        # 1. The target reads every part: the features, and which tokens it would say itself.
        noise = self._noise(seed)
        parts = [taught_batch(b, self._source, plan, self._draft_ids, noise) for b in batches]

        # 2. Tokens with a loss are counted in all parts and processes before any is learnt, so that
        #    a gradient does not depend on how a global batch is split.
        counts_K = torch.stack([part.teacher.counts for part in parts]).sum(0)
        slots = sum(part.tokens.token_ids.numel() for part in parts)
        counted = self._over_processes(torch.cat([counts_K, counts_K.new_tensor([*told, slots])]))
        # Data-parallel wrappers take the mean over processes, where a sum is wanted.
        scale_K = plan.scale(counted[:K], counted[-1], self.processes)

        # 3. The head drafts K deep at every slot; what it should have drafted makes the gradient.
        mix_K = lk_mix(self.acceptance) if plan.kind == "lk" else None
        sums = torch.zeros(4 * K + 1, device=self.device)
        for number, part in enumerate(parts, 1):
            job = LossJob(part.teacher, scale_K, plan.kind, mix_K)
            with self.stepper.part(is_last=number == len(parts)):  # processes exchange gradients
                loss, sums_3K = self.stepper.module(
                    part.tokens.token_ids, part.aux, spans_of(part.tokens), job, part.wanted
                )
                self.stepper.backward(loss)
            seen = sums.new_tensor([*part.seen, part.tokens.filled])
            sums += torch.cat([sums_3K.flatten(), seen])

        # 4. A gradient that is too long is cut back.
        norm = self.stepper.clip(options.clip)

        # 5. What there is to say goes to the host in one small copy.
        sums = self._over_processes(sums)
        loss = (sums[:K] * scale_K / self.processes).sum()
        host = torch.cat([loss[None], norm.to(loss).reshape(1), sums, counted]).tolist()
        all_told = Told(*host[-1 - len(told) : -1])

        # 6. The head moves, unless something is not finite.
        lr = (options.lr or 0.0) * lr_factor(all_told.share, options.warmup, options.final_lr)
        updated = update and self.guard.passes(*host[:2])
        if updated:
            self.stepper.step(lr)
            self.acceptance = sums[2 * K : 3 * K] / counted[:K].clamp(min=1)
        self.stepper.clear()
        return StepResult(_record(host, K) | {"lr": lr}, all_told, updated)

    def _noise(self, seed: int) -> torch.Generator | None:
        """What this process's feature noise is drawn from."""
        if not self.plan.noise:
            return None
        return torch.Generator(self.device).manual_seed(seed * self.processes + self.rank)

    def _over_processes(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.processes == 1:
            return numbers
        summed: Tensor = self._accelerator.reduce(numbers, "sum")
        return summed


def _record(host: Sequence[float], steps: int) -> dict[str, Any]:
    """The step's figures, from what was copied to the host."""
    (loss, norm), host = host[:2], host[2:]
    losses, agreed, accepted, seen = (host[i * steps : (i + 1) * steps] for i in range(4))
    counts = host[4 * steps + 1 : 5 * steps + 1]
    accuracy = _mean_or_zero(agreed, seen)
    return {
        "losses": _mean_or_zero(losses, counts),
        "accuracy": accuracy,
        "expected_acceptance": _mean_or_zero(accepted, counts),
        "simulated_acceptance_length": simulated_length(accuracy),
        "tokens": int(host[4 * steps]),
        "loss": loss,
        "grad_norm": norm,
    }


def _mean_or_zero(sums: Sequence[float], counts: Sequence[float]) -> list[float]:
    """Sums over counts; 0 where nothing was counted."""
    return [a / b if b else 0.0 for a, b in zip(sums, counts, strict=True)]
