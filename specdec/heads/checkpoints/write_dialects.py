"""Writes the configuration of a head in each dialect, and knows what each engine can compute.

The engines' rules were read in vLLM 0.32 (`models/llama_eagle3.py`, `configs/speculators/algos.py`)
and SGLang 0.5.23 (`models/llama_eagle3.py`); `docs/checkpoints.md` lists them.
"""

from __future__ import annotations

from typing import Any

from specdec.errors import ConfigError
from specdec.heads.checkpoints.aux_layers import hidden_states_ids, sglang_ids
from specdec.heads.checkpoints.read_dialects import AUX_IDS
from specdec.heads.checkpoints.rope import write_rope
from specdec.heads.checkpoints.sidecar import Sidecar
from specdec.heads.eagle3.config import Eagle3Config

_ARCHITECTURES = {
    "safeailab": "LlamaForCausalLM",
    "specforge": "LlamaForCausalLMEagle3",
    "modelopt": "LlamaForCausalLMEagle3",
    "nemo": "LlamaEagle3DraftModel",
}
_LOADED_BY = {
    "vllm": ("specforge", "safeailab", "modelopt", "speculators"),
    "sglang": ("specforge", "modelopt"),
}
_UNKNOWN_TO = {  # what the trainers of a dialect do not read back, as docs/checkpoints.md lists it
    "safeailab": (
        "norm_before_residual", "fc_norm", "norm_before_fc", "feed_post_norm", "sliding_window",
    ),
    "specforge": ("norm_before_residual", "norm_before_fc", "feed_post_norm", "sliding_window"),
    "modelopt": (
        "norm_before_residual", "fc_norm", "norm_before_fc", "feed_post_norm", "sliding_window",
    ),
    "nemo": ("norm_before_residual", "norm_before_fc", "sliding_window"),
}  # fmt: skip
_SPECULATORS_VERSION = "0.9.0"
_DEFAULT_DRAFT_TOKENS = 5  # a round, where an engine starts from the checkpoint alone


def checked_for(sidecar: Sidecar) -> None:
    """Refuses a head that its dialect cannot hold or that its engine would compute in another way.

    Raises:
        ConfigError: Names the field and what to do.
    """
    config, engine = sidecar.config, sidecar.engine
    if config.fc_norm and config.norm_before_fc:
        raise ConfigError("fc_norm and norm_before_fc are both on; their order is not defined")
    if engine is None:
        return
    if engine not in _LOADED_BY:
        raise ConfigError(f"engine must be sglang, vllm or None, got {engine!r:.60}")
    if sidecar.dialect not in _LOADED_BY[engine]:
        raise ConfigError(
            f"{engine} does not load heads of the dialect {sidecar.dialect!r}; it loads "
            f"{', '.join(_LOADED_BY[engine])}"
        )
    refused = _vllm_lacks(sidecar) if engine == "vllm" else _sglang_lacks(config)
    for name, reason in refused.items():
        raise ConfigError(
            f"{name} is {getattr(config, name)!r}, and {engine} {reason}: the head would draft "
            "badly without an error; export without an engine, or train without it"
        )


def unknown_flags(config: Eagle3Config, dialect: str) -> list[str]:
    """Flags of the head that a dialect's own trainer would not read, and so compute without."""
    return [name for name in _UNKNOWN_TO.get(dialect, ()) if getattr(config, name)]


def _vllm_lacks(sidecar: Sidecar) -> dict[str, str]:
    config, found = sidecar.config, {}
    if config.fc_bias:
        found["fc_bias"] = "builds fc without a bias"
    if config.attention_bias and not config.output_bias:
        found["attention_bias"] = "then expects a bias of the output projection as well"
    if config.output_bias and not config.attention_bias:
        found["output_bias"] = "knows it only beside those of queries, keys and values"
    if config.mlp_bias:
        found["mlp_bias"] = "was not seen to read biases of a draft head's MLP"
    if config.qk_norm and sidecar.dialect != "speculators":
        found["qk_norm"] = "knows norms of queries and keys in the dialect speculators only"
    return found


