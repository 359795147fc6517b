"""Reads the configuration of an EAGLE-3 checkpoint in any dialect into fields of `Eagle3Config`.

One field means different things in different dialects, and most heads leave out what their trainer
took for granted. What is stated, what a dialect implies and what is only assumed are kept apart, so
that a user can be told, and so that a contradiction is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from specdec.errors import ConfigError
from specdec.heads.checkpoints.aux_layers import counts_apart, read_ids, sglang_reads
from specdec.heads.checkpoints.parsed import Context, Parsed, flag, whole
from specdec.heads.checkpoints.rope import of_one_layer, read_rope
from specdec.heads.checkpoints.strict_files import TensorInfo
from specdec.heads.checkpoints.tensor_sizes import read_sizes, read_target_width
from specdec.heads.checkpoints.tensors import canonical_names, structure
from specdec.heads.eagle3.config import LEAST_FOR_DEFAULT, default_aux_layers

DIALECTS = ("specforge", "safeailab", "speculators", "modelopt", "nemo")
"""Formats of head checkpoints, by the project that writes them."""

AUX_IDS = "eagle_aux_hidden_state_layer_ids"
"""The field that names target layers, in every dialect and with two meanings."""

_ARCHITECTURES = {
    "LlamaForCausalLM": "safeailab",
    "LlamaForCausalLMEagle3": "specforge",
    "Eagle3LlamaForCausalLM": "specforge",
    "Eagle3DraftModel": "speculators",
    "Eagle3Speculator": "speculators",
    "LlamaEagle3DraftModel": "nemo",
}
_MODELOPT_FIELDS = (
    "use_last_layernorm",
    "use_input_layernorm_in_first_layer",
    "next_layer_regular",
)
# What would change the numbers and is not built here: field -> values that change nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "parallel_drafting": (False, None),
    "is_causal": (True, None),
}
_ONLY_IN_EAGLE_CONFIG: dict[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True, None),
    "use_input_layernorm_in_first_layer": (True, None),
    "use_last_layernorm": (True, None),
    "use_mtp_layernorm": (False, None),
    "parallel_draft_step": (0, 1, None),
}
_MOST_LAYERS = 4096
_WITH_WINDOWS = ("speculators",)  # dialects whose trainers build a layer with a window
# Override -> the fields of a checkpoint that say the same, where their names differ.
_SAID_BY = {
    "aux_output_layers": (AUX_IDS, "num_aux_hidden_states"),
    "feed_post_norm": ("feed_post_norm", "norm_output"),
    "rope": ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    "sliding_window": ("sliding_window", "use_sliding_window", "layer_types"),
}


def parse(raw: Mapping[str, Any], infos: Mapping[str, TensorInfo], context: Context) -> Parsed:
    """Reads a `config.json`.

    Args:
        raw: Its content.
        infos: Tensors of the checkpoint, as the file names them.
        context: What is known about the target, and what a user says.

    Raises:
        ConfigError: It is no EAGLE-3 head, or one that this library cannot run; names the field.
    """
    dialect = detect(raw, infos)
    layer: Mapping[str, Any] = raw
    if dialect == "speculators":
        layer = _object(raw, "transformer_layer_config")
    elif isinstance(raw.get("text_config"), dict):  # of a target with several modalities
        layer = raw["text_config"] | {name: one for name, one in raw.items() if one is not None}
    extra = _object(raw, "eagle_config") if raw.get("eagle_config") is not None else {}
    raw, layer, extra = (_with_chosen(one, context.chosen) for one in (raw, layer, extra))
    for fields, only in ((layer, _ONLY), (raw, _ONLY), (extra, _ONLY_IN_EAGLE_CONFIG)):
        _check_only(fields, only)
    _check_copied(layer)
    ours = {name: infos[theirs] for name, theirs in canonical_names(infos).items()}
    parsed = Parsed(dialect, {}, set())
    read_sizes(parsed, raw, layer, ours, context.chosen.get("head_dim"))
    _read_numbers(parsed, layer)
    _read_window(parsed, layer)
    _read_flags(parsed, raw, extra, structure(ours))
    _read_layers(parsed, raw, extra, context)
    read_target_width(parsed, raw, ours, _count_layers(raw, parsed, context))
    for name, value in context.chosen.items():
        parsed.state(name, value)
        parsed.assumed.pop(name, None)
    return parsed


def _with_chosen(fields: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as if whoever wrote them had known what the user says."""
    replaced = {said for name in chosen for said in _SAID_BY.get(name, (name,))}
    found = {name: value for name, value in fields.items() if name not in replaced}
    return found | {name: value for name, value in chosen.items() if name not in _SAID_BY}


