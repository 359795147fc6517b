"""Every reason for which a call runs as plain `generate`, and the one warning that says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from specdec.caches import state_cache, user_cache
from specdec.contracts import Shape
from specdec.errors import FallbackWarning
from specdec.generate.call import PreparedCall
from specdec.hf import compat, states, steps
from specdec.hf.names import CACHE_INPUTS, cache_argument, counts_slots
from specdec.targets.prompt_test import why_not_trees
from specdec.targets.self_test import Capability

_KNOWN_MODEL_KWARGS = frozenset({
    "attention_mask", "position_ids", "use_cache", "logits_to_keep", "inputs_embeds",
    "output_hidden_states", "output_attentions", *CACHE_INPUTS,
})  # fmt: skip
_CACHES = ("dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window")
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
    if compat.syncs_gpus(model):
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
    chunk = chosen("prefill_chunk_size")
    if chunk is not None and not (isinstance(chunk, int) and chunk > 0):
        return f"prefill_chunk_size is {chunk!r}"
    if chosen("use_cache") is False:
        return "use_cache is False"
    implementation = chosen("cache_implementation")
    if implementation not in (None, *_CACHES):
        return f"cache_implementation is {implementation!r}"
    return None


def why_prepared_is_plain(
    call: PreparedCall, found: Capability, shape: Shape = "any"
) -> str | None:
    """Why a prepared call must run as plain `generate`, or None.

    Args:
        shape: Trees that the drafter proposes.
    """
    reason = _why_layout(call)  # what the checks after it read rows and slots from
    if reason is None and found.mode == "chain":
        reason = _why_no_chains(call, found, shape)
    elif reason is None:
        reason = _why_no_trees(call, found)
    reason = reason or _why_model(call) or _why_batch(call)
    return reason or (_why_inputs(call, found) if found.mode == "tree" else None)


def _why_no_trees(call: PreparedCall, found: Capability) -> str | None:
    prompt = call.prompt
    if not found.padded and any(prompt.padding):  # older releases keep a mask of ones
        return "the model's own text changes when a row is padded"
    window = compat.untold_window(call.model.config)
    length = call.longest
    if window is not None and length > window[1]:
        return f"its {window[0]} of {window[1]} is applied inside the layers, by slot"
    kinds = compat.MaskKinds.of(call.model.config)
    reached = any(kinds.reaches(kind, length) for kind in kinds.kinds)
    if reached and not compat.masks_its_window(call.model):
        return "its attention window is applied by the cache alone, not by a mask"
    known = (*_KNOWN_MODEL_KWARGS, *steps.MULTIMODAL)
    unknown = [name for name in prompt.inputs_given if name not in known]
    if unknown:
        return f"the model input {unknown[0]!r} is not one that a token tree can carry"
    if prompt.own_inputs and (reason := _why_positions(call)):
        return reason
    streams = states.streams_of_state(call.model.config)
    if call.wanted.hidden_states and streams > 1:
        return f"output_hidden_states was asked for and layers hand on {streams} streams of a state"
    slots = call.longest - 1
    reason = user_cache.unsupported_cache(prompt.cache, slots, call.model.config, found.laid)
    windowed = compat.MaskKinds.of(call.model.config)
    if reason is None and prompt.mask is not None and _has_holes(prompt.mask):
        if call.keeps_cache and _has_holes(prompt.mask[:, prompt.past :]):
            return "its attention mask has holes where the user's cache wants every token"
        if any(map(windowed.is_windowed, windowed.kinds)):
            return "its attention mask has holes and the model has attention windows"
    return reason


def _why_positions(call: PreparedCall) -> str | None:
    """Why the prompt's positions do not say where its text goes on."""
    prompt = call.prompt
    positions = prompt.positions
    if positions is None:
        return "generate prepared no position_ids for its inputs"
    rows, width = (1, *positions.shape)[-2:]
    if rows not in (1, prompt.batch) or width < prompt.total - prompt.past:
        return f"position_ids of shape {tuple(positions.shape)} were given for {prompt.batch} rows"
    return None


