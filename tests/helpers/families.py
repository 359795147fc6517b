"""Tiny random models of many Hugging Face families, for laws that must hold on all of them.

Windows and chunks are 8 tokens wide, so that a text of 40 tokens crosses them several times. Heads
are untied from the embeddings and weights are scaled up: a random tied model repeats its last
token, and nearly flat logits would hide a wrong mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.masking_utils import eager_mask

import specdec

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 96, 64, 4, 2, 16, 8
SEED = 0
_DISTURBANCE = 0.05  # of every weight of a draft

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_GPT2_STYLE = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": 256,
    "tie_word_embeddings": False,
}
_NO_BOS_EOS = {"bos_token_id": None, "eos_token_id": None}  # the defaults lie beyond the vocabulary
_HEAD_DIM = {"head_dim": HEAD_DIM}
_SLIDING = {"sliding_window": WINDOW}
_MIXED = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
_MIXED_4 = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts_per_tok": 2}
_GEMMA3N = {
    **_HEAD_DIM,
    **_MIXED_4,
    "num_hidden_layers": 4,
    "intermediate_size": [128] * 4,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}


def _exact_eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Eager attention whose softmax keeps the dtype.

    The eager one of transformers goes through float32, in which the mask value of float64 is -inf:
    plain `generate` then gives NaN on left padding, and there is no text to compare with.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


_EXACT_EAGER = "specdec_test_exact_eager"
transformers.AttentionInterface.register(_EXACT_EAGER, _exact_eager)
transformers.AttentionMaskInterface.register(_EXACT_EAGER, eager_mask)


@dataclass(frozen=True)
class Family:
    """How to build one tiny model.

    Attributes:
        architecture: Prefix of the transformers class, `<architecture>ForCausalLM`.
        options: What its config takes besides `base`.
        base: The config's shared part.
        config: Name of the config class, when it is not `<architecture>Config`.
        model: Name of the model class, when it is not `<architecture>ForCausalLM`.
        scale: What every weight matrix is multiplied by.
        attention64: Attention backend in float64, when it is not the family's default.
        widest: Largest dtype in which the model's own padded batches are finite.
        mode: What the self-test is expected to choose.
    """

    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: _COMMON)
    config: str | None = None
    model: str | None = None
    scale: float = 8.0
    attention64: str | None = None
    widest: torch.dtype = torch.float64
    mode: str = "tree"

    def build(self, dtype: torch.dtype) -> Any:
        """The model in eval mode; the same weights for every dtype, up to rounding."""
        config_class = getattr(transformers, self.config or f"{self.architecture}Config")
        model_class = getattr(transformers, self.model or f"{self.architecture}ForCausalLM")
        config = config_class(**{**self.base, **self.options})
        config._experts_implementation = "eager"  # the fused one has no float64
        torch.manual_seed(SEED)
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(self.scale)
        generation = model.generation_config
        generation.eos_token_id, generation.bos_token_id, generation.pad_token_id = None, None, 0
        generation.use_cache = True  # MPT's default is to run without one
        if dtype == torch.float64 and self.attention64:
            model.set_attn_implementation(self.attention64)
        return model.to(min(dtype, self.widest, key=lambda one: torch.finfo(one).bits))


_DELTA = {  # gated delta rule beside full attention
    **_HEAD_DIM,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": KV_HEADS,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
}
_MAMBA_PART = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}

CHAIN_FAMILIES: dict[str, Family] = {
    "qwen3_next": Family(
        "Qwen3Next",
        {
            **_DELTA,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        mode="chain",
    ),
    "qwen3_5": Family("Qwen3_5", _DELTA, config="Qwen3_5TextConfig", mode="chain"),
    "falcon_h1": Family("FalconH1", {**_MAMBA_PART, "mamba_d_ssm": 128}, mode="chain"),
    "mamba2": Family(
        "Mamba2",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
        mode="chain",
    ),
    "lfm2": Family("Lfm2", {"layer_types": ["conv", "full_attention"]}, mode="chain"),
    "bamba": Family(
        "Bamba", {**_MAMBA_PART, "attn_layer_indices": [1], "num_hidden_layers": 3}, mode="chain"
    ),
    # Attention whose bias follows the distance: no branch can be placed, but nothing is folded.
    "bloom": Family(
        "Bloom",
        {"n_layer": 2, "n_head": HEADS, **_NO_BOS_EOS},
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "tie_word_embeddings": False},
        widest=torch.float32,
        mode="chain",
    ),
    "mpt": Family(
        "Mpt",
        {"d_model": HIDDEN, "n_layers": 2, "n_heads": HEADS, "max_seq_len": 256},
        {"vocab_size": VOCAB, "tie_word_embeddings": False},
        widest=torch.float32,
        mode="chain",
    ),
}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", {"num_hidden_layers": 3}),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", _HEAD_DIM),
    "phi3": Family("Phi3"),
    "phi3_sw": Family("Phi3", _SLIDING),
    "mistral_sw": Family("Mistral", {**_HEAD_DIM, **_SLIDING}),
    "gemma2": Family(
        "Gemma2",
        {**_HEAD_DIM, **_MIXED, "query_pre_attn_scalar": 16},
        attention64=_EXACT_EAGER,
    ),
    "gemma3": Family(
        "Gemma3",
        {**_HEAD_DIM, **_MIXED, "query_pre_attn_scalar": 16},
        config="Gemma3TextConfig",
    ),
    "gemma3n": Family(
        "Gemma3n", {**_GEMMA3N, "num_kv_shared_layers": 0}, config="Gemma3nTextConfig"
    ),
    "gemma3n_kvshare": Family(
        "Gemma3n", {**_GEMMA3N, "num_kv_shared_layers": 2}, config="Gemma3nTextConfig"
    ),
    "gemma4": Family(
        "Gemma4",
        {
            **_HEAD_DIM,
            **_MIXED,
            "global_head_dim": HEAD_DIM,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
        },
        config="Gemma4TextConfig",
    ),
    "gpt_neox": Family("GPTNeoX"),
    "qwen3_moe": Family(
        "Qwen3Moe", {**_HEAD_DIM, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32}
    ),
    "mixtral": Family("Mixtral", {**_EXPERTS, "num_local_experts": 4}),
    "olmo2": Family("Olmo2"),
    "olmo3": Family("Olmo3", _MIXED),
    "gpt2": Family("GPT2", _NO_BOS_EOS, _GPT2_STYLE, model="GPT2LMHeadModel"),
    "gpt_oss": Family("GptOss", {**_HEAD_DIM, **_MIXED, **_EXPERTS, "num_local_experts": 4}),
    "cohere2": Family("Cohere2", {**_HEAD_DIM, **_MIXED}),
    "smollm3": Family("SmolLM3"),
    "granite": Family("Granite"),
    "starcoder2_sw": Family("Starcoder2", _SLIDING),
    "stablelm": Family("StableLm"),
    "glm4": Family("Glm4", _HEAD_DIM),
    "llama4_text": Family(
        "Llama4",
        {
            **_HEAD_DIM,
            "intermediate_size_mlp": 128,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": WINDOW,
        },
        config="Llama4TextConfig",
    ),
    "deepseek_v3": Family(
        "DeepseekV3",
        {
            **_EXPERTS,
            "num_key_value_heads": HEADS,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "opt": Family("OPT", {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN}),
    "gptj": Family("GPTJ", {"rotary_dim": 8}, _GPT2_STYLE),
    "falcon_rope": Family(
        "Falcon", {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS}, scale=20.0
    ),
    **CHAIN_FAMILIES,
}

TREE_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.mode == "tree")

REPRESENTATIVE = ("llama", "gemma3", "gpt_oss", "llama4_text", "deepseek_v3", "gpt2")
"""For the fast grid: mixed windows, sinks, experts, chunks, MLA, learned positions."""


@cache
def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The augmented tiny model of a family; built once a process. Methods are chosen per call."""
    return specdec.augment(FAMILIES[name].build(dtype), "none")


@cache
def draft_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A draft model for a family: its own model with disturbed weights, so that they often agree.

    Families that run as chains get a Llama, which hardly ever agrees.
    """
    family = FAMILIES[name if FAMILIES[name].mode == "tree" else "llama"]
    draft = family.build(dtype)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_((1 + _DISTURBANCE * noise).to(parameter.dtype))
    return draft