def detect(raw: Mapping[str, Any], names: Iterable[str]) -> str:
    """The dialect of a checkpoint.

    Raises:
        ConfigError: It is no EAGLE-3 head.
    """
    kind = raw.get("speculators_model_type")
    if kind is not None:
        if kind != "eagle3":
            raise ConfigError(f"speculators_model_type must be 'eagle3', got {kind!r:.60}")
        return "speculators"
    given = raw.get("architectures")
    if given is None:
        given = ["LlamaForCausalLM"]  # as in the first heads of SafeAILab
    if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], str):
        raise ConfigError(f"architectures must be a list of one name, got {given!r:.80}")
    if given[0] not in _ARCHITECTURES:
        raise ConfigError(
            f"architectures names {given[0]!r:.80}, which is no EAGLE-3 head; known are "
            f"{', '.join(_ARCHITECTURES)}"
        )
    dialect = _ARCHITECTURES[given[0]]
    names = list(names)
    extra = raw.get("eagle_config")
    if dialect == "nemo" or any(name.startswith("model.layers.") for name in names):
        return "nemo"
    if isinstance(extra, dict) and any(name in extra for name in _MODELOPT_FIELDS):
        return "modelopt"
    if dialect == "specforge" and any(name.startswith("layers.") for name in names):
        return "modelopt"
    return dialect


