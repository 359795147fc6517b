"""Attention of training-time test (TTT, arXiv 2503.01840): one causal block and a few diagonals.

In TTT step s the slot t looks at the step-0 keys of all slots up to t and, of every later step,
at the key of slot t alone: what a chain drafted at slot t would see. The causal block is computed
by a fused kernel; each diagonal adds one score a slot, and both are merged by their log-sum-exp. So
no [T, T] mask and no [T, s * T] scores exist. Documents packed into one row see only themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.heads.eagle3.norm import dots

Spans = Sequence[Sequence[tuple[int, int]]]
"""For every row the [start, stop) of the documents packed into it."""

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def ttt_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    spans: Spans | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention output [B, Hq, T, d] of the newest TTT step.

    Args:
        query: [B, Hq, T, d] of this step.
        keys: [B, Hkv, T, d] of every step so far, this one last; Hkv divides Hq.
        values: The same for values.
        spans: Documents packed into each row; None for one a row.
        window: Newest positions in sight; None for all.
    """
    if window is not None and query.shape[2] + len(keys) - 1 <= window:
        window = None
    if query.device.type != "cpu" or not torch.is_floating_point(query):
        return _other_devices(query, keys, values, spans, window)
    merged: Tensor = _Merged.apply(  # type: ignore[no-untyped-call]
        query, spans, window, len(keys), *keys, *values
    )
    return merged


class _Merged(torch.autograd.Function):
    """The fused block and the diagonals on a CPU.

    The backward of a fused kernel only needs output and log-sum-exp; given the *merged* ones, it
    returns the block's share of the gradients, and the diagonals' share is a few products. All is
    done in fp32 at least: there the fused kernel is faster than in 16 bits, too.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, spans: Spans | None, window: int | None, steps: int, *both: Tensor
    ) -> Tensor:
        layout = _Layout(spans, window, steps - 1, query.shape[1] // both[0].shape[1])
        wide, *widened = map(_wide, (query, *both))
        keys, values = widened[:steps], widened[steps:]
        merged, lse = _block(wide, keys[0], values[0], layout)
        shares: list[Tensor] = []
        if steps > 1:
            scores = [dots(wide, layout.every(key)).mul_(_scale(query)) for key in keys[1:]]
            block_lse, lse = lse, torch.logsumexp(torch.stack([lse, *scores]), 0)
            shares = [score.sub_(lse).exp_() for score in scores]  # [B, Hq, T] of each diagonal
            merged = merged * (block_lse - lse).exp_()[..., None]
            for share, value in zip(shares, values[1:], strict=True):
                merged.addcmul_(share[..., None], layout.every(value))
        merged = merged.to(query.dtype)
        ctx.save_for_backward(query, merged, lse, *both, *shares)
        ctx.layout = layout
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        steps = layout.shift + 1
        query, merged, lse, *rest = ctx.saved_tensors
        both, shares = rest[: 2 * steps], rest[2 * steps :]
        dtype, grad = query.dtype, _wide(grads[0])
        query, merged = _wide(query), _wide(merged)
        keys, values = map(_wide, both[:steps]), map(_wide, both[steps:])
        d_query, d_key, d_value = _block_gradients(
            grad, query, next(keys), next(values), merged, lse, layout
        )
        d_keys, d_values = [layout.summed(d_key)], [layout.summed(d_value)]
        delta = dots(grad, merged)
        for share, key, value in zip(shares, keys, values, strict=True):
            d_share = dots(grad, layout.every(value))
            d_score = d_share.sub_(delta).mul_(share).mul_(_scale(query))[..., None]
            d_query.addcmul_(d_score, layout.every(key))
            d_keys.append(layout.summed(d_score * query))
            d_values.append(layout.summed(share[..., None] * grad))
        found = (d.to(dtype) for d in (d_query, *d_keys, *d_values))
        return next(found), None, None, None, *found


@dataclass(frozen=True)
class _Layout:
    """What slots see and how heads belong together.

    Attributes:
        spans: Documents of each row, None for one a row.
        window: Newest positions in sight, None for all.
        shift: Diagonals, which is how far the queries stand behind their slots.
        groups: Heads of queries that share one of keys and values.
    """

    spans: Spans | None
    window: int | None
    shift: int
    groups: int

    def every(self, states: Tensor) -> Tensor:
        """[B, Hq, T, d] for every head of queries, from [B, Hkv, T, d]."""
        return states if self.groups == 1 else states.repeat_interleave(self.groups, 1)

    def summed(self, states: Tensor) -> Tensor:
        """[B, Hkv, T, d], the sums over the heads that share."""
        return states if self.groups == 1 else states.unflatten(1, (-1, self.groups)).sum(2)

    def blocks(self, query: Tensor) -> Iterator[tuple[tuple[slice, slice, slice], Tensor | None]]:
        """Index and mask of every causal block; without a window no mask is needed."""
        every = slice(None)
        if self.spans is None:
            spots = [(every, every, slice(0, query.shape[2]))]
        else:
            spots = [(slice(row, row + 1), every, slice(start, stop))
                     for row, found in enumerate(self.spans) for start, stop in found]  # fmt: skip
        for at in spots:
            mask = None
            if self.window is not None:
                mask = _window_mask(at[2].stop - at[2].start, self.window, self.shift, query)
            yield at, mask


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(torch.float32, states.dtype))


def _scale(query: Tensor) -> float:
    return 1 / math.sqrt(query.shape[-1])


def _block(query: Tensor, key: Tensor, value: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
    """([B, Hq, T, d] causal attention, [B, Hq, T] its log-sum-exp)."""
    key, value = layout.every(key), layout.every(value)
    if layout.spans is None:
        (_, mask), *_ = layout.blocks(query)
        out, lse = _FUSED(query, key, value, 0.0, mask is None, attn_mask=mask, scale=_scale(query))
        return out, _rows_last(lse, out)
    # Slots outside all documents are padding: zero, and never NaN.
    block, block_lse = torch.zeros_like(query), query.new_zeros(query.shape[:3])
    for at, mask in layout.blocks(query):
        out, lse = _FUSED(query[at], key[at], value[at], 0.0, mask is None,
                          attn_mask=mask, scale=_scale(query))  # fmt: skip
        block[at], block_lse[at[0], :, at[2]] = out, _rows_last(lse, out)
    return block, block_lse


def _block_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merged: Tensor,
    lse: Tensor,
    layout: _Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, Hq, T, d] of queries, and of keys and values for every head of queries."""
    key, value = layout.every(key), layout.every(value)
    whole = [] if layout.spans is None else [torch.zeros_like(query) for _ in range(3)]
    for at, mask in layout.blocks(query):
        parts = _FUSED_BACKWARD(
            grad[at].contiguous(), query[at], key[at], value[at], merged[at].contiguous(),
            _as_fused(lse[at[0], :, at[2]]), 0.0, mask is None, attn_mask=mask, scale=_scale(query),
        )  # fmt: skip
        if layout.spans is None:
            return parts  # type: ignore[no-any-return]
        for gradient, part in zip(whole, parts, strict=True):
            gradient[at] = part
    return whole[0], whole[1], whole[2]


