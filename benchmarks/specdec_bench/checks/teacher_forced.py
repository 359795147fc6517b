"""Regrets of given tokens under the conditions of plain decoding: same padding, batch and noise.

The same rule as `specdec.audit.exactness.audit`, for batches and without holding all scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.audit.exactness import NOISE_FACTOR
from specdec.hf.names import CACHE, cache_of

LARGEST_RATIO = 1e9
"""Cap of a ratio, so that it stays a number in JSON where the noise is zero."""

_CHUNK = 32  # positions judged at a time
_CHUNK_SCORES = 2**24  # fp64 scores held at a time: 128 MiB


@dataclass(frozen=True)
class Requests:
    """What was decoded together.

    Attributes:
        prompts: Ids of each row.
        seed: Of sampling.
        temperature: 0 is greedy; other warpers are not part of the rule.
    """

    prompts: Sequence[Sequence[int]]
    seed: int = 0
    temperature: float = 0.0


@dataclass(frozen=True)
class Judged:
    """Every position of every row.

    Attributes:
        regrets: [B, n] float64, best fp64 score minus the emitted token's.
        noise: [B, n] float64, largest rounding error of plain's scores there.
        is_plains: [B, n] bool, the token is what plain would emit on this prefix.
    """

    regrets: Tensor
    noise: Tensor
    is_plains: Tensor

    def wrong(self) -> Tensor:
        """[B, n] bool; what is no number is wrong, too."""
        return ~(self.regrets <= NOISE_FACTOR * self.noise)

    def ratios(self) -> Tensor:
        """[B, n] float64 regret over noise, capped."""
        found = self.regrets / self.noise.clamp(min=1e-300)
        return found.nan_to_num(nan=LARGEST_RATIO).clamp(max=LARGEST_RATIO)


@torch.no_grad()
def judge(
    reference: Any,
    model: Any,
    requests: Requests,
    emitted: Sequence[Sequence[int]],
) -> Judged:
    """Teacher-forces the rows through both models, under the conditions of the run.

    Prompts are padded on the left and rows share their forwards as in plain decoding, in fp64 as
    well, so that the noise is that of rounding and nothing else.

    Args:
        reference: fp64 copy of the model.
        model: The model in its own dtype.
        requests: Prompts, seed and temperature.
        emitted: [B, n] new tokens, all rows equally long.
    """
    tokens = torch.tensor([list(row) for row in emitted])
    exact_run = _TeacherForced(reference, requests.prompts)
    plain_run = _TeacherForced(model, requests.prompts)
    batch, steps = tokens.shape
    vocabulary = exact_run.after.shape[-1]
    chunk = max(1, min(_CHUNK, _CHUNK_SCORES // (batch * vocabulary)))
    draws = _plain_noise(requests.seed, batch, vocabulary, plain_run.device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, steps, chunk):
        end = min(start + chunk, steps)
        exact = exact_run.scores(tokens[:, start:end], at_once=True)
        plain = plain_run.scores(tokens[:, start:end], at_once=False).to(exact.device)
        if requests.temperature:
            noise = torch.stack([next(draws) for _ in range(end - start)], 1)
            gumbel = noise.double().log().to(exact.device)
            exact, plain = (
                (scores / requests.temperature).log_softmax(-1) - gumbel
                for scores in (exact, plain)
            )
        parts.append(_compare(exact, plain, tokens[:, start:end].to(exact.device)))
    regrets, spread, same = (torch.cat(part, 1).cpu() for part in zip(*parts, strict=True))
    return Judged(regrets, spread, same)


def _compare(exact: Tensor, plain: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Regrets, noise, and whether the tokens are plain's choices, [B, k] each."""
    best = exact.max(-1).values
    own = exact.gather(2, tokens[:, :, None])[:, :, 0]
    # Scores of -inf on both sides are equal, and their difference is no number.
    apart = torch.where(exact == plain, torch.zeros_like(exact), (exact - plain).abs())
    return best - own, apart.max(-1).values, plain.argmax(-1) == tokens


def _plain_noise(seed: int, batch: int, vocabulary: int, device: torch.device) -> Iterator[Tensor]:
    """[B, V] exponential noise of each step that plain sampling draws from this seed."""
    generator = torch.Generator(device=device).manual_seed(seed)
    while True:
        draw = torch.empty(batch, vocabulary, dtype=torch.float32, device=device)
        yield draw.exponential_(1, generator=generator)


@dataclass
class _TeacherForced:
    """One model's plain decoding of given tokens, padded and batched as `generate` does it.

    Attributes:
        model: The model.
        prompts: Prompt of each row.
        after: [B, V] float64 scores of the next token.
        device: Where they come out.
    """

    model: Any
    prompts: Sequence[Sequence[int]]
    after: Tensor = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        """Reads the prompts."""
        where = self.model.get_input_embeddings().weight.device
        width = max(map(len, self.prompts))
        ids = torch.zeros(len(self.prompts), width, dtype=torch.long)
        self._mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            self._mask[row, width - len(prompt) :] = 1
        self._mask, self._where = self._mask.to(where), where
        self._accepts = set(inspect.signature(self.model.forward).parameters)
        self._cache: Any = None
        self.after = self._forward(ids, keep=1)[:, -1]
        self.device = self.after.device

    def scores(self, tokens: Tensor, at_once: bool) -> Tensor:
        """[B, k, V] float64 scores at which the next k tokens were chosen; reads those tokens."""
        if at_once:
            below = self._grow(tokens)
        else:
            below = torch.cat([self._grow(tokens[:, [i]]) for i in range(tokens.shape[1])], 1)
        found = torch.cat([self.after[:, None], below], 1)
        self.after = found[:, -1]
        return found[:, :-1]

    def _grow(self, tokens: Tensor) -> Tensor:
        new = torch.ones_like(tokens, device=self._where, dtype=self._mask.dtype)
        self._mask = torch.cat([self._mask, new], 1)
        return self._forward(tokens)

    def _forward(self, ids: Tensor, keep: int = 0) -> Tensor:
        arguments: dict[str, Any] = {"attention_mask": self._mask}
        if "position_ids" in self._accepts:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, -ids.shape[1] :]
        if keep and "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = keep
        output = self.model(
            input_ids=ids.to(self._where),
            **{CACHE: self._cache},
            use_cache=True,
            **arguments,
        )
        self._cache = cache_of(output)
        logits: Tensor = output.logits.double()
        return logits
