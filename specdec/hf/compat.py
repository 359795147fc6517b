"""Every private or version-dependent Hugging Face name that the library touches, in one place.

Differences between transformers releases are detected by feature, never by version number.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_utils
from transformers.generation import GenerationMixin, logits_process, stopping_criteria
from transformers.generation import utils as generation_utils
from transformers.utils import output_capturing

_STATELESS_PROCESSORS = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)
_ROWWISE_PROCESSORS = (
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
)
_ROWWISE_CRITERIA = (
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "StopStringCriteria",
    "EosTokenCriteria",
)


def _known(module: Any, names: Sequence[str]) -> set[type]:
    return {getattr(module, name) for name in names if hasattr(module, name)}


def _name(thing: object) -> str:
    return str(getattr(thing, "__name__", type(thing).__name__))


def all_stateless(processors: Sequence[object]) -> bool:
    """Whether no processor looks at the prefix, so that all nodes can be processed at once."""
    return all(type(p) in _known(logits_process, _STATELESS_PROCESSORS) for p in processors)


def unknown_processors(processors: Sequence[object]) -> list[str]:
    """Processors that may not be called row by row: they could hold state for the whole batch."""
    known = _known(logits_process, _STATELESS_PROCESSORS + _ROWWISE_PROCESSORS)
    return [_name(p) for p in processors if type(p) not in known]


def processors_by_row(processors: Sequence[object], batch: int) -> list[Any]:
    """The processors as each row of a batch needs them when it is processed alone.

    The repetition penalty holds the padding length of every row, and refuses another batch size.
    """
    rows = []
    for row in range(batch):
        own = logits_process.LogitsProcessorList()
        for processor in processors:
            ignored = getattr(processor, "prompt_ignore_length", None)
            if batch > 1 and isinstance(ignored, Tensor):
                processor = copy.copy(processor)
                processor.prompt_ignore_length = ignored[row : row + 1]  # type: ignore[attr-defined]
            own.append(processor)
        rows.append(own)
    return rows


def unknown_criteria(criteria: Sequence[object]) -> list[str]:
    """Stopping criteria that may not be called row by row."""
    known = _known(stopping_criteria, _ROWWISE_CRITERIA)
    return [_name(c) for c in criteria if type(c) not in known]


def eos_token_ids(criterion: Any) -> list[int] | None:
    """The ids of an `EosTokenCriteria`, None for any other criterion."""
    if type(criterion) is not stopping_criteria.EosTokenCriteria:
        return None
    return [int(token) for token in criterion.eos_token_id.flatten()]


def max_length_of(criterion: Any) -> float | None:
    """The limit of a `MaxLengthCriteria`, which may be a fraction; None for any other criterion."""
    if type(criterion) is not stopping_criteria.MaxLengthCriteria:
        return None
    limit: float = criterion.max_length
    return limit


def stop_string_criterion(stop_strings: str | list[str], tokenizer: Any) -> Any:
    """The criterion that `generate` builds for `stop_strings`."""
    return stopping_criteria.StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer)


def pad_token_id(generation_config: Any) -> int | None:
    """The prepared padding id of a call."""
    pad = getattr(generation_config, "_pad_token_tensor", None)
    return None if pad is None else int(pad)


def prompt_length(
    generation_config: Any, attention_mask: Tensor | None, width: int, past: int
) -> int:
    """Tokens of the prompt, those already in the user's cache included.

    `generate` accepts the full ids or only the new ones; the mask always spans all of them, and is
    dropped when it is all ones, leaving its length behind.
    """
    if attention_mask is not None:
        return attention_mask.shape[1]
    recorded = getattr(generation_config, "_mask_length", None)
    if recorded is not None and recorded >= 0:
        return int(recorded)
    return width if width > past else width + past


def chunks_skip_cached_tokens() -> bool:
    """Whether a prefill in chunks runs only what the user's cache does not hold.

    Older releases run all given ids once more behind it. Seen by a name that the loop over chunks
    has since then; a release that drops it is taken for an old one, and left to itself.
    """
    return "prefill_ids" in GenerationMixin._prefill.__code__.co_varnames


def name_arguments(model: Any, args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments of the model's own `generate`, by name."""
    parameters = inspect.signature(type(model).generate).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):  # a wrapper passes them on
        parameters = inspect.signature(GenerationMixin.generate).parameters
    return dict(zip(list(parameters)[1:], args, strict=False))


