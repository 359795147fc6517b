"""Rows of logits with what breaks kernels in them: ties, zeros of both signs, NaN, infinities."""

from __future__ import annotations

import torch
from torch import Tensor


def awkward_logits(rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[rows, size]; rounded, so that most rows have several largest numbers."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator).mul(2).round()
    logits[logits == 0] *= torch.where(torch.rand(int((logits == 0).sum()), generator=generator)
                                       < 0.5, -1.0, 1.0)  # fmt: skip
    return logits.to(dtype)


def broken_logits(size: int, dtype: torch.dtype) -> Tensor:
    """[6, size]: NaN, two of them, infinities of both signs, nothing but -inf, only zeros."""
    logits = awkward_logits(6, size, dtype)
    logits[0, size // 2] = logits[1, size - 1] = logits[1, size // 3] = float("nan")
    logits[2, size - 1], logits[3, : size - 1] = float("inf"), float("-inf")
    logits[4] = float("-inf")
    logits[5] = torch.where(torch.arange(size) % 2 == 0, -0.0, 0.0)
    return logits


def projections(dtype: torch.dtype, dim: int = 12) -> dict[str, Tensor]:
    """What `rotate_into_cache` needs, for 3 rows of 5 tokens, 4 heads of queries and 2 of keys."""
    generator = torch.Generator().manual_seed(dim)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "joined": random(3, 5, 8, dim).to(dtype),
        "cos": random(40, dim).to(dtype),
        "sin": random(40, dim).to(dtype),
        "positions": torch.randint(40, (3, 5), generator=generator),
        "slots": torch.tensor([0, 7, 15]),
        "keys": random(3, 2, 20, dim).to(dtype),
        "values": random(3, 20, 2, dim).to(dtype).transpose(1, 2),
        "q_norm": random(dim).to(dtype),
        "k_norm": random(dim).to(dtype),
    }
