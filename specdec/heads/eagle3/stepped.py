"""The layer of an EAGLE-3 head as drafting steps through it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from specdec.heads.eagle3.layer import Eagle3Layer, Turn
from specdec.heads.eagle3.norm import rms_norm


class SteppedLayer:
    """One layer, and what stands before and after it, for all steps of a draft.

    It holds the weights as plain tensors: on a CPU a step is five small products, and calling a
    module for each costs a good part of what they do.

    Args:
        layer: Of the head.
        embeddings: [V, H].
        norm: [H], the weight of the final norm.
        output: [D, H] over the draft vocabulary.
    """

    def __init__(
        self, layer: Eagle3Layer, embeddings: Tensor, norm: Tensor, output: Tensor
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._heads, self._dim, self._eps = attention.heads, attention.head_dim, layer.eps
        self._normed_residual = layer.normed_residual
        self._qkv, self._bias = attention.qkv_proj.weight, attention.qkv_proj.bias
        self._qk_norms = None
        if attention.qk_norm:
            self._qk_norms = attention.q_norm.weight, attention.k_norm.weight
        self._norms = torch.stack([layer.input_layernorm.weight, layer.hidden_norm.weight])
        self._o = attention.o_proj.weight, attention.o_proj.bias
        self._entry = layer.post_attention_layernorm.weight
        self._gate_up = mlp.gate_up_proj.weight, mlp.gate_up_proj.bias
        self._down = mlp.down_proj.weight, mlp.down_proj.bias
        self._act = mlp.act
        self._embeddings, self._norm, self._output = embeddings, norm, output

    def enter(
        self, tokens: Tensor, hidden: Tensor, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Residual [B, n, H], queries [B, Hq, n, d], keys and values [B, Hkv, n, d].

        Args:
            tokens: [B, n] int64 ids of the target.
            hidden: [B, n, H] beside them.
            turn: Of their positions.
        """
        batch, width, size = hidden.shape
        # The target's own embeddings may be in another dtype.
        embeds = functional.embedding(tokens, self._embeddings).to(hidden.dtype)
        both = torch.cat([embeds, hidden], -1).view(batch, width, 2, size)
        normed = rms_norm(both, self._norms, self._eps)
        residual = normed[:, :, 1] if self._normed_residual else hidden
        joined = functional.linear(normed.view(batch, width, 2 * size), self._qkv, self._bias)
        states = joined.view(batch, width, -1, self._dim).transpose(1, 2)
        heads, kv_heads = self._heads
        turning, value = states[:, :-kv_heads], states[:, -kv_heads:]
        if self._qk_norms is not None:
            query, key = turning[:, :heads], turning[:, heads:]
            parts = zip((query, key), self._qk_norms, strict=True)
            turning = torch.cat([rms_norm(part, weight, self._eps) for part, weight in parts], 1)
        turned = _rotated(turning, turn)
        return residual, turned[:, :heads], turned[:, heads:], value

    def leave(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        residual: Tensor,
    ) -> Tensor:
        """[B, n, H], what the layer makes of queries that see the `visible` [B, n, K] of the keys.

        Args:
            query: [B, Hq, n, d].
            keys: [B, Hkv, K, d].
            values: The same for values.
            visible: Bool; None for all.
            residual: [B, n, H].
        """
        attended = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=None if visible is None else visible[:, None],
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        residual = residual + functional.linear(attended.transpose(1, 2).flatten(2), *self._o)
        entry = rms_norm(residual, self._entry, self._eps)
        gate, up = functional.linear(entry, *self._gate_up).chunk(2, -1)
        return residual + functional.linear(self._act(gate) * up, *self._down)

    def predict(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """(after the final norm [B, n, H], logits [B, n, D]) of what `leave` found."""
        normed = rms_norm(out, self._norm, self._eps)
        return normed, functional.linear(normed, self._output)


def _rotated(states: Tensor, turn: Turn) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of `states` [B, h, n, d], halves layout."""
    cos, sin = turn
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)