def _sglang_lacks(config: Eagle3Config) -> dict[str, str]:
    found = {}
    if config.norm_before_residual:
        found["norm_before_residual"] = "always adds the feature without its norm"
    if config.qk_norm:
        found["qk_norm"] = "has no norms of queries and keys in a draft head"
    if config.attention_bias:
        found["attention_bias"] = "builds the projections without biases"
    if config.output_bias:
        found["output_bias"] = "builds the projections without biases"
    if config.mlp_bias:
        found["mlp_bias"] = "builds the MLP without biases"
    if config.sliding_window is not None:
        found["sliding_window"] = "takes it from --speculative-draft-window-size alone"
    if config.feature_width == config.hidden_size:
        found["hidden_size"] = "tells features from the head's own states by their width"
    return found


def config_json(sidecar: Sidecar, dtype: str, has_lm_head: bool) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        sidecar: Everything about the head.
        dtype: Of the weights, as torch names it.
        has_lm_head: Whether the files hold an output matrix.

    Raises:
        ConfigError: The target's layers cannot be named to the engine.
    """
    if sidecar.dialect == "speculators":
        return _speculators(sidecar, dtype)
    config = sidecar.config
    found: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[sidecar.dialect]],
        **_layer(config, dtype),
        # Without a size, SGLang takes the target's output matrix, which is right just then.
        "draft_vocab_size": config.draft_vocab_size if has_lm_head or _cut(config) else None,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        **_flat_layers(sidecar),
    }
    if config.fc_bias:
        found["bias"] = True
    if config.feed_post_norm or sidecar.dialect == "nemo":
        # As engines, NeMo and SpecForge since September 2026 mean it; before, SpecForge meant the
        # norm before lm_head. Our own field tells a reader of ours which.
        found["norm_output"] = found["feed_post_norm"] = config.feed_post_norm
    if sidecar.dialect == "modelopt":
        found["eagle_config"] = {
            **found.get("eagle_config", {}),
            "use_aux_hidden_state": True,
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
            "next_layer_regular": True,
            "parallel_draft_step": 1,
        }
    return found


def _cut(config: Eagle3Config) -> bool:
    return config.draft_vocab_size < config.vocab_size


def _layer(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    """The configuration of the decoder layer, as transformers would write it."""
    found: dict[str, Any] = {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **write_rope(config.rope),
    }
    if config.sliding_window is not None:
        found |= {"layer_types": ["sliding_attention"], "sliding_window": config.sliding_window}
    if config.qk_norm:
        found["use_sliding_window"] = config.sliding_window is not None
    return found


def _flat_layers(sidecar: Sidecar) -> dict[str, Any]:
    """The target's layers, so that each reader finds them in its own count.

    vLLM reads the outer field before the inner one; SGLang, SpecForge and ModelOpt read the inner
    one alone. So one checkpoint serves both.
    """
    layers = sidecar.config.aux_output_layers
    inner: list[int] | None = list(layers)
    if sidecar.engine == "sglang":
        kind = None if sidecar.fingerprint is None else sidecar.fingerprint.model_type
        inner = sglang_ids(layers, kind, sidecar.num_target_layers)
    found: dict[str, Any] = {"num_aux_hidden_states": len(layers)}
    if inner is None:
        return found  # the default layers, on which all readers agree
    eagle = {AUX_IDS: inner, "use_aux_hidden_state": True}
    return {**found, "eagle_config": eagle, AUX_IDS: hidden_states_ids(layers)}


def _speculators(sidecar: Sidecar, dtype: str) -> dict[str, Any]:
    config = sidecar.config
    layer = _layer(config, dtype)
    if len(config.aux_output_layers) != 3:
        layer["num_aux_hidden_states"] = len(config.aux_output_layers)  # vLLM looks for it there
    name = sidecar.facts.get("target")
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": _DEFAULT_DRAFT_TOKENS,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS_VERSION,
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": (
            None if config.target_hidden_size == config.hidden_size else config.target_hidden_size
        ),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.feed_post_norm,
        "embed_requires_grad": False,
        AUX_IDS: hidden_states_ids(config.aux_output_layers),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": {
                "name_or_path": name if isinstance(name, str) else None,
                "architectures": _names(sidecar.facts.get("target_architectures")),
            },
        },
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _names(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
