"""Reads the configuration of an EAGLE-3 checkpoint in any dialect into fields of `Eagle3Config`.

One field means different things in different dialects, and most heads leave out what their trainer
took for granted. What is stated, what a dialect implies and what is only assumed are kept apart, so
that a user can be told, and so that a contradiction is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from specdec.errors import ConfigError
from specdec.heads.aux_layers import counts_apart, default_rule, read_ids, sglang_reads
from specdec.heads.head_tensors import canonical, structure
from specdec.heads.rope_fields import read_rope

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
_MODEL_TYPES = ("llama", "qwen2", "qwen3")
_MODELOPT_FIELDS = (
    "use_last_layernorm",
    "use_input_layernorm_in_first_layer",
    "next_layer_regular",
)
# What would change the numbers and is not built here: field -> values that change nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (1,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "logit_scale": (1, None),
    "parallel_drafting": (False, None),
    "is_causal": (True, None),
    "quantization_config": (None,),
}
_ONLY_IN_EAGLE_CONFIG: dict[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True, None),
    "use_input_layernorm_in_first_layer": (True, None),
    "use_last_layernorm": (True, None),
    "use_mtp_layernorm": (False, None),
    "parallel_draft_step": (0, 1, None),
}
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_PROBE = "`specdec inspect --target NAME --probe` tries both"


@dataclass(frozen=True)
class Context:
    """What is known about the target besides the checkpoint.

    Attributes:
        num_layers: Its layers, or None.
        model_type: Its class by Hugging Face's name, or None.
        for_sglang: The checkpoint was written for SGLang, whose count depends on the class.
        layers_given: Somebody else says which layers it reads, if the checkpoint does not.
    """

    num_layers: int | None = None
    model_type: str | None = None
    for_sglang: bool = False
    layers_given: bool = False


@dataclass
class Parsed:
    """What a configuration says.

    Attributes:
        dialect: One of `DIALECTS`.
        settings: Fields of `Eagle3Config`; `aux_output_layers` is left out when nobody knows them.
        stated: Those that the checkpoint itself states.
        assumed: Field -> a sentence on what was assumed, and why.
        lm_head_optional: The dialect lets a head use the target's output matrix.
    """

    dialect: str
    settings: dict[str, Any]
    stated: set[str]
    assumed: dict[str, str] = field(default_factory=dict)
    lm_head_optional: bool = False

    def assume(self, name: str, value: Any, sentence: str) -> None:
        """Takes a value that the checkpoint does not say."""
        self.settings[name] = value
        self.assumed[name] = sentence


def parse(raw: Mapping[str, Any], tensor_names: Iterable[str], context: Context) -> Parsed:
    """Reads a `config.json`.

    Args:
        raw: Its content.
        tensor_names: Of the checkpoint, as the file has them.
        context: What is known about the target.

    Raises:
        ConfigError: It is no EAGLE-3 head, or one that this library cannot run; names the field.
    """
    names = list(tensor_names)
    dialect = detect(raw, names)
    layer = raw
    if dialect == "speculators":
        layer = _object(raw, "transformer_layer_config")
    extra = _object(raw, "eagle_config") if raw.get("eagle_config") is not None else {}
    for fields, only in ((layer, _ONLY), (raw, _ONLY), (extra, _ONLY_IN_EAGLE_CONFIG)):
        _check_only(fields, only)
    parsed = Parsed(dialect, {}, set())
    _read_sizes(parsed, raw, layer)
    _read_numbers(parsed, layer)
    _read_flags(parsed, raw, extra, structure(canonical(name) or "" for name in names))
    _read_layers(parsed, raw, extra, context)
    return parsed


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


def _whole(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    found = fields.get(name)
    if found is None and default is not None:
        return default
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        if found is None:
            raise ConfigError(f"{name} is missing from config.json")
        raise ConfigError(
            f"{name} in config.json must be a whole number above 0, got {found!r:.60}"
        )
    return found


def _flag(fields: Mapping[str, Any], name: str) -> bool | None:
    found = fields.get(name)
    if found is not None and not isinstance(found, bool):
        raise ConfigError(f"{name} in config.json must be true or false, got {found!r:.60}")
    return found


def _read_sizes(parsed: Parsed, raw: Mapping[str, Any], layer: Mapping[str, Any]) -> None:
    settings = parsed.settings
    kind = layer.get("model_type", "llama")
    if kind not in _MODEL_TYPES:
        raise ConfigError(
            f"model_type in config.json must be one of {', '.join(_MODEL_TYPES)}, got {kind!r:.60}"
        )
    settings.update({name: _whole(layer, name) for name in _SIZES})
    heads = settings["num_attention_heads"]
    settings["num_key_value_heads"] = _whole(layer, "num_key_value_heads", heads)
    usual = 128 if kind == "qwen3" else max(settings["hidden_size"] // heads, 1)
    settings["head_dim"] = _whole(layer, "head_dim", usual)
    if parsed.dialect == "speculators":
        settings["draft_vocab_size"] = _whole(raw, "draft_vocab_size")
    else:
        settings["draft_vocab_size"] = _whole(raw, "draft_vocab_size", settings["vocab_size"])
    settings["target_hidden_size"] = _whole(raw, "target_hidden_size", settings["hidden_size"])
    parsed.stated |= set(settings)
    # Where no size of the draft vocabulary is given, SGLang takes the target's output matrix.
    parsed.lm_head_optional = parsed.dialect == "modelopt" or raw.get("draft_vocab_size") is None


def _read_numbers(parsed: Parsed, layer: Mapping[str, Any]) -> None:
    found: dict[str, Any] = {
        "rms_norm_eps": layer.get("rms_norm_eps"),
        "hidden_act": layer.get("hidden_act"),
        "max_position_embeddings": layer.get("max_position_embeddings"),
        "rope": read_rope(layer),
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
            shown = "rotary parameters" if name == "rope" else name
            parsed.assume(name, usual[name], f"{shown} not stated; {usual[name]} as in Llama")
        else:
            parsed.settings[name] = value
            parsed.stated.add(name)
    parsed.settings["sliding_window"] = _sliding_window(layer)


def _sliding_window(layer: Mapping[str, Any]) -> int | None:
    types = layer.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or types[:1] not in (["full_attention"], ["sliding_attention"]):
        raise ConfigError(
            "layer_types in config.json must begin with full_attention or sliding_attention, got "
            f"{types!r:.80}"
        )
    return None if types[0] == "full_attention" else _whole(layer, "sliding_window")


def _read_flags(
    parsed: Parsed,
    raw: Mapping[str, Any],
    extra: Mapping[str, Any],
    shown: Mapping[str, bool],
) -> None:
    """The flags: those that the tensors show, and those that only the configuration can say."""
    for name, there in shown.items():
        # `attention_bias` and `bias` are copied from the target's configuration and mean nothing.
        said = _flag(extra, name) if name in extra else _flag(raw, name)
        if name in ("fc_norm", "norm_before_fc") and said is not None and said != there:
            raise ConfigError(
                f"{name} is {str(said).lower()} in config.json, and its tensors are "
                f"{'there' if there else 'missing'}"
            )
        parsed.settings[name] = there
    parsed.stated |= set(shown)
    if shown["fc_norm"] and shown["norm_before_fc"]:
        raise ConfigError("fc_norm and norm_before_fc are both on; their order is not defined")
    residual = _flag(raw, "norm_before_residual")
    if residual is None:
        parsed.assume("norm_before_residual", *_residual_default(parsed.dialect))
    else:
        parsed.settings["norm_before_residual"] = residual
        parsed.stated.add("norm_before_residual")
    _read_norm_output(parsed, _flag(raw, "norm_output"))


def _residual_default(dialect: str) -> tuple[bool, str]:
    if dialect == "speculators":
        return True, (
            "norm_before_residual not stated; true, as vLLM takes it in this format, although the "
            f"class of speculators 0.9 takes false; {_PROBE}"
        )
    if dialect == "modelopt":
        return False, (
            "norm_before_residual not stated; false, as ModelOpt's own layer has it, although its "
            f"template for vLLM says true; {_PROBE}"
        )
    return False, f"norm_before_residual not stated; false, as trainers of this dialect; {_PROBE}"


def _read_norm_output(parsed: Parsed, said: bool | None) -> None:
    """`norm_output`: post-norm feedback in two dialects, and something else in SpecForge."""
    if parsed.dialect in ("nemo", "speculators"):
        parsed.settings["feed_post_norm"] = bool(said)
        if said is not None:
            parsed.stated.add("feed_post_norm")
        return
    parsed.settings["feed_post_norm"] = False
    if said is None:
        return
    reason = (
        "norm_output is true, by which SpecForge means the norm before lm_head and engines mean "
        "that later steps read the state after the final norm; taken as SpecForge's"
        if said
        else "norm_output is false, by which SpecForge leaves out the norm before lm_head and "
        "engines feed back the state before it; taken as the engines'"
    )
    parsed.assume("feed_post_norm", False, f"{reason}, so feed_post_norm is false; {_PROBE}")


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
                f"{context.model_type} SGLang may count from one lower; {_PROBE}"
            )
    if len(set(found.values())) > 1:
        both = " and ".join(f"{name} means output layers {v}" for name, v in found.items())
        raise ConfigError(f"{both}; the first counts hidden states, the second layers")
    if found:
        parsed.settings["aux_output_layers"] = next(iter(found.values()))
        parsed.stated.add("aux_output_layers")
    elif context.num_layers is not None and not context.layers_given:
        layers = default_rule(context.num_layers)
        parsed.assume(
            "aux_output_layers",
            layers,
            f"target layers not stated; output layers {list(layers)} of {context.num_layers}, as "
            f"all trainers and engines take by default; {_PROBE}",
        )
    _check_count(parsed, raw)


def _check_count(parsed: Parsed, raw: Mapping[str, Any]) -> None:
    layers = parsed.settings.get("aux_output_layers")
    count = raw.get("num_aux_hidden_states")
    if count is not None and count != (3 if layers is None else len(layers)):
        raise ConfigError(
            f"num_aux_hidden_states is {count!r:.60}, and {layers or 'the default three'} are the "
            "layers that config.json names"
        )
