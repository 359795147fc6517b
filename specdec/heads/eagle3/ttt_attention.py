"""Attention of training-time test (TTT, arXiv 2503.01840): one causal block and a few diagonals.

In TTT step s the slot t looks at the step-0 keys of all slots up to t and, of every later step,
at the key of slot t alone: what a chain drafted at slot t would see. The causal block is computed
by a fused kernel (`causal_block.py`); each diagonal adds one score a slot, and both are merged by
their log-sum-exp. So no [T, T] mask and no [T, s * T] scores exist. Documents packed into one row
see only themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.heads.eagle3.causal_block import (
    Engine,
    Layout,
    Spans,
    documents_of,
    engine_for,
    scale_of,
    wide,
)
from specdec.heads.eagle3.norm import dots


def ttt_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    spans: Spans | None = None,
    window: int | None = None,
    engine: Engine | None = None,
) -> Tensor:
    """Attention output [B, Hq, T, d] of the newest TTT step.

    Args:
        query: [B, Hq, T, d] of this step.
        keys: [B, Hkv, T, d] of every step so far, this one last; Hkv divides Hq.
        values: The same for values.
        spans: Documents packed into each row; None for one a row.
        window: Newest positions in sight; None for all.
        engine: What computes the causal block; None for the device's own.
    """
    if window is not None and query.shape[2] + len(keys) - 1 <= window:
        window = None
    if query.device.type == "cuda" and torch.is_autocast_enabled("cuda"):  # as torch's own does
        dtype = torch.get_autocast_dtype("cuda")
        query, keys, values = (
            query.to(dtype), [k.to(dtype) for k in keys], [v.to(dtype) for v in values]
        )  # fmt: skip
    engine = engine or engine_for(query, keys[0], values[0])
    layout = Layout(spans, window, len(keys) - 1, query.shape[1] // keys[0].shape[1])
    merged: Tensor = _Merged.apply(query, engine, layout, *keys, *values)  # type: ignore[no-untyped-call]
    return merged


class _Merged(torch.autograd.Function):
    """The causal block and the diagonals.

    The backward of a fused kernel only needs output and log-sum-exp; given the *merged* ones, it
    returns the block's share of the gradients, and the diagonals' share is a few products. Those
    are made in fp32 at least.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, engine: Engine, layout: Layout, *both: Tensor) -> Tensor:
        steps = layout.shift + 1
        shown = _same if engine.narrow else wide
        first = shown(query), shown(both[0]), shown(both[steps])
        merged, lse, kept = engine.forward(*first, layout)
        shares: list[Tensor] = []
        if steps > 1:
            wide_query, merged = wide(query), wide(merged)
            scores = [dots(wide_query, layout.every(wide(key))).mul_(scale_of(query))
                      for key in both[1:steps]]  # fmt: skip
            block_lse, lse = lse, torch.logsumexp(torch.stack([lse, *scores]), 0)
            shares = [score.sub_(lse).exp_() for score in scores]  # [B, Hq, T] of each diagonal
            merged = merged * (block_lse - lse).exp_()[..., None]
            for share, value in zip(shares, both[steps + 1 :], strict=True):
                merged.addcmul_(share[..., None], layout.every(wide(value)))
        merged = merged.to(query.dtype)
        ctx.save_for_backward(query, merged, lse, *both, *shares, *kept)
        ctx.engine, ctx.layout = engine, layout
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        engine: Engine = ctx.engine
        layout: Layout = ctx.layout
        steps = layout.shift + 1
        query, merged, lse, *rest = ctx.saved_tensors
        both, rest = rest[: 2 * steps], rest[2 * steps :]
        shares, kept = rest[: steps - 1], tuple(rest[steps - 1 :])
        dtype, grad = query.dtype, wide(grads[0])
        # 1. The block's share.
        shown = _same if engine.narrow else wide
        first = shown(query), shown(both[0]), shown(both[steps])
        query, merged = wide(query), wide(merged)
        d_query, d_key, d_value = map(
            wide, engine.backward(grad, first, (merged, lse), kept, layout)
        )
        # 2. The diagonals'.
        d_keys, d_values = [d_key], [d_value]
        delta = dots(grad, merged)
        for share, key, value in zip(shares, both[1:steps], both[steps + 1 :], strict=True):
            d_share = dots(grad, layout.every(wide(value)))
            d_score = d_share.sub_(delta).mul_(share).mul_(scale_of(query))[..., None]
            d_query.addcmul_(d_score, layout.every(wide(key)))
            d_keys.append(layout.summed(d_score * query))
            d_values.append(layout.summed(share[..., None] * grad))
        found = (d.to(dtype) for d in (d_query, *d_keys, *d_values))
        return next(found), None, None, *found


def _same(states: Tensor) -> Tensor:
    return states


def dense_ttt_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    spans: Spans | None = None,
    window: int | None = None,
) -> Tensor:
    """`ttt_attention` by its definition, with all [T, T + s] scores: the reference of the tests."""
    groups, length = query.shape[1] // keys[0].shape[1], query.shape[2]
    key, *later = (k.repeat_interleave(groups, 1) for k in keys)
    value, *weights = (v.repeat_interleave(groups, 1) for v in values)
    scale = 1 / math.sqrt(query.shape[-1])
    order = torch.arange(length, device=query.device)
    ago = order[:, None] - order
    seen = ago >= 0 if window is None else (ago >= 0) & (ago + len(keys) - 1 < window)
    document = documents_of(spans, len(query), length, query.device)
    seen = seen & (document[:, :, None] == document[:, None])
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen[:, None], float("-inf"))
    diagonals = [(query * k).sum(-1, keepdim=True) * scale for k in later]
    share = torch.cat([scores, *diagonals], -1).softmax(-1)
    out = share[..., :length] @ value
    for step, weight in enumerate(weights):
        out = out + share[..., length + step, None] * weight
    return out
