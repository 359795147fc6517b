"""What "same text" can mean in bf16 and fp16, and the check for it.

A forward over T rows rounds differently from one over a single row, for everyone. So in half
precision strings may part at near-ties, and the promise is about every token instead: its *regret*
(how far its score is below the best one, in an fp64 run of the same weights on the same prefix) may
not exceed twice the rounding noise measured at that position. A wrong mask or position gives
regrets of order one and fails at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.hf.names import CACHE, cache_of

NOISE_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Audit:
    """Regrets of a generated sequence.

    Attributes:
        regrets: [n] float64, best score minus the emitted token's, in the fp64 run.
        noise: [n] float64, largest difference between a score of the model's own plain run and of
            the fp64 run, over the candidates.
    """

    regrets: Tensor
    noise: Tensor

    @property
    def violations(self) -> int:
        """Tokens whose regret exceeds twice the noise. The rule: none."""
        return int((self.regrets > NOISE_FACTOR * self.noise).sum())

    @property
    def not_best(self) -> int:
        """Tokens that are not the fp64 run's choice: near-ties that rounding decided."""
        return int((self.regrets > 0).sum())

    @property
    def worst_ratio(self) -> float:
        """Largest regret over noise; the rule allows 2."""
        return (
            float((self.regrets / self.noise.clamp(min=1e-300)).max()) if len(self.noise) else 0.0
        )


def reference_model(model: Any, device: torch.device | str | None = None) -> Any:
    """The same weights in fp64, as a model of its own, without what `augment` left on it.

    Args:
        model: A Hugging Face model, augmented or not.
        device: Where the copy lies; None for where the model does. Each weight moves before it is
            widened, so that the model's own device needs neither room for the copy nor fp64.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        handle = vars(module).get("_specdec")
        if handle is not None:
            memo[id(handle)] = object()  # heads, stores and caches: not copied, and taken off below
    for weight in [*model.parameters(), *model.buffers()]:
        if type(weight) in (Tensor, torch.nn.Parameter) and weight.is_floating_point():
            memo[id(weight)] = _moved(weight, device)
    reference = copy.deepcopy(model, memo)
    for module in reference.modules():
        for name in ("generate", "_specdec"):
            vars(module).pop(name, None)
    if device is not None:
        reference = reference.to(device)
    return reference.double().eval()


def _moved(weight: Tensor, device: torch.device | str | None) -> Tensor:
    """A copy of the same kind."""
    there = weight.device if device is None else device
    copied = weight.detach().to(there, copy=True)
    if isinstance(weight, torch.nn.Parameter):
        return torch.nn.Parameter(copied, requires_grad=weight.requires_grad)
    return copied


@torch.no_grad()
def audit(
    reference: Any,
    model: Any,
    sequence: Tensor,
    prompt_length: int,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> Audit:
    """Checks one generated sequence by the regret rule.

    Args:
        reference: fp64 copy of the model, see `reference_model`.
        model: The model that generated.
        sequence: [S] ids, prompt included, without padding.
        prompt_length: Tokens of the prompt.
        noise: [n, V] exponential noise of each sampling step; None for greedy decoding.
        temperature: Sampling temperature; other warpers are not part of the rule.
    """
    emitted = sequence[prompt_length:]
    exact = reference(input_ids=sequence[None, :-1]).logits[0, prompt_length - 1 :].double()
    rounded = _plain_logits(model, sequence, prompt_length)
    scores = [exact, rounded]
    if noise is not None:
        gumbel = noise.double().log().to(exact.device)
        scores = [(z / temperature).log_softmax(-1) - gumbel for z in scores]
    best = scores[0].max(-1).values
    own = scores[0].gather(1, emitted[:, None].to(exact.device))[:, 0]
    return Audit((best - own).cpu(), (scores[0] - scores[1]).abs().max(-1).values.cpu())


def _plain_logits(model: Any, sequence: Tensor, prompt_length: int) -> Tensor:
    """[n, V] float64 logits of the model's own one-token-at-a-time decoding of `sequence`."""
    output = model(input_ids=sequence[None, :prompt_length], use_cache=True)
    rows = [output.logits[0, -1].double()]
    for token in sequence[prompt_length:-1]:
        held = {CACHE: cache_of(output)}
        output = model(input_ids=token[None, None], **held, use_cache=True)
        rows.append(output.logits[0, -1].double())
    return torch.stack(rows)


def replay_noise(seed: int, steps: int, vocab_size: int, device: torch.device) -> Tensor:
    """[steps, V] noise that plain sampling at batch 1 draws after `torch.manual_seed(seed)`."""
    generator = torch.Generator(device=device).manual_seed(seed)
    rows = torch.empty(steps, vocab_size, device=device)
    for row in rows:
        row.exponential_(1, generator=generator)
    return rows
