"""Chain mode: what its tests share. Models, prompts, and the comparison with plain `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from helpers.families import CHAIN_FAMILIES, VOCAB, Family
from helpers.hf import ids_of, plain
from helpers.laws import prompts
from specdec import GenerationStats, SpecConfig

NEW = 18
SLOW = ("falcon_h1", "bamba", "qwen3_next")
FEW = ("qwen3_5", "lfm2", "mamba2", "bloom")
SAMPLINGS = pytest.mark.parametrize(
    "sampled", [{}, {"do_sample": True, "top_k": 12}], ids=["greedy", "sampled"]
)


def slowly(value: Any) -> Any:
    """A parameter that is left out of the fast run."""
    return pytest.param(value, marks=pytest.mark.slow)


def families(*without: str) -> list[Any]:
    """Parameters: every chain family, those that take long marked slow."""
    return [
        slowly(name) if name in SLOW else name for name in CHAIN_FAMILIES if name not in without
    ]


def with_options(family: Family, **options: Any) -> Family:
    """The family with other config options."""
    return replace(family, options={**family.options, **options})


def rows_of(*rows: int) -> dict[str, Tensor]:
    """Some of the four ragged prompts, with the padding that they have among all of them."""
    return {name: tensor[list(rows)] for name, tensor in prompts(4).items()}


BATCHES = {
    "one row": prompts(1),
    "ragged rows": prompts(4),
    "one padded row": rows_of(1),
    "padding in every row": rows_of(1, 2),
}


@dataclass(frozen=True)
class Both:
    """The same call, plain and speculative."""

    plain: Any
    ours: Any
    stats: GenerationStats


def truth_of(output: Any, call: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """The text of each row as a drafter knows it, without padding, and nonsense beyond its end."""
    rows = ids_of(output).tolist()
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    starts = [0] * len(rows)
    if ids is not None and call.get("inputs_embeds") is not None:
        starts = [ids.shape[1]] * len(rows)  # what was generated is all that is known
    elif ids is not None and mask is not None:
        given = mask[:, -ids.shape[1] :].repeat_interleave(len(rows) // len(mask), 0)
        starts = given.argmax(1).tolist()
    return tuple(
        (*row[start:], *([VOCAB - 1] * 8)) for row, start in zip(rows, starts, strict=True)
    )


def run_both(
    model: Any, fresh: Callable[[], Mapping[str, Any]] = dict, method: str = "oracle", **call: Any
) -> Both:
    """Generates twice from the same seed; compares ids and the generator's final state.

    Args:
        model: An augmented model that runs in chain mode.
        fresh: Makes the arguments that a call consumes (processors with state, caches, streamers).
        method: A throw-away drafter that knows the text, and is wrong about it now and then.
        **call: Arguments of both calls.
    """
    torch.manual_seed(1)
    expected = plain(model, **call, **fresh())
    generator = torch.get_rng_state()
    options = {"truth": truth_of(expected, call), "lie_every": 5}
    torch.manual_seed(1)
    got = model.generate(**call, **fresh(), specdec=SpecConfig(method, options))
    stats = specdec.last_stats(model)
    assert stats.mode == "chain"
    assert type(got) is type(expected)
    assert ids_of(got).tolist() == ids_of(expected).tolist()
    assert torch.equal(torch.get_rng_state(), generator), "the generator stands elsewhere"
    return Both(expected, got, stats)


def tolerance(model: Any) -> float:
    """What a state may differ by; only LFM models keep to float64 everywhere."""
    exact = model.dtype == torch.float64 and model.config.model_type in ("lfm2", "lfm3")
    return 1e-12 if exact else 1e-4
