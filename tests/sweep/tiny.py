"""Tiny random models of every causal LM class that transformers knows.

One rule builds them: take the default config of a model type, and replace every size that is known
by name. A stack of layers shrinks to the fewest layers that show each kind of layer. What the rule
does not get right by itself stands in `OVERRIDES`, and what is not built at all in `UNBUILT`.

Windows, chunks and top-k selections are 16 tokens wide: more than a self-test looks at, fewer than
the sweep generates. A class that hides one from the self-test shows it in its text.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, WINDOW, HIDDEN, EXPERT, HEAD_DIM, ROPE_DIM, SEED = 96, 16, 64, 32, 16, 8, 0

_NAMES_BY_SIZE: Sequence[tuple[int, str]] = (
    (1, "topk_group"),
    (
        2,
        """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers num_blocks num_layers_per_stack num_experts_per_tok
        num_experts_per_token n_group num_expert_group moe_topk moe_k top_k_experts n_groups
        swa_num_key_value_heads linear_num_key_heads num_query_groups index_topk_blocks
        zero_expert_num""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads linear_num_value_heads linear_num_heads num_experts
        num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads
        n_mamba_heads""",
    ),
    (4, "index_block_size"),
    (ROPE_DIM, "local_attn_chunk_length lsh_attn_chunk_length"),
    (ROPE_DIM, "qk_rope_head_dim qk_nope_head_dim rotary_dim laurel_rank d_rel"),
    (
        HEAD_DIM,
        """head_dim d_head dim_head attention_head_size attention_head_dim kv_channels
        global_head_dim swa_head_dim v_head_dim kv_lora_rank q_lora_rank o_lora_rank
        linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim
        hidden_size_per_layer_input state_size mamba_d_state ssm_state_size mamba_d_head
        mamba_head_dim mamba_headdim time_step_rank mamba_dt_rank query_pre_attn_scalar
        adapter_rank index_n_heads hc_lowrank prompt_mid_dim gated_norm_rank shape_embed_dim
        pronunciation_embed_dim""",
    ),
    (
        WINDOW,
        """sliding_window sliding_window_size window_size attention_window_size local_attention
        keep_window_size attention_chunk_size index_topk local_attention_window_len chunk_size
        mamba_chunk_size block_size floor_scale rel_extent
        log_scaling_n_floor mem_len max_inference_chunksize""",
    ),
    (
        EXPERT,
        """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size
        shared_experts_intermediate_size prefix_dense_intermediate_size""",
    ),
    (
        HIDDEN,
        """hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim embedding_size
        input_embedding_size output_embedding_size lru_width attention_hidden_size
        backbone_hidden_size""",
    ),
    (
        VOCAB,
        """vocab_size vocab_size_per_layer_input decoder_vocab_size shape_vocab_size
        pronunciation_vocab_size""",
    ),
    (
        128,
        """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_inner dim_ff
        dff intermediate_size_mlp feed_forward_size dense_intermediate_size d_ff""",
    ),
    (
        256,
        """max_position_embeddings n_positions max_seq_len n_ctx context_length
        max_target_positions""",
    ),
)
# Few index heads would give many scores of exactly zero; which of those a top-k takes is chance.
SIZES = {name: size for size, names in _NAMES_BY_SIZE for name in names.split()}
"""Option names of configs and what they become; never more than their default."""

_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DROPOUT = ("dropout", "pdrop", "layerdrop", "dropout_prob", "dropout_p")
_RATES = ("A_log", "decay")  # of a recurrence: scaled up, it would forget at once
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ALWAYS = {"is_decoder": True, "use_cache": True}

_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_CONV_AND_FULL = ["conv", "full_attention"]
_MAMBA_AND_HYBRID = ["mamba", "hybrid"]
_HEAD = {"head_dim": HEAD_DIM}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _SLIDING_AND_FULL
        },
    },
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "DbrxFFNConfig": {"ffn_hidden_size": EXPERT, "moe_num_experts": 4, "moe_top_k": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_text": {
        "sliding_window": WINDOW,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": HEAD_DIM + ROPE_DIM,
        "swa_qk_nope_head_dim": HEAD_DIM,
        "swa_qk_rope_head_dim": ROPE_DIM,
        "swa_v_head_dim": HEAD_DIM,
    },
    "dots3_note_vision_encoder": {
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "adapter_in_dim": HIDDEN,
        "adapter_out_dim": HIDDEN,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_AND_FULL * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "inkling2_loop_text": {
        "num_hidden_layers": 3,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "unpadded_vocab_size": VOCAB,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "inkling_text": {"log_scaling_n_floor": WINDOW},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {
        "num_hidden_layers": 4,
        "layer_types": _CONV_AND_FULL * 2,
        "full_attn_idxs": [1, 3],
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": _CONV_AND_FULL * 2},
    "llama4_text": {
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 2,
        "interleave_moe_layer_step": 2,
        "layer_types": None,  # from the intervals
        "moe_layers": None,
        "no_rope_layers": None,
    },
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": _HEAD,
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": WINDOW,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (32, 32),
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 128},  # its step wants heads of the width that 64 is rounded up to
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": _MAMBA_AND_HYBRID * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": _MAMBA_AND_HYBRID * 2},
}
"""What the rule does not get right, by model type, or by class where a config has no type."""

_ROPE_TURN = 24  # positions, crossed by every text of the sweep
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "gpt_bigcode, all heads": ("gpt_bigcode", {"multi_query": False}),
    "granitemoehybrid, rope": ("granitemoehybrid", {"position_embedding_type": "rope"}),
    "llama, dynamic rope": (
        "llama",
        {
            "max_position_embeddings": _ROPE_TURN,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "mpt, learned positions": ("mpt", {"attn_config": {"alibi": False}}),
    "opt, norm behind": ("opt", {"do_layer_norm_before": False}),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": _ROPE_TURN,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * (HEAD_DIM // 2),
                "long_factor": [4.0] * (HEAD_DIM // 2),
            },
        },
    ),
    "phi3, sliding window": ("phi3", {"sliding_window": WINDOW}),
    "qwen2, sliding window": (
        "qwen2",
        {"use_sliding_window": True, "layer_types": _SLIDING_AND_FULL, "sliding_window": WINDOW},
    ),
    "qwen4_exp, n-gram embeddings": (
        "qwen4_exp_text",
        {"ple_layer_ids": [1], "ngram_vocab_size_base": 64, "split_ngram_parts": 2},
    ),
    "zamba2, rope": ("zamba2", {"use_mem_rope": True}),
}
"""Other configurations of a class that run differently, by name: model type and options."""

UNBUILT: Mapping[str, str] = {
    "gemma3n": "its vision tower needs the timm package; the text model is in as gemma3n_text",
    "gemma4_assistant": "it takes the hidden states of another model and has no text of its own",
    "gemma4_unified_assistant": "as gemma4_assistant",
}
"""Model types that are not built, and why."""

_DECODER_CONFIGS = {
    "musicgen": "MusicgenDecoderConfig",
    "musicgen_melody": "MusicgenMelodyDecoderConfig",
}  # the class takes the config of a part, which the auto class does not pick out


def names() -> list[str]:
    """Every model type with a causal LM class, in the order of transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(name: str) -> str:
    """The causal LM class of a model type or variant."""
    model_type, _ = VARIANTS.get(name, (name, {}))
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def build(name: str) -> Any:
    """The tiny model of a model type or variant: float32, eval mode, the same weights always."""
    config = tiny_config(name)
    config._experts_implementation = "eager"  # the fused one has no float64
    torch.manual_seed(SEED)
    if name in _DECODER_CONFIGS:
        model = getattr(transformers, class_name(name))(config).eval()
    else:
        model = AutoModelForCausalLM.from_config(config).eval()
    generation = model.generation_config
    generation.eos_token_id, generation.bos_token_id, generation.pad_token_id = None, None, 0
    generation.forced_eos_token_id, generation.decoder_start_token_id = None, 1
    return model


