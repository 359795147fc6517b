"""The decoder layer of an EAGLE-3 head, and its rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.norm import RmsNorm

Turn = tuple[Tensor, Tensor]
"""Cosines and sines [..., 1, T, d] of a rotary turn; the sines of the left half are negated."""


class RotaryTable:
    """Cosines and sines by position, in float32 whatever the head's dtype is.

    Not a module: casting a head to bfloat16 must not round its frequencies.
    """

    def __init__(self, config: Eagle3Config) -> None:
        settings = LlamaConfig(
            hidden_size=config.num_attention_heads * config.head_dim,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(config.rope),
        )
        with torch.device("cpu"):  # numbers even where a head is made of shapes alone
            self._rotary = LlamaRotaryEmbedding(settings)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, positions: Tensor | slice, longest: int, like: Tensor) -> Turn:
        """The turn at `positions`, all below `longest`, in the dtype and on the device of `like`.

        Args:
            positions: [B, T], or the same consecutive ones for all rows, which costs no lookup.
            longest: Positions that the table must reach.
            like: What will be turned.
        """
        key = like.device, like.dtype
        table = self._tables.get(key)
        if table is None or len(table[0]) < longest:
            room = max(256, longest * 3 // 2)
            order = torch.arange(room)[None]
            with torch.inference_mode(False), torch.no_grad():
                cos, sin = self._rotary(torch.zeros(1, dtype=torch.float32), order)
                left, right = sin[0].chunk(2, -1)
                sin = torch.cat([-left, right], -1)
            table = self._tables[key] = cos[0].to(like), sin.to(like)
        return table[0][positions].unsqueeze(-3), table[1][positions].unsqueeze(-3)


class Eagle3Attention(nn.Module):
    """Projections of the head's attention; training and drafting attend in ways of their own.

    Queries, keys and values are one product: a draft step is a handful of matrix-vector products,
    and each costs more to start than to do.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        dim, queries, keys = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = nn.Linear(
            2 * config.hidden_size, (queries + 2 * keys) * dim, bias=config.attention_bias
        )
        self.o_proj = nn.Linear(queries * dim, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RmsNorm(dim, config.rms_norm_eps)
            self.k_norm = RmsNorm(dim, config.rms_norm_eps)
        self.qk_norm, self.head_dim, self.heads = config.qk_norm, dim, (queries, keys)


class Eagle3Mlp(nn.Module):
    """Gated MLP; gate and up are one product."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        size, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = nn.Linear(size, 2 * wide, bias=bias)
        self.down_proj = nn.Linear(wide, size, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        gate, up = self.gate_up_proj(states).chunk(2, -1)
        out: Tensor = self.down_proj(self.act(gate) * up)
        return out


class Eagle3Layer(nn.Module):
    """The decoder layer on [embedding ; feature]."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RmsNorm(size, eps)
        self.hidden_norm = RmsNorm(size, eps)
        self.self_attn = Eagle3Attention(config)
        self.post_attention_layernorm = RmsNorm(size, eps)
        self.mlp = Eagle3Mlp(config)
        self.normed_residual, self.eps = config.norm_before_residual, eps

    def normed(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(residual, normed states), [B, T, H] both."""
        normed = self.hidden_norm(hidden)
        return (normed if self.normed_residual else hidden), normed

    def after(self, attended: Tensor, residual: Tensor) -> Tensor:
        """[..., H] from the attention's [..., Hq * d], its heads side by side."""
        residual = residual + self.self_attn.o_proj(attended)
        out: Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return out
