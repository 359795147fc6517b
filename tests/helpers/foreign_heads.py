"""Draft head checkpoints written by hand, key by key, as five projects write them.

Nothing here uses the library's own tables: a mistake in them must not be made twice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

H, HT, MLP, V, LAYERS = 16, 24, 20, 60, 12
"""Widths of head and target, MLP, ids and layers of the target."""

DIALECTS = ("safeailab", "specforge", "speculators", "modelopt", "nemo")


@dataclass
class Variant:
    """One kind of head."""

    draft: int = 28
    heads: int = 4
    kv: int = 4
    dim: int = 4
    fc_norm: bool = False
    norm_before_fc: bool = False
    nbr: bool = False
    post: bool = False
    qk_norm: bool = False
    bias: bool = False
    fc_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    target: int = HT
    extra: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "plain": Variant(),
    "whole vocabulary": Variant(draft=V),
    "gqa": Variant(kv=2, dim=6),
    "fc_norm": Variant(fc_norm=True, post=True),
    "norm_before_fc": Variant(norm_before_fc=True),
    "norm_before_residual": Variant(nbr=True),
    "qk_norm": Variant(qk_norm=True, kv=1),
    "biases": Variant(bias=True, fc_bias=True),
    "all biases": Variant(bias=True, output_bias=True, mlp_bias=True),
}


def tensors(kind: Variant, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names that speculators uses, without embeddings."""
    gen = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen) * 0.2

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=gen)

    q, kv = kind.heads * kind.dim, kind.kv * kind.dim
    found = {
        "fc.weight": matrix(H, 3 * kind.target),
        "layers.0.input_layernorm.weight": norm(H),
        "layers.0.hidden_norm.weight": norm(H),
        "layers.0.self_attn.q_proj.weight": matrix(q, 2 * H),
        "layers.0.self_attn.k_proj.weight": matrix(kv, 2 * H),
        "layers.0.self_attn.v_proj.weight": matrix(kv, 2 * H),
        "layers.0.self_attn.o_proj.weight": matrix(H, q),
        "layers.0.post_attention_layernorm.weight": norm(H),
        "layers.0.mlp.gate_proj.weight": matrix(MLP, H),
        "layers.0.mlp.up_proj.weight": matrix(MLP, H),
        "layers.0.mlp.down_proj.weight": matrix(H, MLP),
        "norm.weight": norm(H),
        "lm_head.weight": matrix(kind.draft, H),
    }
    if kind.fc_norm:
        found |= {f"fc_norm.{i}.weight": norm(kind.target) for i in range(3)}
    if kind.norm_before_fc:
        found["input_norm.weight"] = norm(3 * kind.target)
    if kind.qk_norm:
        found["layers.0.self_attn.q_norm.weight"] = norm(kind.dim)
        found["layers.0.self_attn.k_norm.weight"] = norm(kind.dim)
    if kind.bias:
        found["layers.0.self_attn.q_proj.bias"] = matrix(q)
        found["layers.0.self_attn.k_proj.bias"] = matrix(kv)
        found["layers.0.self_attn.v_proj.bias"] = matrix(kv)
    if kind.fc_bias:
        found["fc.bias"] = matrix(H)
    if kind.output_bias:
        found["layers.0.self_attn.o_proj.bias"] = matrix(H)
    if kind.mlp_bias:
        for name, size in (("gate", MLP), ("up", MLP), ("down", H)):
            found[f"layers.0.mlp.{name}_proj.bias"] = matrix(size)
    if kind.draft < V:
        ids = torch.randperm(V, generator=gen)[: kind.draft].sort().values
        found["d2t"] = ids - torch.arange(kind.draft)
        found["t2d"] = torch.zeros(V, dtype=torch.bool)
        found["t2d"][ids] = True
    return found


def embeddings(seed: int = 0) -> Tensor:
    """The target's, which some dialects keep in the head."""
    return torch.randn(V, H, generator=torch.Generator().manual_seed(100 + seed))


