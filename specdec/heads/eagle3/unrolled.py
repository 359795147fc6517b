"""The layer of an EAGLE-3 head as training unrolls it.

All steps of training-time test share the weights, and the embeddings but for a shift. So the
embeddings' half of queries, keys and values is made once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec.heads.eagle3.causal_block import Spans
from specdec.heads.eagle3.layer import Eagle3Layer, Turn
from specdec.heads.eagle3.ttt_attention import ttt_attention


class UnrolledLayer:
    """One layer for all steps of a batch.

    What a slot feeds on is read by that slot alone; all others see no more of it than the keys and
    values that its feature makes in step 0. So slots that no loss reaches, those of prompts and
    padding, need nothing else, and `wanted` leaves them out.

    Args:
        layer: Of the head.
        embeds: [B, T + steps, H] embeddings of a row's tokens and of `steps` more.
        steps: TTT steps.
        spans: Documents packed into each row.
        window: Newest positions in sight; None for all.
        wanted: [N] int64 slots, `row * T + t`, whose states are wanted; None for all.
    """

    def __init__(
        self,
        layer: Eagle3Layer,
        embeds: Tensor,
        steps: int,
        spans: Spans | None = None,
        window: int | None = None,
        wanted: Tensor | None = None,
    ) -> None:
        self._layer, self._spans, self._window, self._wanted = layer, spans, window, wanted
        self._weight, embedded = _halves(layer, embeds)
        self._embedded: tuple[Tensor, ...] = _Shifted.apply(embedded, steps)  # type: ignore[no-untyped-call]
        self._shape = embeds.shape[0], embeds.shape[1] - steps

    def step(
        self,
        number: int,
        hidden: Tensor,
        turn: Turn,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(states before the final norm, keys and values [B, Hkv, T, d] of this step).

        States are [B, T, H], or [N, H] of the wanted slots.

        Args:
            number: Of the step, from 0.
            hidden: [B, T, H] features, or what the step before made, shaped like states.
            turn: Of this step's positions.
            keys: [B, Hkv, T, d] of every step before.
            values: The same for values.
        """
        residual, normed = self._layer.normed(hidden)
        joined = self.spread(functional.linear(normed, self._weight)) + self._embedded[number]
        query, key, value = self._split(joined, turn)
        attended = ttt_attention(query, (*keys, key), (*values, value), self._spans, self._window)
        attended = self._chosen(attended.transpose(1, 2).flatten(2))
        return self._layer.after(attended, self._chosen(residual)), key, value

    def _chosen(self, states: Tensor) -> Tensor:
        """[N, n] of the wanted slots, from [B, T, n]; what has only them already stays."""
        if self._wanted is None or states.ndim == 2:
            return states
        return states.flatten(0, 1).index_select(0, self._wanted)

    def spread(self, states: Tensor) -> Tensor:
        """[B, T, n] with zeros elsewhere, from [N, n] of the wanted slots."""
        if self._wanted is None or states.ndim == 3:
            return states
        batch, length = self._shape
        found = states.new_zeros(batch * length, states.shape[-1])
        return found.index_copy_(0, self._wanted, states).view(batch, length, -1)

    def _split(self, joined: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, Hq, T, d], keys and values [B, Hkv, T, d] of their joined [B, T, n d]."""
        attention = self._layer.self_attn
        heads, kv_heads = attention.heads
        if joined.device.type == "cpu":  # whose attention works in fp32 whatever it is given
            joined = joined.to(torch.promote_types(torch.float32, joined.dtype))
        states = joined.unflatten(-1, (heads + 2 * kv_heads, -1))
        if attention.qk_norm:
            query, key, value = states.split([heads, kv_heads, kv_heads], 2)
            states = torch.cat([attention.q_norm(query), attention.k_norm(key), value], 2)
        cos, sin = (x.to(states.dtype).transpose(0, 1) for x in turn)
        found: tuple[Tensor, Tensor, Tensor] = _Turned.apply(  # type: ignore[no-untyped-call]
            states, cos, sin, heads, kv_heads
        )
        return found


def _halves(layer: Eagle3Layer, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [n d, H] for hidden states, [B, T + steps, n d] what the embeddings add)."""
    projection, device = layer.self_attn.qkv_proj, embeds.device.type
    weight: Tensor = projection.weight
    if torch.is_autocast_enabled(device):  # which would cast the half anew in every step
        weight = weight.to(torch.get_autocast_dtype(device))
    half = embeds.shape[-1]
    embedded = functional.linear(layer.input_layernorm(embeds), weight[:, :half], projection.bias)
    return weight[:, half:], embedded


class _Shifted(torch.autograd.Function):
    """Views [B, T, n] of [B, T + steps, n] for every step; step s starts at 1 + s.

    Their gradients are added up in one place; slices would each make one of the whole size.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, steps: int) -> tuple[Tensor, ...]:
        ctx.shape, length = states.shape, states.shape[1] - steps
        return tuple(states[:, 1 + step : 1 + step + length] for step in range(steps))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        found = grads[0].new_zeros(ctx.shape)
        for step, grad in enumerate(grads):
            found[:, 1 + step : 1 + step + grad.shape[1]] += grad
        return found, None


class _Turned(torch.autograd.Function):
    """Queries, keys and values apart, the former two turned by their positions.

    The gradient is turned back into one tensor of the shape of the joined projection.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shape = states.shape
        turning = states[:, :, : heads + kv_heads]
        turned = _turn(turning, cos, sin, torch.empty_like(turning))
        query, key = turned.split([heads, kv_heads], 2)
        value = states[:, :, heads + kv_heads :]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        query, key, value = (grad.transpose(1, 2) for grad in grads)
        found = query.new_empty(ctx.shape)
        heads, turning = query.shape[2], query.shape[2] + key.shape[2]
        _turn(query, cos, -sin, found[:, :, :heads])
        _turn(key, cos, -sin, found[:, :, heads:turning])
        found[:, :, turning:] = value
        return found, None, None, None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """`out`, [B, T, h, d]: `states` turned, with cosines and sines [T, 1, d] of a `Turn`."""
    half = states.shape[-1] // 2
    torch.mul(states, cos, out=out)
    out[..., :half].addcmul_(states[..., half:], sin[..., :half])
    out[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return out
