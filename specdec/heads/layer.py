"""The decoder layer of an EAGLE-3 head, and its rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.heads.config import Eagle3Config


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

    def __call__(
        self, positions: Tensor, longest: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """([..., d], [..., d]) of `positions` [...], all below `longest`."""
        key = positions.device, dtype
        table = self._tables.get(key)
        if table is None or len(table[0]) < longest:
            room = max(256, longest * 3 // 2)
            order = torch.arange(room)[None]
            with torch.inference_mode(False), torch.no_grad():
                cos, sin = self._rotary(torch.zeros(1, dtype=torch.float32), order)
            table = cos[0].to(positions.device, dtype), sin[0].to(positions.device, dtype)
            self._tables[key] = table
        return table[0][positions], table[1][positions]


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of `states` [B, h, T, d], halves layout."""
    left, right = states.chunk(2, -1)
    return states * cos + torch.cat([-right, left], -1) * sin


class Eagle3Attention(nn.Module):
    """Projections of the head's attention; training and drafting attend in ways of their own."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width, dim, bias = 2 * config.hidden_size, config.head_dim, config.attention_bias
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, self.heads * dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * dim, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(dim, config.rms_norm_eps)
        self._qk_norm = config.qk_norm

    def project(self, inputs: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, Hq, T, d], keys and values [B, Hkv, T, d] of `inputs` [B, T, 2H]."""
        return self._turned([proj(inputs) for proj in self._projections()], cos, sin)

    def embedding_parts(self, embeds: Tensor) -> list[Tensor]:
        """What normed embeddings [B, T, H] add to queries, keys and values, [B, T, heads * d] each.

        Training steps see the same embeddings, shifted, so they project them once.
        """
        half = embeds.shape[-1]
        return [functional.linear(embeds, proj.weight[:, :half]) for proj in self._projections()]

    def project_hidden(
        self, hidden: Tensor, parts: Sequence[Tensor], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `project`, of normed states [B, T, H] beside what the embeddings add."""
        half = hidden.shape[-1]
        found = [
            part + functional.linear(hidden, proj.weight[:, half:], proj.bias)
            for proj, part in zip(self._projections(), parts, strict=True)
        ]
        return self._turned(found, cos, sin)

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def _turned(
        self, projected: Sequence[Tensor], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.heads, self.kv_heads, self.kv_heads
        query, key, value = (
            found.unflatten(-1, (count, -1)) for found, count in zip(projected, heads, strict=True)
        )
        value = value.transpose(1, 2)
        if self._qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)  # autocast made queries narrower
        return _rotated(query, cos, sin), _rotated(key, cos, sin), value


class Eagle3Mlp(nn.Module):
    """Gated MLP."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        out: Tensor = self.down_proj(self.act(self.gate_proj(states)) * self.up_proj(states))
        return out


class Eagle3Layer(nn.Module):
    """The decoder layer on [embedding ; feature]."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.self_attn = Eagle3Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = Eagle3Mlp(config)
        self._normed_residual = config.norm_before_residual

    def inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(residual [B, T, H], attention input [B, T, 2H])."""
        residual, normed = self.normed(hidden)
        return residual, torch.cat([self.input_layernorm(embeds), normed], -1)

    def normed(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(residual, normed states), [B, T, H] both."""
        normed = self.hidden_norm(hidden)
        return (normed if self._normed_residual else hidden), normed

    def outputs(self, attended: Tensor, residual: Tensor) -> Tensor:
        """[B, T, H] from the attention's [B, Hq, T, d]."""
        residual = residual + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        out: Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return out