def renamed(found: dict[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """The tensors as this dialect's writer names them."""
    if dialect in ("safeailab", "specforge"):
        return {name.replace("layers.0.", "midlayer."): x for name, x in found.items()}
    if dialect == "speculators":
        return {**found, "embed_tokens.weight": embeddings()}
    if dialect == "modelopt":
        return {name: x for name, x in found.items() if name != "t2d"}
    inner = {**found, "embed_tokens.weight": embeddings()}
    outside = ("lm_head.weight", "d2t", "t2d")
    return {name if name in outside else f"model.{name}": x for name, x in inner.items()}


def layer_config(kind: Variant) -> dict[str, Any]:
    """A transformers configuration of the decoder layer."""
    return {
        "model_type": "qwen3" if kind.qk_norm else "llama",
        "hidden_size": H,
        "intermediate_size": MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": kind.heads,
        "num_key_value_heads": kind.kv,
        "head_dim": kind.dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "vocab_size": V,
        "attention_bias": kind.bias,
    }


def config(kind: Variant, dialect: str) -> dict[str, Any]:
    """`config.json` as this dialect's writer leaves it. Output layers 2, 5 and 9."""
    new_rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    old_rope = {"rope_theta": 5000.0, "rope_scaling": None}
    if dialect == "speculators":
        return {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            "transformer_layer_config": {**layer_config(kind), **new_rope},
            "draft_vocab_size": kind.draft,
            "target_hidden_size": None if kind.target == H else kind.target,
            "norm_before_residual": kind.nbr,
            "norm_before_fc": kind.norm_before_fc,
            "fc_norm": kind.fc_norm,
            "norm_output": kind.post,
            "eagle_aux_hidden_state_layer_ids": [3, 6, 10],
            "speculators_config": {"algorithm": "eagle3"},
            **kind.extra,
        }
    flat = {**layer_config(kind), "draft_vocab_size": kind.draft, "target_hidden_size": kind.target}
    if kind.fc_norm:
        flat["fc_norm"] = True
    if kind.norm_before_fc:
        flat["norm_before_fc"] = True
    inner = {"eagle_aux_hidden_state_layer_ids": [2, 5, 9], "use_aux_hidden_state": True}
    if dialect == "safeailab":
        flat |= {"architectures": ["LlamaForCausalLM"], **old_rope, "torch_dtype": "float16"}
    elif dialect == "specforge":
        flat |= {"architectures": ["LlamaForCausalLMEagle3"], **new_rope, "eagle_config": inner}
    elif dialect == "modelopt":
        flat |= {"architectures": ["LlamaForCausalLMEagle3"], **old_rope}
        flat["eagle_config"] = {**inner, "use_last_layernorm": True, "next_layer_regular": True}
    else:
        flat |= {"architectures": ["LlamaEagle3DraftModel"], **new_rope, "norm_output": kind.post}
    return {**flat, **kind.extra}


def nemo_targets() -> dict[str, Any]:
    """Configurations of targets, of the classes that NeMo Automodel takes its draft's from."""
    from transformers import (
        Gemma3TextConfig,
        GptOssConfig,
        LlamaConfig,
        Phi3Config,
        Qwen2_5_VLTextConfig,
        Qwen3MoeConfig,
    )

    sizes: dict[str, Any] = {
        "hidden_size": H, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": V,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    local = {"rope_type": "default", "rope_theta": 77.0}
    return {
        "llama": LlamaConfig(**sizes, rope_parameters=rope),
        "phi3": Phi3Config(**sizes, rope_parameters=rope, sliding_window=2),
        "qwen3_moe": Qwen3MoeConfig(
            **{**sizes, "intermediate_size": 7}, rope_parameters=rope, moe_intermediate_size=MLP
        ),
        "gemma": Gemma3TextConfig(
            **sizes,
            rope_parameters={"full_attention": rope, "sliding_attention": local},
            sliding_window=2,
            hidden_activation="silu",
        ),
        "gpt-oss": GptOssConfig(**sizes, rope_parameters=rope, sliding_window=2),
        "vision": Qwen2_5_VLTextConfig(
            **{**sizes, "head_dim": None}, rope_parameters={**rope, "mrope_section": [1, 1]}
        ),
    }


def nemo_head(folder: Path, target: str, kind: Variant, **fields: Any) -> Path:
    """A checkpoint as NeMo Automodel's `train_eagle3.py` saves it.

    The draft's configuration is made from the target's: of its class, with a few fields replaced.
    """
    of = nemo_targets()[target]
    replaced = {
        "architectures": ["LlamaEagle3DraftModel"],
        "draft_vocab_size": kind.draft,
        "target_hidden_size": H,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "fc_norm": kind.fc_norm,
        "norm_output": kind.post,
        "parallel_drafting": False,
        **fields,
    }
    raw = json.loads(
        type(of).from_dict({**of.to_dict(), **replaced}).to_json_string(use_diff=False)
    )
    weights = {**tensors(kind), "embed_tokens.weight": embeddings()}
    outside = ("lm_head.weight", "d2t", "t2d")
    named = {name if name in outside else f"model.{name}": x for name, x in weights.items()}
    return write(folder, raw, named)


def layers_of(dialect: str) -> tuple[int, ...]:
    """Output layers that the checkpoint means, with a target of 12 layers."""
    return (1, 5, 8) if dialect in ("safeailab", "nemo") else (2, 5, 9)


def overrides_of(kind: Variant, dialect: str) -> dict[str, Any]:
    """What a user has to say because this dialect does not."""
    found: dict[str, Any] = {}
    if dialect != "speculators" and kind.nbr:
        found["norm_before_residual"] = True
    if dialect not in ("speculators", "nemo") and kind.post:
        found["feed_post_norm"] = True
    return found


def write(
    folder: Path,
    raw: dict[str, Any],
    weights: dict[str, Tensor],
) -> Path:
    """A checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(
        {name: x.contiguous().clone() for name, x in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def foreign_head(folder: Path, dialect: str, kind: Variant | None = None) -> Path:
    """A checkpoint of this dialect."""
    kind = kind or Variant()
    return write(folder, config(kind, dialect), renamed(tensors(kind), dialect))


def small_target(folder: Path) -> Path:
    """A target of the size that the hand-written heads are made for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=16, num_hidden_layers=12,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