def _rows_last(lse: Tensor, out: Tensor) -> Tensor:
    """Log-sum-exp as [B, H, T]; the fused kernel gives [B, T, H] in some versions of torch."""
    return lse if lse.shape == out.shape[:3] else lse.transpose(1, 2)


def _as_fused(lse: Tensor) -> Tensor:
    """[B, H, T] the way in which the fused kernel's backward reads it."""
    return lse.contiguous()


def _window_mask(length: int, window: int, shift: int, like: Tensor) -> Tensor:
    """[T, T] additive: causal, and within the window of where step `shift` stands."""
    order = torch.arange(length, device=like.device)
    ago = order[:, None] - order
    seen = (ago >= 0) & (ago + shift < window)
    mask = torch.zeros(length, length, dtype=like.dtype, device=like.device)
    # A slot may see no step-0 key at all, then its row is all floor; the merge gives it no weight.
    return mask.masked_fill_(~seen, -1e30)


def _other_devices(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    spans: Spans | None,
    window: int | None,
) -> Tensor:
    """The same by a compiled FlexAttention, which returns its log-sum-exp; dense in float64."""
    if query.device.type != "cuda" or query.dtype == torch.float64:
        return dense_ttt_attention(query, keys, values, spans, window)
    from torch.nn.attention.flex_attention import (
        AuxRequest,
        create_block_mask,
        flex_attention,
    )

    batch, _, length, dim = query.shape
    document, shift = documents_of(spans, batch, length, query.device), len(keys) - 1

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q >= k) & (document[b, q] == document[b, k])
        return seen if window is None else seen & (q - k + shift < window)

    mask = create_block_mask(visible, batch, None, length, length, device=query.device)
    attend: Any = torch.compile(flex_attention, dynamic=True)
    block, also = attend(
        query, keys[0], values[0], block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    block_lse = also.lse
    groups = query.shape[1] // keys[0].shape[1]
    if shift == 0:
        return block  # type: ignore[no-any-return]
    later, weights = torch.stack(list(keys[1:])), torch.stack(list(values[1:]))
    grouped = query.unflatten(1, (-1, groups)).float()
    scores = torch.einsum("bhgtd,sbhtd->bhgts", grouped, later.float()).flatten(1, 2)
    scores = scores / math.sqrt(dim)
    lse = torch.logsumexp(torch.cat([block_lse[..., None], scores], -1), -1)
    share = (scores - lse[..., None]).exp().unflatten(1, (-1, groups))
    extra = torch.einsum("bhgts,sbhtd->bhgtd", share, weights.float()).flatten(1, 2)
    return (block * (block_lse - lse).exp()[..., None] + extra).to(query.dtype)  # type: ignore[no-any-return]


def documents_of(spans: Spans | None, batch: int, length: int, device: torch.device) -> Tensor:
    """[B, T] int64 number of each slot's document; slots outside all of them have numbers of
    their own."""
    found = torch.zeros(batch, length, dtype=torch.long)
    if spans is not None:
        found = -1 - torch.arange(length).expand(batch, length).clone()
        for row, documents in enumerate(spans):
            for number, (start, stop) in enumerate(documents):
                found[row, start:stop] = number
    return found.to(device)


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