def plain_decode(model: Any, input_ids: Tensor, streamer: Any, **prepared: Any) -> Any:
    """Hands a prepared call to the loop that `generate` would have used."""
    if streamer is not None:
        prepared["streamer"] = streamer
    return type(model)._sample(model, input_ids, **prepared)


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def input_device(model: Any) -> torch.device:
    """Where ids go in; `model.device` is "meta" when accelerate offloaded the embeddings."""
    if model.device.type != "meta":
        return torch.device(model.device)
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    places = [getattr(hook, "execution_device", None) for hook in hooks]
    return torch.device(next((place for place in places if place is not None), "cpu"))


def prepares_inputs_itself(model: Any) -> bool:
    """Whether somebody replaced how inputs are made: PEFT adds a learned prompt that way."""
    used = getattr(model.prepare_inputs_for_generation, "__func__", None)
    return used is not type(model).prepare_inputs_for_generation


def supports_logits_to_keep(model: Any) -> bool:
    """Whether the forward can skip the language-model head at most positions."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def hidden_states_argument(taps: Sequence[int]) -> bool | list[int]:
    """What `output_hidden_states` must be for a forward to return the output of layers `taps`.

    A list keeps just those states, 0 being the embeddings. Releases that count otherwise, or know
    no lists, are asked for all of them.
    """
    counts_embeddings = hasattr(output_capturing, "selected_hidden_states")
    return [tap + 1 for tap in taps] if counts_embeddings else True


def max_positions(config: Any) -> int:
    """Positions that a model declares; unlimited when it declares none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def length_dependent_positions(config: Any) -> int | None:
    """Length from which the rotary frequencies depend on the longest position of a forward.

    Such models (rope types "dynamic" and "longrope") would let a deep draft change the logits of
    its own root. None for all others.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return int(original or text.max_position_embeddings)
    return None


def untold_window(config: Any) -> tuple[str, int] | None:
    """(name, tokens) of what a layer does by slot instead of position, the shortest one.

    Windows of their own that no mask carries, and scales that follow the length (Llama 4).
    """
    text = config.get_text_config()
    names = ["floor_scale"] if getattr(text, "attn_temperature_tuning", False) else []
    names += [
        name
        for name in vars(text)  # to_dict takes a millisecond
        if name.endswith(("window", "window_size")) and name != "sliding_window"
    ]
    sizes = [(value, name) for name in names if type(value := getattr(text, name)) is int]
    sizes = [(value, name) for value, name in sizes if value > 0]
    return (min(sizes)[1], min(sizes)[0]) if sizes else None


def ranked_keys(config: Any) -> int | None:
    """Length from which an indexer chooses keys by rank, where equal scores are chosen at random.

    The indexers of sparse attention (`index_topk`) give exact zeros; which of them are chosen then
    differs between a forward over one token and over several.
    """
    found = getattr(config.get_text_config(), "index_topk", None)
    return found if type(found) is int else None


def masks_its_window(model: Any) -> bool:
    """Whether the model's own code puts its sliding window into a mask.

    Others leave it to the cache, which forgets what lies outside: no tree can see that.
    """
    makers = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")
    modules = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(name), maker) for name in modules for maker in makers)


def attention_name(config: Any) -> str | None:
    """Name of the attention that a configuration chose, for example "sdpa"."""
    return getattr(config, "_attn_implementation", None)


def attention_function(model: Any) -> object:
    """What runs attention under the name that the configuration chose; anybody may register it."""
    name = attention_name(model.config.get_text_config())
    return modeling_utils.ALL_ATTENTION_FUNCTIONS.get(name)


def syncs_gpus(model: Any) -> bool:
    """Whether `generate` would keep several ranks in step by itself (ZeRO-3, FSDP)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    sharded = generation_utils.is_deepspeed_zero3_enabled() or (
        generation_utils.is_fsdp_managed_module(model)
    )
    return bool(sharded and torch.distributed.get_world_size() > 1)


