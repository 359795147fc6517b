"""Finds out what a head was trained with, where its checkpoint does not say.

Which target layers it reads and where it norms cannot be seen in the weights. A head that is run
with the wrong flags still drafts, only badly; so each candidate drafts along the target's own
greedy text, and the one that finds it likeliest is the one the head was trained with: training
minimised just that. Drafts are teacher-forced, so that every slot is tried in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec.heads.eagle3.config import LEAST_FOR_DEFAULT, Eagle3Config, default_aux_layers
from specdec.heads.eagle3.head import Eagle3Head

STEPS = 3
"""Drafted tokens that are compared at each slot."""

_CLEAR = 3.0  # standard errors between two candidates, slot by slot
_FLOOR = -12.0  # log-probability; one slot that a candidate finds absurd must not decide


@dataclass(frozen=True)
class Candidate:
    """One way to run the head.

    Attributes:
        layers: Output layers that it reads, in order.
        layers_from: Where this choice comes from.
        norm_before_residual: As in `Eagle3Config`.
        feed_post_norm: As in `Eagle3Config`.
    """

    layers: tuple[int, ...]
    layers_from: str
    norm_before_residual: bool
    feed_post_norm: bool

    def apply(self, config: Eagle3Config) -> Eagle3Config:
        """The configuration with these flags."""
        return replace(
            config,
            aux_output_layers=self.layers,
            norm_before_residual=self.norm_before_residual,
            feed_post_norm=self.feed_post_norm,
        )


@dataclass(frozen=True)
class Score:
    """How a candidate drafted.

    Attributes:
        candidate: Which.
        hits: [STEPS, n] bool, whether step s at a slot named the target's token.
        log_probs: [STEPS, n] of the target's token; 0 where no draft id stands for it.
    """

    candidate: Candidate
    hits: Tensor
    log_probs: Tensor

    @property
    def agreement(self) -> tuple[float, ...]:
        """Share of agreement at each step."""
        return tuple(self.hits.float().mean(1).tolist())

    @property
    def likelihood(self) -> float:
        """Mean log-probability of the target's tokens."""
        return float(self.log_probs.mean()) if self.log_probs.numel() else 0.0

    def clearly_above(self, other: Score) -> bool:
        """Whether chance does not explain that this one finds the text likelier."""
        gains = (self.log_probs - other.log_probs).sum(0)
        if len(gains) < 2:
            return False
        error = float(gains.std()) / math.sqrt(len(gains))
        return float(gains.mean()) > _CLEAR * error


def candidates(config: Eagle3Config, num_layers: int, layers_known: bool) -> list[Candidate]:
    """The ways in which a head of this configuration may have been trained, its own first."""
    stated = config.aux_output_layers
    choices: dict[tuple[int, ...], str] = {}
    if layers_known:
        choices[stated] = "as loaded"
        choices.setdefault(tuple(layer + 1 for layer in stated), "one higher")
        choices.setdefault(tuple(layer - 1 for layer in stated), "one lower")
        choices.setdefault(stated[::-1], "in reverse")
    if num_layers >= LEAST_FOR_DEFAULT and len(stated) == 3:
        usual = default_aux_layers(num_layers)
        choices.setdefault(usual, "default rule")
        choices.setdefault(tuple(layer + 1 for layer in usual), "default, one higher")
        choices.setdefault(tuple(layer - 1 for layer in usual), "default, one lower")
    inside = {k: v for k, v in choices.items() if min(k) >= -1 and max(k) < num_layers - 1}
    own = config.norm_before_residual, config.feed_post_norm
    flags = sorted(
        ((residual, post) for residual in (False, True) for post in (False, True)),
        key=lambda pair: pair != own,
    )
    return [Candidate(layers, name, *pair) for layers, name in inside.items() for pair in flags]


@torch.no_grad()
def probe(
    head: Eagle3Head,
    model: Any,
    tried: Sequence[Candidate],
    prompts: Sequence[Tensor],
    new_tokens: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Scores every candidate, the best first.

    Args:
        head: With embeddings and output matrix, on the target's device and in its dtype.
        model: The target.
        tried: Which.
        prompts: [S] int64 each.
        new_tokens: Greedy tokens of each prompt to compare with.
        progress: Called after each prompt.
    """
    heads = [_with(head, one) for one in tried]
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tried]
    for prompt in prompts:
        row = prompt[None].to(model.device)
        text = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            return_dict_in_generate=False,
        )
        if text.shape[1] >= row.shape[1] + STEPS + 1:
            states = model(text, output_hidden_states=True, use_cache=False).hidden_states
            for one, candidate, slots in zip(heads, tried, found, strict=True):
                aux = torch.cat([states[layer + 1] for layer in candidate.layers], -1)
                slots.append(_draft(one, text, aux, row.shape[1]))
        progress()
    none = torch.zeros(STEPS, 0)
    scores = [
        Score(
            candidate,
            torch.cat([none.bool(), *(hits for hits, _ in slots)], 1),
            torch.cat([none, *(log_probs for _, log_probs in slots)], 1),
        )
        for candidate, slots in zip(tried, found, strict=True)
    ]
    return sorted(scores, key=lambda score: -score.likelihood)


def _with(head: Eagle3Head, candidate: Candidate) -> Eagle3Head:
    """The head run in another way, sharing its weights."""
    with torch.device("meta"):
        other = Eagle3Head(
            candidate.apply(head.config), head.embed_tokens is not None, head.lm_head is not None
        )
    other.load_state_dict(head.state_dict(), assign=True)
    return other.eval()


def _draft(head: Eagle3Head, text: Tensor, aux: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Hits and log-probabilities, [STEPS, n], at the slots whose tokens are all the target's."""
    first, last = max(prompt - 2, 0), text.shape[1] - 1 - STEPS
    ids = head.vocabulary.ids.to(text.device)
    hits, log_probs = [], []
    for step, logits in enumerate(head.train_logits(text, head.features(aux), STEPS)):
        wanted = text[0, first + 2 + step : last + 2 + step]
        slots = logits[0, first:last].float().log_softmax(-1)
        hits.append(ids[slots.argmax(-1)] == wanted)
        index = torch.searchsorted(ids, wanted).clamp_max(len(ids) - 1)
        found = slots.gather(1, index[:, None])[:, 0].clamp_min(_FLOOR)
        log_probs.append(torch.where(ids[index] == wanted, found, 0.0))
    return torch.stack(hits).cpu(), torch.stack(log_probs).cpu()