def scale(model: Any, factor: float) -> None:
    """Multiplies every weight matrix: nearly flat logits would hide a wrong mask."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith(_RATES):
                parameter.mul_(factor)


def tiny_config(name: str) -> Any:
    """The config of a model type or variant with every known size made small."""
    model_type, options = VARIANTS.get(name, (name, {}))
    if model_type in _DECODER_CONFIGS:
        return _tiny(getattr(transformers, _DECODER_CONFIGS[model_type]))
    return _tiny(CONFIG_MAPPING[model_type], options)


def _tiny(config_class: Any, options: Mapping[str, Any] | None = None) -> Any:
    own = OVERRIDES.get(config_class.model_type or config_class.__name__, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_class(**{**_shrunk(config_class()), **own, **(options or {})})


def _shrunk(default: Any) -> dict[str, Any]:
    """Tiny values for the declared sizes of a config; what it derives from them is left to it."""
    declared = {field.name: field.default for field in dataclasses.fields(default)}
    heads = [declared[name] for name in _HEADS if name in declared]
    options = {**_SPECIAL_TOKENS, "tie_word_embeddings": False, **_layers(default, declared)}
    for name, value in declared.items():
        current = _current(default, name)
        if name in options:
            continue
        if name in _ALWAYS:
            options[name] = _ALWAYS[name]
        elif isinstance(current, PreTrainedConfig):
            options[name] = _tiny(type(current))
        elif type(value) is float and name.endswith(_DROPOUT):
            options[name] = 0.0
        elif type(value) is not int or value <= 0:
            continue
        elif name in _KEY_VALUE_HEADS:
            options[name] = 4 if value in heads else min(value, 2)
        elif name == "head_dim" and value == declared.get("qk_rope_head_dim"):
            options[name] = ROPE_DIM
        elif name in SIZES:
            options[name] = min(value, SIZES[name])
        elif name.endswith(("_token_id", "_token_index")):
            options[name] = min(value, VOCAB - 1)
    return options


def _current(config: Any, name: str) -> Any:
    """A config's own value, also where its layers differ in it."""
    return vars(config).get(config.attribute_map.get(name, name))


def _layers(default: Any, declared: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest layers that show each kind, and every list with an entry a layer to match."""
    name = next((name for name in _LAYER_COUNTS if name in declared), None)
    count = None if name is None else _current(default, name)
    if name is None or count is None:
        return {}
    lists = {
        field: list(value)
        for field in declared
        if isinstance(value := _current(default, field), (list, tuple)) and len(value) == count > 1
    }
    chosen = _showing_each(list(lists.values()), count)
    options: dict[str, Any] = {field: [value[i] for i in chosen] for field, value in lists.items()}
    return {**options, name: len(chosen)}


def _showing_each(lists: Sequence[Sequence[Any]], count: int) -> list[int]:
    """The first layers of each combination of kinds; at least two."""
    kinds = [repr([entries[index] for entries in lists]) for index in range(count)]
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    rest = (index for index in range(count) if index not in chosen)
    while len(chosen) < min(2, count):
        chosen.append(next(rest))
    return sorted(chosen)
