"""How checkpoints and serving engines count the target's layers, and how we do.

We count decoder layers from 0 and mean their *output*; -1 is the embeddings. Two other counts are
in use, both written as bare integers under one name: SafeAILab, SpecForge, ModelOpt and SGLang mean
our numbers, vLLM and speculators mean indices of Hugging Face's `hidden_states`, which are one
higher. Three classes of SGLang decide between the two by looking at the numbers. A head that is fed
the wrong layers raises nothing and drafts badly, so everything here either converts or raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from specdec.errors import ConfigError
from specdec.heads.eagle3.config import LEAST_FOR_DEFAULT, default_aux_layers

Counting = Literal["output", "hidden_states"]
"""What a number means: the output of that layer, or Hugging Face's index of hidden states."""

_MOST_IDS = 16
_MOST_LAYERS = 4096

# Target classes of SGLang 0.5.23 whose `set_eagle3_layers_to_capture` was read. The first group
# adds one to every number; the second does so only when the first number is 1; GPT-OSS does so
# unless the largest is the number of layers.
_SGLANG_ADDS_ONE = frozenset(
    {
        "apertus", "bailing_moe", "exaone_moe", "gemma3_text", "glm4_moe", "llama", "llama4_text",
        "longcat_flash", "minimax_m2", "mistral", "phi3", "qwen2", "qwen2_moe", "qwen3",
        "qwen3_moe", "qwen3_next",
    }
)  # fmt: skip
_SGLANG_ADDS_ONE_AFTER_ONE = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe_lite"})
_SGLANG_ADDS_ONE_BELOW_LAST = frozenset({"gpt_oss"})


def read_ids(
    ids: Any, counting: Counting, num_layers: int | None, name: str = "aux layer ids"
) -> tuple[int, ...]:
    """`aux_output_layers` from the numbers of a checkpoint.

    Args:
        ids: As the checkpoint has them.
        counting: What they mean there.
        num_layers: Of the target, or None when nobody knows; then only the lower end is checked.
        name: The field's, for messages.

    Raises:
        ConfigError: No list of distinct ascending numbers, or one lies outside the target.
    """
    shift = 1 if counting == "hidden_states" else 0
    layers = tuple(number - shift for number in _checked(ids, name))
    check_layers(layers, num_layers, name)
    return layers


def hidden_states_ids(layers: Sequence[int]) -> list[int]:
    """The numbers that vLLM and speculators want for our layers."""
    return [layer + 1 for layer in layers]


def check_layers(layers: Sequence[int], num_layers: int | None, name: str) -> None:
    """Raises `ConfigError` unless these layers ascend and exist in a target of so many layers."""
    shown = list(layers)
    if any(b <= a for a, b in pairwise(layers)):
        raise ConfigError(
            f"{name} must ascend and name no layer twice, got output layers {shown}: engines sort "
            "them, and the head's fc would read them in another order"
        )
    if layers and layers[0] < -1:
        raise ConfigError(f"{name} names output layer {layers[0]}; the lowest is -1, embeddings")
    if num_layers is None or not layers:
        return
    if layers[-1] == num_layers - 1:
        raise ConfigError(
            f"{name} names the output of the last layer (output layer {layers[-1]}, hidden state "
            f"{num_layers}) of a target with {num_layers} layers: engines take it before the "
            "target's final norm and Hugging Face gives it after; choose an earlier layer"
        )
    if layers[-1] >= num_layers:
        raise ConfigError(
            f"{name} names output layer {layers[-1]}, the target has {num_layers} layers; the "
            "head was made for another target, or the numbers count from elsewhere"
        )


def sglang_reads(ids: Sequence[int], model_type: str, num_layers: int) -> tuple[int, ...]:
    """Output layers that SGLang feeds to a head whose `eagle_config` names these numbers.

    Raises:
        ConfigError: How this class of targets counts is not known.
    """
    if model_type in _SGLANG_ADDS_ONE:
        adds = True
    elif model_type in _SGLANG_ADDS_ONE_AFTER_ONE:
        adds = ids[0] == 1
    elif model_type in _SGLANG_ADDS_ONE_BELOW_LAST:
        adds = max(ids) != num_layers
    else:
        raise ConfigError(
            f"how SGLang counts layers of model_type {model_type!r} is not known; export for this "
            "target without an engine, and compare its acceptance with `specdec generate --stats`"
        )
    return tuple(ids) if adds else tuple(number - 1 for number in ids)


def sglang_ids(layers: Sequence[int], model_type: str | None, num_layers: int) -> list[int] | None:
    """The numbers that make SGLang feed our layers; None to leave the field out.

    Left out for the default layers: there, and only there, SGLang has no class that counts apart.

    Raises:
        ConfigError: No numbers make this class of targets feed these layers, or it is not known.
    """
    wanted = tuple(layers)
    if num_layers >= LEAST_FOR_DEFAULT and wanted == default_aux_layers(num_layers):
        return None
    if model_type is None:
        raise ConfigError(
            "fingerprint of the target is missing, and SGLang counts layers by the target's class; "
            "pass it (--target NAME)"
        )
    for shift in (0, 1):
        ids = [layer + shift for layer in wanted]
        if ids[0] >= 0 and sglang_reads(ids, model_type, num_layers) == wanted:
            return ids
    raise ConfigError(
        f"aux_output_layers {list(wanted)} cannot be named to SGLang for model_type "
        f"{model_type!r} with {num_layers} layers: whatever is written, it reads other layers"
    )


def counts_apart(model_type: str) -> bool:
    """Whether SGLang may take numbers of this class for something else than output layers."""
    return model_type in _SGLANG_ADDS_ONE_AFTER_ONE | _SGLANG_ADDS_ONE_BELOW_LAST


def _checked(ids: Any, name: str) -> list[int]:
    if not isinstance(ids, list | tuple) or not 1 <= len(ids) <= _MOST_IDS:
        raise ConfigError(f"{name} must be a list of 1 to {_MOST_IDS} numbers, got {ids!r:.80}")
    for number in ids:
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or abs(number) > _MOST_LAYERS:
            raise ConfigError(f"{name} holds {number!r:.60}, which is no layer number")
    return list(ids)
