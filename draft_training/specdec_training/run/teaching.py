"""The head's half of an optimiser step: gradients of a global batch, however it is split.

A global batch is counted first and divided then: the target reads all of its parts, the tokens with
a loss are counted over all processes, and only then the head learns. So a gradient does not depend
on how a batch is split. What a step has to say goes to the host in one small copy at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.heads.eagle3.head import Eagle3Head
from specdec_training.contracts import FeatureSource, TokenBatch
from specdec_training.objective.losses import LossJob, lk_mix, simulated_length
from specdec_training.objective.ttt_step import (
    LossPlan,
    Prepared,
    TttStep,
    draft_ids_of,
    mean_or_zero,
    prepare,
    spans_of,
)
from specdec_training.run.stepping import make_stepper


@dataclass(frozen=True)
class StepNumbers:
    """What is known on the host once the gradients are there.

    Attributes:
        record: Figures for the log: loss, accuracy by TTT step, and so on.
        told: Sums over all processes of what each of them told the others.
        loss: Of the global batch.
        norm: Of the gradient, before it was clipped.
    """

    record: dict[str, Any]
    told: list[float]
    loss: float
    norm: float


class Teaching:
    """Makes gradients; knows nothing of steps, schedules and files.

    Args:
        accelerator: Hugging Face's.
        head: On its device.
        source: The target, or what was recorded of it.
        plan: How to teach.
        optimizer: Of the head's parameters.
        recompute: Keep no activations inside a TTT step.
    """

    def __init__(
        self,
        accelerator: Any,
        head: Eagle3Head,
        source: FeatureSource,
        plan: LossPlan,
        optimizer: torch.optim.Optimizer,
        recompute: bool = False,
    ) -> None:
        self.device, self.plan = head.fc.weight.device, plan
        self.processes, self.rank = int(accelerator.num_processes), int(accelerator.process_index)
        self.acceptance = self._accepted = torch.zeros(plan.steps, device=self.device)
        self._accelerator, self._source = accelerator, source
        self._draft_ids = draft_ids_of(head)
        module = TttStep(head, plan.steps, recompute)
        self.stepper = make_stepper(accelerator, module, head, optimizer)

    def gradients(
        self, batches: Sequence[TokenBatch], told: Sequence[float], clip: float, seed: int
    ) -> StepNumbers:
        """Fills the parameters' gradients.

        Args:
            batches: This process's parts of the global batch.
            told: Numbers for all processes to know the sum of.
            clip: Largest norm of the gradient.
            seed: Of the feature noise of this step.
        """
        steps = self.plan.steps
        parts = self._read(batches, seed)
        counted = self._summed(self._counts(parts, told))
        # Data-parallel wrappers take the mean over processes.
        spread = float(self.processes)
        scale = self.plan.scale(counted[:steps], counted[-1], spread)
        sums = self._teach(parts, scale)
        norm = self.stepper.clip(clip)
        totals = self._summed(sums)
        loss = (totals[:steps] * scale / spread).sum()
        self._accepted = totals[2 * steps : 3 * steps] / counted[:steps].clamp(min=1)
        numbers = torch.cat([loss[None], norm.to(loss).reshape(1), totals, counted])
        host: list[float] = numbers.tolist()
        record = _record(host[2:], steps) | {"loss": host[0], "grad_norm": host[1]}
        return StepNumbers(record, host[-1 - len(told) : -1], host[0], host[1])

    def update(self, lr: float) -> None:
        """Lets the optimiser take the step that `gradients` prepared."""
        self.stepper.step(lr)
        self.acceptance = self._accepted

    def clear(self) -> None:
        """Drops the gradients."""
        self.stepper.clear()

    def _read(self, batches: Sequence[TokenBatch], seed: int) -> list[Prepared]:
        """Lets the target read all parts."""
        generator = None
        if self.plan.noise:
            generator = torch.Generator(self.device)
            generator.manual_seed(seed * self.processes + self.rank)
        return [
            prepare(batch, self._source, self.plan, self._draft_ids, generator) for batch in batches
        ]

    def _counts(self, parts: Sequence[Prepared], told: Sequence[float]) -> Tensor:
        """[K + len(told) + 1] tokens with a loss, then what is told, then slots."""
        slots = sum(part.tokens.token_ids.numel() for part in parts)
        counts = torch.stack([part.teacher.counts for part in parts]).sum(0)
        return torch.cat([counts, counts.new_tensor([*told, slots])])

    def _teach(self, parts: Sequence[Prepared], scale: Tensor) -> Tensor:
        """Backward over all parts.

        Returns:
            [4 K + 1] sums of losses, agreements, acceptances and tokens to be predicted by TTT
            step, then the number of all tokens.
        """
        mix = lk_mix(self.acceptance) if self.plan.kind == "lk" else None
        sums = torch.zeros(4 * self.plan.steps + 1, device=self.device)
        for number, part in enumerate(parts):
            job = LossJob(part.teacher, scale, self.plan.kind, mix)
            with self.stepper.part(number + 1 == len(parts)):
                loss, found = self.stepper.module(
                    part.tokens.token_ids, part.aux, spans_of(part.tokens), job, part.wanted
                )
                self.stepper.backward(loss)
            tokens = sum(document.stop - document.start for document in part.tokens.documents)
            sums += torch.cat([found.flatten(), sums.new_tensor([*part.seen, tokens])])
        return sums

    def _summed(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.processes == 1:
            return numbers
        summed: Tensor = self._accelerator.reduce(numbers, "sum")
        return summed


def _record(host: Sequence[float], steps: int) -> dict[str, Any]:
    """The step's figures, from what was copied to the host."""
    losses, agreed, accepted, seen = (host[i * steps : (i + 1) * steps] for i in range(4))
    counts = host[4 * steps + 1 : 5 * steps + 1]
    accuracy = mean_or_zero(agreed, seen)
    return {
        "losses": mean_or_zero(losses, counts),
        "accuracy": accuracy,
        "expected_acceptance": mean_or_zero(accepted, counts),
        "simulated_acceptance_length": simulated_length(accuracy),
        "tokens": int(host[4 * steps]),
    }
