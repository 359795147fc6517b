"""The calls that the sweep makes: prompts, sampling options, seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEW_TOKENS, SEED = 24, 1234
PROMPT_LENGTHS = (11, 7, 4)
LOWEST_ID, HIGHEST_ID = 15, 90  # special tokens lie outside
_SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20}
_ENDS = [20, 35, 50, 65, 80]  # a row in four or so runs to the end of the call


@dataclass(frozen=True)
class Situation:
    """One way to call `generate`."""

    name: str
    rows: int
    options: Mapping[str, Any]


SITUATIONS = (
    Situation("greedy", 1, {"do_sample": False}),
    Situation("sampled", 1, _SAMPLED),
    Situation("greedy, 3 padded rows", 3, {"do_sample": False}),
    Situation("sampled, 3 padded rows that end", 3, {**_SAMPLED, "eos_token_id": _ENDS}),
)


def prompts(rows: int) -> dict[str, Tensor]:
    """Left-padded rows that repeat themselves, so that n-grams find something."""
    texts = []
    for row, length in enumerate(PROMPT_LENGTHS[:rows]):
        generator = torch.Generator().manual_seed(row)
        half = torch.randint(LOWEST_ID, HIGHEST_ID, (length // 2 + 1,), generator=generator)
        texts.append(torch.cat([half, half])[:length])
    width = max(map(len, texts))
    ids, mask = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width).long()
    for row, tokens in enumerate(texts):
        ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


def call(model: Any, situation: Situation, **how: Any) -> tuple[Any, Tensor]:
    """What one seeded call returns, and the generator's state after it."""
    torch.manual_seed(SEED)
    inputs = {**prompts(situation.rows), **situation.options, **how}
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS), torch.get_rng_state()
