"""Every reason for which a call runs as plain `generate`, and the one warning that says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from specdec import hf_cache, hf_compat
from specdec.capability import Capability
from specdec.errors import FallbackWarning
from specdec.hf_call import Prepared

_KNOWN_MODEL_KWARGS = frozenset({
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "inputs_embeds", "output_hidden_states", "output_attentions", "return_dict",
})  # fmt: skip
_OTHER_DECODERS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "penalty_alpha",
                   "dola_layers", "token_healing", "constraints", "force_words_ids")  # fmt: skip


def warn_plain(reason: str) -> None:
    """The one warning of a call that runs as plain `generate`."""
    warnings.warn(
        f"specdec: this call runs as plain generate, because {reason}.",
        FallbackWarning,
        stacklevel=4,
    )


def option(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """A generation option by `generate`'s own precedence."""
    config = kwargs.get("generation_config")
    if kwargs.get(name) is not None:
        return kwargs[name]
    if getattr(config, name, None) is not None:
        return getattr(config, name)
    return getattr(model.generation_config, name, None)


def why_call_is_plain(model: Any, kwargs: Mapping[str, Any], found: Capability) -> str | None:
    """Why a call must not reach our loop at all: its plain counterpart is not token by token."""
    if found.mode == "plain":
        return found.reason
    for name in ("custom_generate", "assistant_model", "synced_gpus"):
        if kwargs.get(name):
            return f"{name} was given"
    if hf_compat.syncs_gpus(model):
        return "several ranks must run the same number of forwards"
    return _why_options_are_plain(lambda name: option(model, kwargs, name))


def _why_options_are_plain(chosen: Callable[[str], Any]) -> str | None:
    beams, guidance = chosen("num_beams"), chosen("guidance_scale")
    if beams is not None and beams != 1:
        return f"num_beams is {beams}"
    if guidance is not None and guidance != 1:
        return f"guidance_scale is {guidance}: its processor calls the model itself"
    for name in _OTHER_DECODERS:
        if chosen(name):
            return f"{name} is set"
    if chosen("use_cache") is False:
        return "use_cache is False"
    implementation = chosen("cache_implementation")
    if implementation not in (None, "dynamic", "hybrid"):
        return f"cache_implementation is {implementation!r}"
    return None


def why_prepared_is_plain(call: Prepared) -> str | None:
    """Why a prepared call must run as plain `generate`, or None."""
    checks = (_why_model, _why_inputs, _why_mask, _why_batch)
    return next((reason for check in checks if (reason := check(call)) is not None), None)


def _why_model(call: Prepared) -> str | None:
    if hf_compat.prepares_inputs_itself(call.model):
        return "its input preparation was replaced, as PEFT does to add a learned prompt"
    boundary = hf_compat.length_dependent_positions(call.model.config)
    if boundary is not None and call.total + call.max_new_tokens > boundary:
        return f"its rotary positions change with the length of a forward beyond {boundary}"
    window = hf_compat.untold_window(call.model.config)
    if window is not None and call.total + call.max_new_tokens > window[1]:
        return f"its {window[0]} of {window[1]} is applied inside the layers, not by a mask"
    if hf_compat.is_training_at_random(call.model):
        return "the model is in training mode with dropout or gradient checkpointing"
    return None


def _why_inputs(call: Prepared) -> str | None:
    given = (name for name, value in call.kwargs.items() if value is not None)
    unknown = [name for name in given if name not in _KNOWN_MODEL_KWARGS]
    if unknown:
        return f"the model input {unknown[0]!r} is not one that a token tree can carry"
    if call.kwargs.get("output_attentions"):
        return "output_attentions was asked for"
    reason = hf_cache.unsupported_cache(call.cache)
    if reason is None and call.total <= call.past:
        reason = "the cache already holds the whole prompt"
    return reason


def _why_mask(call: Prepared) -> str | None:
    if not _default_positions(call):
        return "position_ids are not those of the attention mask"
    if call.mask is None:
        return None
    if call.mask.shape[1] not in (call.given, call.past + call.given):
        return f"the attention mask is {call.mask.shape[1]} wide for {call.given} tokens"
    if bool((call.mask[:, -1] == 0).any()):
        return "the batch is padded on the right"
    if call.keeps_cache and _has_holes(call.mask[:, call.past :]):
        return "its attention mask has holes where the user's cache wants every token"
    windowed = hf_compat.MaskKinds.of(call.model.config)
    if _has_holes(call.mask) and any(map(windowed.is_windowed, windowed.kinds)):
        return "its attention mask has holes and the model has attention windows"
    return None


def _has_holes(mask: Tensor) -> bool:
    """Whether padding follows a token."""
    return bool((mask[:, 1:] < mask[:, :-1]).any())


def _default_positions(call: Prepared) -> bool:
    positions = call.kwargs.get("position_ids")
    if positions is None:
        return True
    if call.mask is None:
        wanted = torch.arange(call.total, device=positions.device)[None]
    else:
        wanted = (call.mask.long().cumsum(-1) - 1).masked_fill(call.mask == 0, 0)
    wanted = wanted[:, call.total - positions.shape[-1] :]
    return positions.ndim == 2 and bool((positions == wanted).all())


def _why_batch(call: Prepared) -> str | None:
    if call.batch == 1:
        return None
    unknown = hf_compat.unknown_processors(call.processors)
    if unknown:
        return f"{unknown[0]} may hold state for the whole batch"
    unknown = hf_compat.unknown_criteria(call.criteria)
    if unknown:
        return f"the stopping criterion {unknown[0]} may look at the whole batch"
    if call.other_criteria is not None and not call.eos_ids:
        return "rows would end without an EOS token to pad them with"
    return None