def vocabulary_size(model: Any) -> int:
    """Ids that the model can take as input."""
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    return int(rows or model.config.get_text_config().vocab_size)


def placeholder_ids(config: Any) -> list[int]:
    """Ids that stand for a part of an image, a video or a sound in a prompt."""
    kinds = ("image", "video", "audio")
    found = [
        value
        for name, value in vars(config).items()
        if name.startswith(kinds) and name.endswith(("_token_id", "_token_index"))
    ]
    return sorted({value for value in found if type(value) is int and value >= 0})


def has_experts(config: Any) -> bool:
    """Whether tokens of a forward are sorted among experts."""
    text = vars(config.get_text_config()).items()
    return any("expert" in name and type(value) is int and value > 1 for name, value in text)


def accepts_position_ids(model: Any) -> bool:
    """Whether positions can be given to the forward."""
    return "position_ids" in inspect.signature(model.forward).parameters


@dataclass(frozen=True, slots=True)
class MaskKinds:
    """Which attention masks a model's layers want.

    Attributes:
        kinds: Layer types, each with a mask of its own.
        as_dict: Whether the forward takes a mask by layer type, or a single one.
        window: Sliding window in tokens, if any layer slides.
        chunk: Attention chunk in tokens, if any layer is chunked.
    """

    kinds: tuple[str, ...]
    as_dict: bool
    window: int | None
    chunk: int | None

    @classmethod
    def of(cls, config: Any) -> MaskKinds:
        """Reads them off a model config, by the rule of `create_masks_for_generate`."""
        text = config.get_text_config()
        window = getattr(text, "sliding_window", None)
        chunk = getattr(text, "attention_chunk_size", None)
        layer_types = getattr(text, "layer_types", None)
        if layer_types is not None:
            return cls(tuple(sorted(set(layer_types))), True, window, chunk)
        if window is not None:
            return cls(("sliding_attention",), False, window, chunk)
        if chunk is not None:
            return cls(("chunked_attention",), False, window, chunk)
        return cls(("full_attention",), False, None, None)

    def is_windowed(self, kind: str) -> bool:
        """Whether layers of this type see only a part of the prefix."""
        return self._span(kind) is not None

    def reaches(self, kind: str, length: int) -> bool:
        """Whether the window of this layer type hides anything in a text of `length` tokens."""
        span = self._span(kind)
        return span is not None and length > span

    def _span(self, kind: str) -> int | None:
        if kind == "chunked_attention":
            return self.chunk
        return self.window if "sliding" in kind else None

    def within(self, kind: str, query: Tensor, key: Tensor) -> Tensor:
        """Whether `key` positions are in the window of `query` positions; bool, broadcast."""
        span = self._span(kind)
        if span is None:
            raise ValueError(f"layers of type {kind!r} have no window")
        if kind == "chunked_attention":
            whole = torch.div(query, span, rounding_mode="floor")
            return whole == torch.div(key, span, rounding_mode="floor")
        return (query - key) < span


@contextmanager
def dense_attention(model: Any) -> Iterator[None]:
    """Runs tree forwards on a backend that takes a dense mask.

    Flash attention ignores a 4-D mask and treats tree positions as packed sequences: silently
    wrong. Prefill keeps the user's backend, and so does the part of the model that sees images.
    """
    config = model.config.get_text_config()
    chosen = config._attn_implementation
    if chosen is None or not ("flash" in chosen or "flex" in chosen):
        yield
        return
    config._attn_implementation = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = chosen
