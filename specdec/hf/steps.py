"""The steps of plain `generate`, one by one: prepared arguments, prompt, and what comes after it.

Chain mode takes them, so that a model sees just what it would see without speculation; the
self-test measures against them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig
from transformers.generation import utils as generation_utils

from specdec.hf.names import cache_argument, counts_slots

MULTIMODAL = (
    *getattr(generation_utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ()),
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "token_type_ids",
    "mm_token_type_ids",
)
"""Model inputs that only the prompt needs, or that generated text extends in a known way."""


def cached_length(kwargs: Mapping[str, Any]) -> int:
    """Slots that the cache of a prepared call holds already, as `generate` counts them."""
    name, cache = cache_argument(kwargs)
    return int(cache.get_seq_length()) if cache is not None and counts_slots(name, cache) else 0


def keeps_state(model: Any) -> bool:
    """Whether some layer folds its tokens into a convolutional or recurrent state."""
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # noqa: BLE001 - configs that the cache cannot read are not known to
        return False
    return any(hasattr(layer, "recurrent_states") for layer in layers)


def max_slots(config: Any) -> int:
    """Slots, padding included, that a model's table of distances reaches (MPT); else unlimited."""
    return getattr(config.get_text_config(), "max_seq_len", None) or sys.maxsize


def prefill_as_plain(model: Any, input_ids: Tensor, config: Any, kwargs: Mapping[str, Any]) -> Any:
    """Runs the prompt as plain `generate` does, multimodal inputs and chunks included."""
    return model._prefill(input_ids, config, dict(kwargs))


def step_inputs(
    model: Any, tokens: Tensor, kwargs: Mapping[str, Any], heads: int
) -> dict[str, Any]:
    """Inputs of a forward over `tokens` [B, q] after the prompt, as the model prepares them.

    Args:
        tokens: Ids that are not in the cache yet.
        kwargs: Model keyword arguments with cache, mask and positions.
        heads: How many of the last tokens need logits.
    """
    own = {name: value for name, value in kwargs.items() if name != "inputs_embeds"}
    if own.get("position_ids") is None:
        own.pop("position_ids", None)
    if own.get("token_type_ids") is not None:  # plain repeats the last one
        own["token_type_ids"] = own["token_type_ids"][:, -1:].expand_as(tokens)
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):  # generated tokens are text
        if own.get(name) is not None:
            own[name] = torch.zeros_like(tokens)
    inputs: dict[str, Any] = model.prepare_inputs_for_generation(tokens, **own)
    if "logits_to_keep" in inputs:  # afterwards: some models set it to their own taste
        inputs["logits_to_keep"] = heads
    return inputs


def prepared_call(model: Any, input_ids: Tensor, mask: Tensor) -> tuple[Any, dict[str, Any]]:
    """(configuration, model keyword arguments) that plain `generate` prepares for a prompt."""
    found: list[Any] = []

    def capture(_model: Any, ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria"):
            kwargs.pop(name)
        found.extend([generation_config, kwargs])
        return ids

    config = GenerationConfig(do_sample=False, max_new_tokens=16, pad_token_id=0, use_cache=True)
    type(model).generate(model, input_ids, attention_mask=mask, generation_config=config,
                         custom_generate=capture)  # fmt: skip
    return found[0], found[1]


def plain_logits(
    model: Any, prompt: Tensor, config: Any, kwargs: Mapping[str, Any], tokens: Tensor
) -> Tensor:
    """[B, n, V] logits after each of `tokens` [B, n], fed one by one as plain decoding would."""
    output = prefill_as_plain(model, prompt, config, kwargs)
    return logits_after(model, prompt, output, kwargs, tokens)


def logits_after(
    model: Any, prompt: Tensor, output: Any, kwargs: Mapping[str, Any], tokens: Tensor
) -> Tensor:
    """[B, n, V] logits after each of `tokens` [B, n] behind a prompt whose forward gave `output`.

    Goes on in the cache of `output`.
    """
    kwargs, rows = dict(kwargs), []
    for step in range(tokens.shape[1]):
        kwargs = model._update_model_kwargs_for_generation(output, kwargs)
        prompt = torch.cat([prompt, tokens[:, step : step + 1]], dim=1)
        inputs = model.prepare_inputs_for_generation(prompt, next_sequence_length=1, **kwargs)
        output = model(**inputs, return_dict=True)
        rows.append(output.logits[:, -1])
    return torch.stack(rows, dim=1)