def _why_inputs(call: PreparedCall, found: Capability) -> str | None:
    """Tests the prompt when the model has to prepare it itself; once for every kind of prompt."""
    prompt = call.prompt
    names = prompt.own_inputs
    if not names:
        return None
    kind = (*names, f"rows: {min(prompt.batch, 2)}", f"padding: {prompt.mask is not None}")
    if kind not in found.prompts:
        found.prompts[kind] = why_not_trees(call.model, prompt, found.noise)
    reason = found.prompts[kind]
    return None if reason is None else f"{names[-1]} was given and {reason}"


def _why_no_chains(call: PreparedCall, found: Capability, shape: Shape) -> str | None:
    prompt = call.prompt
    if shape == "tree":
        return "the method proposes token trees and the model takes single paths only"
    if prompt.batch > 1 and not found.batched:
        return "the model verifies one row at a time"
    known = (*_KNOWN_MODEL_KWARGS, *steps.MULTIMODAL)
    unknown = [name for name in prompt.inputs_given if name not in known]
    if unknown:
        return f"the model input {unknown[0]!r} is not known"
    if call.wanted.hidden_states:
        return "output_hidden_states was asked for and the model takes single paths only"
    if prompt.mask is not None and _has_holes(prompt.mask):
        return "its attention mask has holes and the model takes single paths only"
    if call.keeps_cache and not counts_slots(*cache_argument(prompt.kwargs)):
        return "the user's cache holds states alone, and generate does not ask how long its text is"
    return state_cache.why_not_revocable(prompt.cache, prompt.padding)


def _why_model(call: PreparedCall) -> str | None:
    prompt = call.prompt
    if compat.prepares_inputs_itself(call.model):
        return "its input preparation was replaced, as PEFT does to add a learned prompt"
    boundary = compat.length_dependent_positions(call.model.config)
    if boundary is not None and call.longest + prompt.ahead > boundary:
        return f"its rotary positions change with the length of a forward beyond {boundary}"
    ranked = compat.ranked_keys(call.model.config)
    if ranked is not None and call.longest > ranked:
        return f"beyond {ranked} tokens its indexer chooses keys by rank, ties at random"
    if prompt.kwargs.get("output_attentions"):
        return "output_attentions was asked for"
    if prompt.total <= prompt.past:
        return "the cache already holds the whole prompt"
    return None


def _why_layout(call: PreparedCall) -> str | None:
    """Why rows, cache and mask of the call do not say together where its prompt stands."""
    prompt = call.prompt
    cached = state_cache.rows_held(prompt.cache) if call.keeps_cache else None
    if not prompt.batch:
        return "the batch has no rows"
    if cached is not None and cached != prompt.batch:
        return f"the user's cache holds {cached} rows and the call has {prompt.batch}"
    if prompt.total not in (prompt.given, prompt.past + prompt.given):
        return f"the attention mask is {prompt.total} wide for {prompt.given} tokens"
    if prompt.embeds is not None and prompt.config.prefill_chunk_size is not None:
        return "prefill_chunk_size splits ids and inputs_embeds was given"
    if prompt.past and prompt.config.prefill_chunk_size and not compat.chunks_skip_cached_tokens():
        return "with prefill_chunk_size, this transformers runs cached tokens again"
    if prompt.mask is not None and bool((prompt.mask[:, -1] == 0).any()):
        return "the batch is padded on the right"
    return None


def _has_holes(mask: Tensor) -> bool:
    """Whether padding follows a token."""
    return bool((mask[:, 1:] < mask[:, :-1]).any())


def _why_batch(call: PreparedCall) -> str | None:
    prompt = call.prompt
    if prompt.batch == 1:
        return None
    unknown = compat.unknown_processors(call.processors)
    if unknown:
        return f"{unknown[0]} may hold state for the whole batch"
    unknown = compat.unknown_criteria(call.criteria)
    if unknown:
        return f"the stopping criterion {unknown[0]} may look at the whole batch"
    if call.ends.criteria is not None and not call.ends.eos_ids:
        return "rows would end without an EOS token to pad them with"
    return None
