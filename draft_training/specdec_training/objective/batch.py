"""One batch through target, head and loss: what a step does with each of its parts.

Capitals at the end of a name are its shape: B rows, T slots, F tapped states side by side, H width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from specdec.heads.draft_head import DraftHead
from specdec.heads.eagle3.causal_block import Spans
from specdec_training.contracts import FeatureSource, TokenBatch
from specdec_training.objective.losses import LossJob, LossKind, soft_target_loss
from specdec_training.objective.teacher import Slots, Teacher, make_teacher


@dataclass(frozen=True)
class LossPlan:
    """How a head is taught.

    Attributes:
        steps: TTT steps K.
        kind: Loss per token: "ce", "kl", "tv" or "lk".
        decay: Weight of a step relative to the one before it.
        over_all: Average over all slots instead of the tokens with a loss.
        noise: Largest uniform noise on the features, in their standard deviations.
        keep_bytes: Target probabilities up to this size are kept for the loss; larger ones are
            computed twice, a chunk at a time.
    """

    steps: int
    kind: LossKind = "ce"
    decay: float = 0.8
    over_all: bool = False
    noise: float = 0.0
    keep_bytes: int = 2**30

    def scale(self, counts: Tensor, slots: Tensor, spread: float = 1.0) -> Tensor:
        """[K] fp32 factors of the steps' sums.

        Args:
            counts: [K] tokens with a loss in the whole global batch.
            slots: [] all slots of the global batch.
            spread: What the launcher divides gradients by.
        """
        order = torch.arange(self.steps, device=counts.device, dtype=counts.dtype)
        over = slots.expand_as(counts) if self.over_all else counts
        return self.decay**order / over.clamp(min=1) * spread


@dataclass(frozen=True)
class TaughtBatch:
    """A batch after the target has read it.

    Attributes:
        tokens: The batch, on the device of the head.
        aux: [B, T, F] features.
        teacher: What the target says.
        seen: Tokens to be predicted that each step reaches, whatever the target says.
        wanted: [N] int64 slots, `row * T + t`, that some loss reaches; None for all.
    """

    tokens: TokenBatch
    aux: Tensor
    teacher: Teacher
    seen: tuple[int, ...]
    wanted: Tensor | None


def taught_batch(
    batch: TokenBatch,
    source: FeatureSource,
    plan: LossPlan,
    draft_ids: Tensor | None,
    generator: torch.Generator | None = None,
) -> TaughtBatch:
    """Lets the target read a batch.

    Args:
        batch: On the CPU, as `collate` makes it.
        source: The target, or what was recorded of it.
        draft_ids: [D] target ids of the draft vocabulary, None for all.
        generator: Of the feature noise, on the features' device.
    """
    found = source.features(batch)
    device = found.aux.device
    slots = Slots.of(batch, plan.steps)
    teacher = make_teacher(source, found.last_hidden, slots, plan.steps, draft_ids, plan.keep_bytes)
    aux_BTF = found.aux
    if plan.noise:
        drawn = torch.rand(aux_BTF.shape, generator=generator, device=device, dtype=torch.float32)
        most_F = plan.noise * aux_BTF.float().std((0, 1))
        aux_BTF = aux_BTF + ((2 * drawn - 1) * most_F).to(aux_BTF.dtype)
    tokens = replace(batch, token_ids=batch.token_ids.to(device))
    wanted = slots.reached(batch.token_ids.numel())
    wanted = None if wanted is None else wanted.to(device)
    return TaughtBatch(tokens, aux_BTF, teacher, slots.counts, wanted)


class HeadWithLoss(nn.Module):
    """Head and loss as one module, so that data-parallel wrappers see a single forward.

    Args:
        head: With embeddings and an output matrix.
        steps: TTT steps.
        recompute: Keep no activations inside a step.
    """

    def __init__(self, head: DraftHead, steps: int, recompute: bool = False) -> None:
        super().__init__()
        self.head = head
        self._steps, self._recompute = steps, recompute

    def forward(
        self,
        token_ids: Tensor,
        aux_BTF: Tensor,
        spans: Spans | None,
        job: LossJob,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss, [3, K] sums), as `soft_target_loss` says.

        Args:
            token_ids: [B, T] int64.
            aux_BTF: Features, from the target.
            spans: Documents of each row; None where every row is one.
            wanted: [N] int64 slots that it reaches; None for all.
        """
        if self.head.lm_head is None:
            raise RuntimeError("a head is trained with an output matrix of its own")
        # Autocast's bf16 is for products; the residual stream that starts here adds up in fp32.
        features_BTH = self.head.features(aux_BTF).to(self.head.step_weight.dtype)
        # Of every TTT step, after the final norm: [B, T, H].
        states = list(
            self.head.unroll(token_ids, features_BTH, self._steps, spans, self._recompute, wanted)
        )
        return soft_target_loss(states, self.head.lm_head.weight, job)


def spans_of(batch: TokenBatch) -> list[list[tuple[int, int]]] | None:
    """The batch's documents, or None when every row is filled by a single one."""
    spans = batch.spans()
    width = batch.token_ids.shape[1]
    return None if all(found == [(0, width)] for found in spans) else spans


def draft_ids_of(head: DraftHead) -> Tensor | None:
    """[D] target ids of the head's draft vocabulary, None when it drafts all."""
    return None if head.t2d is None else head.t2d.nonzero().flatten()