def _object(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = raw.get(name)
    if not isinstance(found, dict):
        raise ConfigError(f"{name} in config.json must be an object, got {found!r:.80}")
    return found


def _check_only(fields: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in only.items():
        found = fields.get(name, values[0])
        if not any(_same(found, value) for value in values):
            raise ConfigError(
                f"{name} in config.json must be {values[0]!r}, got {found!r:.60}; other heads are "
                "not supported"
            )


def _same(found: Any, value: Any) -> bool:
    """Equality in which true is not 1."""
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)


def _check_copied(layer: Mapping[str, Any]) -> None:
    """Refuses nonsense in fields that are the target's as often as the head's, and not used."""
    layers, kind = layer.get("num_hidden_layers", 1), layer.get("model_type", "llama")
    whole_number = isinstance(layers, int) and not isinstance(layers, bool)
    if layers is not None and not (whole_number and 1 <= layers <= _MOST_LAYERS):
        raise ConfigError(
            f"num_hidden_layers in config.json must be a whole number from 1 to {_MOST_LAYERS}, "
            f"got {layers!r:.60}"
        )
    if kind is not None and not isinstance(kind, str):
        raise ConfigError(f"model_type in config.json must be a name, got {kind!r:.60}")


def _read_numbers(parsed: Parsed, layer: Mapping[str, Any]) -> None:
    rope, left_out = of_one_layer(layer, parsed.dialect)
    found: dict[str, Any] = {
        "rms_norm_eps": layer.get("rms_norm_eps"),
        "hidden_act": layer.get("hidden_act", layer.get("hidden_activation")),
        "max_position_embeddings": layer.get("max_position_embeddings"),
        "rope": read_rope(rope),
    }
    eps, activation = found["rms_norm_eps"], found["hidden_act"]
    if isinstance(eps, int) and not isinstance(eps, bool):
        found["rms_norm_eps"] = float(min(max(eps, -1), 1))  # refused with the others, as a number
    if activation is not None and not isinstance(activation, str):
        raise ConfigError(f"hidden_act in config.json must be a name, got {activation!r:.60}")
    usual = {
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    for name, value in found.items():
        if value is None:
            parsed.assume(name, usual[name], f"{name} not stated; {usual[name]} as in Llama")
        else:
            parsed.state(name, value)
    if left_out:
        parsed.assumed["rope"] = left_out
    scale = layer.get("logit_scale")
    if scale not in (None, 1) and parsed.dialect != "nemo":
        parsed.assumed["logit_scale"] = (
            f"logit_scale {scale!r:.20} is taken for the target's and left out, as trainers do"
        )


def _read_window(parsed: Parsed, layer: Mapping[str, Any]) -> None:
    """The window of the head's layer; most trainers build none, whatever the target had."""
    parsed.settings["sliding_window"] = None
    types = layer.get("layer_types")
    if parsed.dialect in _WITH_WINDOWS:
        parsed.settings["sliding_window"] = _stated_window(types, layer)
    elif parsed.dialect != "nemo" and types == ["sliding_attention"]:
        # A list of one is the head's own and no target's; whoever wrote it had an engine in mind.
        size = _stated_window(types, layer)
        sentence = f"sliding_window is {size}, as vLLM reads it; trainers of this dialect have none"
        parsed.assume("sliding_window", size, sentence)


def _stated_window(types: Any, layer: Mapping[str, Any]) -> int | None:
    if types is None or layer.get("use_sliding_window") is False:
        return None
    if not isinstance(types, list) or types[:1] not in (["full_attention"], ["sliding_attention"]):
        raise ConfigError(
            "layer_types in config.json must begin with full_attention or sliding_attention, got "
            f"{types!r:.80}"
        )
    return None if types[0] == "full_attention" else whole(layer, "sliding_window")


def _read_flags(
    parsed: Parsed,
    raw: Mapping[str, Any],
    extra: Mapping[str, Any],
    shown: Mapping[str, bool],
) -> None:
    """The flags: those that the tensors show, and those that only the configuration can say."""

    def said(name: str) -> bool | None:
        return flag(extra if extra.get(name) is not None else raw, name)

    for name, there in shown.items():
        # `attention_bias`, `mlp_bias` and `bias` are copied from the target and mean nothing.
        if name in ("fc_norm", "norm_before_fc") and said(name) and not there:
            raise ConfigError(f"{name} is true in config.json, and its tensors are missing")
        parsed.state(name, there)
    if shown["fc_norm"] and shown["norm_before_fc"]:
        raise ConfigError("fc_norm and norm_before_fc are both on; their order is not defined")
    residual = said("norm_before_residual")
    if residual is None:
        parsed.assume("norm_before_residual", *_residual_default(parsed.dialect))
    else:
        parsed.state("norm_before_residual", residual)
    _read_feedback(parsed, flag(raw, "feed_post_norm"), said("norm_output"))


def _residual_default(dialect: str) -> tuple[bool, str]:
    if dialect == "speculators":
        return True, (
            "norm_before_residual not stated; true, as vLLM takes it in this format, although the "
            "class of speculators 0.9 takes false"
        )
    if dialect == "modelopt":
        return False, (
            "norm_before_residual not stated; false, as ModelOpt's own layer has it, although its "
            "template for vLLM says true"
        )
    return False, "norm_before_residual not stated; false, as trainers of this dialect"


def _read_feedback(parsed: Parsed, ours: bool | None, said: bool | None) -> None:
    """`feed_post_norm`, by our own field or by `norm_output`.

    Engines, NeMo and speculators mean by `norm_output` that later steps read the state after the
    final norm (EAGLE-3.1). SpecForge meant the norm before `lm_head`, until its change of September
    2026 (its pull request 879) gave it the same meaning; no version in a file tells which.
    """
    if ours is not None or parsed.dialect in ("nemo", "speculators"):
        value = said if ours is None else ours
        parsed.settings["feed_post_norm"] = bool(value)
        parsed.stated |= set() if value is None else {"feed_post_norm"}
    elif said:
        parsed.assume(
            "feed_post_norm",
            True,
            "norm_output is true, taken as engines mean it and SpecForge since September 2026: "
            "feed_post_norm is true; SpecForge before then meant the norm before lm_head, and "
            "feed_post_norm is false",
        )
    elif said is not None:
        parsed.assume(
            "feed_post_norm",
            False,
            "norm_output is false, taken as engines mean it and SpecForge since September 2026: "
            "feed_post_norm is false; SpecForge before then left out the norm before lm_head, and "
            "such heads are not supported",
        )
    else:
        parsed.settings["feed_post_norm"] = False


def _read_layers(
    parsed: Parsed, raw: Mapping[str, Any], extra: Mapping[str, Any], context: Context
) -> None:
    found: dict[str, tuple[int, ...]] = {}
    if raw.get(AUX_IDS):
        found[AUX_IDS] = read_ids(raw[AUX_IDS], "hidden_states", context.num_layers, AUX_IDS)
    ids = extra.get(AUX_IDS)
    if ids:
        name = f"eagle_config.{AUX_IDS}"
        found[name] = read_ids(ids, "output", None, name)
        if context.for_sglang and context.num_layers and context.model_type:
            found[name] = sglang_reads(ids, context.model_type, context.num_layers)
        found[name] = read_ids(found[name], "output", context.num_layers, name)
        if context.model_type and counts_apart(context.model_type) and not context.for_sglang:
            parsed.assumed["aux_output_layers"] = (
                f"{name} {ids} taken as layers whose output is read; for model_type "
                f"{context.model_type} SGLang may count from one lower"
            )
    if len(set(found.values())) > 1:
        both = " and ".join(f"{name} means output layers {v}" for name, v in found.items())
        raise ConfigError(f"{both}; the first counts hidden states, the second layers")
    if found:
        parsed.settings["aux_output_layers"] = next(iter(found.values()))
        parsed.stated.add("aux_output_layers")
    elif context.num_layers is not None and not context.layers_given:
        layers = _unstated_layers(context.num_layers)
        parsed.assume(
            "aux_output_layers",
            layers,
            f"aux_output_layers not stated; output layers {list(layers)} of {context.num_layers}, "
            "as all trainers and engines take by default",
        )
    count = raw.get("num_aux_hidden_states")
    layers_read = parsed.settings.get("aux_output_layers")
    if count is not None and count != (3 if layers_read is None else len(layers_read)):
        raise ConfigError(
            f"num_aux_hidden_states is {count!r:.60}, and {layers_read or 'the default three'} are "
            "the layers that config.json names"
        )


def _unstated_layers(num_layers: int) -> tuple[int, ...]:
    """What every trainer and both engines take; a small target has no such rule."""
    if num_layers < LEAST_FOR_DEFAULT:
        raise ConfigError(
            "aux_output_layers are not in the checkpoint, and the default rule (1, n/2 - 1, n - 4) "
            f"gives distinct layers from {LEAST_FOR_DEFAULT} layers on; the target has "
            f"{num_layers}; say which layers the head was trained on"
        )
    return default_aux_layers(num_layers)


def _count_layers(raw: Mapping[str, Any], parsed: Parsed, context: Context) -> int:
    """How many layers of the target the head reads."""
    layers = context.chosen.get("aux_output_layers", parsed.settings.get("aux_output_layers"))
    return len(layers) if isinstance(layers, list | tuple) and layers else 3
