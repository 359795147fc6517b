"""The causal block of TTT attention and its share of the gradients, by what a device is good at.

A block gives its output and log-sum-exp; its gradients are asked for with the output and
log-sum-exp of all that was merged with it. In between the probabilities and the gradients of the
scores come out right for the block alone, because both only need the whole row's numbers.

Three ways: the fused kernel of a CPU, document by document; flash attention on a GPU for 16-bit
numbers, all documents in one launch; and everywhere else blocks of queries. None builds a mask of
the whole block but the first one, with a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.heads.eagle3.norm import dots

Spans = Sequence[Sequence[tuple[int, int]]]
"""For every row the [start, stop) of the documents packed into it."""

Block = tuple[Tensor, Tensor, tuple[Tensor, ...]]
"""[B, Hq, T, d] output, [B, Hq, T] log-sum-exp, and what the gradients need beside them."""

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLASH = torch.ops.aten._flash_attention_forward
_FLASH_BACKWARD = torch.ops.aten._flash_attention_backward
_QUERIES = 256  # that are looked at together where no kernel does it
_NOTHING = -1e30  # log-sum-exp of a row that sees no key: no weight in any merge, and never NaN


@dataclass(frozen=True)
class Layout:
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

    def ends(self, batch: int, length: int) -> list[int]:
        """Where the documents of all rows [B, T], side by side, end; 0 comes first.

        What lies between documents makes some of its own, which nobody reads.
        """
        found = {row * length for row in range(batch + 1)}
        for row, documents in enumerate(self.spans or ()):
            found |= {row * length + at for document in documents for at in document}
        return sorted(found)


class Engine(Protocol):
    """One way to compute a causal block.

    Attributes:
        narrow: Takes 16-bit states as they are; others are given fp32 at least.
    """

    narrow: bool

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Block:
        """Attention of queries [B, Hq, T, d] to keys and values [B, Hkv, T, d]."""
        ...

    def backward(
        self,
        grad: Tensor,
        states: tuple[Tensor, Tensor, Tensor],
        merged: tuple[Tensor, Tensor],
        kept: tuple[Tensor, ...],
        layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's share of the gradients by queries, keys and values.

        Args:
            grad: [B, Hq, T, d] by the merged output.
            states: Queries, keys and values, as in the forward.
            merged: Merged output [B, Hq, T, d] and log-sum-exp [B, Hq, T].
            kept: What the forward gave.
            layout: As there.
        """
        ...


def engine_for(query: Tensor, key: Tensor, value: Tensor) -> Engine:
    """The way for these states."""
    if query.device.type == "cpu" and query.is_floating_point():
        return CpuEngine()
    if query.device.type == "cuda":
        params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, True)
        if torch.backends.cuda.can_use_flash_attention(params):
            return FlashEngine()
    return PlainEngine()


class CpuEngine:
    """The fused kernel of a CPU, a document at a time.

    It is faster in fp32 than in 16 bits.
    """

    narrow = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Block:
        """As `Engine` says."""
        key, value = layout.every(key), layout.every(value)
        if layout.spans is None:
            (_, mask), *_ = layout.blocks(query)
            out, lse = _FUSED(query, key, value, 0.0, mask is None,
                              attn_mask=mask, scale=scale_of(query))  # fmt: skip
            return out, _rows_last(lse, out), ()
        # Slots outside all documents are padding: zero, and never NaN.
        block, block_lse = torch.zeros_like(query), query.new_zeros(query.shape[:3])
        for at, mask in layout.blocks(query):
            out, lse = _FUSED(query[at], key[at], value[at], 0.0, mask is None,
                              attn_mask=mask, scale=scale_of(query))  # fmt: skip
            block[at], block_lse[at[0], :, at[2]] = out, _rows_last(lse, out)
        return block, block_lse, ()

    def backward(
        self,
        grad: Tensor,
        states: tuple[Tensor, Tensor, Tensor],
        merged: tuple[Tensor, Tensor],
        kept: tuple[Tensor, ...],
        layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Engine` says."""
        query, (out, lse) = states[0], merged
        key, value = layout.every(states[1]), layout.every(states[2])
        whole = [] if layout.spans is None else [torch.zeros_like(query) for _ in range(3)]
        for at, mask in layout.blocks(query):
            parts = _FUSED_BACKWARD(
                grad[at].contiguous(), query[at], key[at], value[at], out[at].contiguous(),
                lse[at[0], :, at[2]].contiguous(), 0.0, mask is None, attn_mask=mask,
                scale=scale_of(query),
            )  # fmt: skip
            if layout.spans is None:
                whole = list(parts)
                break
            for gradient, part in zip(whole, parts, strict=True):
                gradient[at] = part
        return whole[0], layout.summed(whole[1]), layout.summed(whole[2])


class FlashEngine:
    """Flash attention (arXiv 2307.08691) on a GPU: no mask, heads shared, all documents at once."""

    narrow = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Block:
        """As `Engine` says."""
        if _sees_nothing(layout):
            lse = torch.full_like(query[..., 0], _NOTHING, dtype=torch.float32)
            return torch.zeros_like(query), lse, ()
        ends, longest = None, query.shape[2]
        if layout.spans is not None:
            found = layout.ends(len(query), longest)
            longest = max(stop - start for start, stop in pairwise(found))
            host = torch.tensor(found, dtype=torch.int32)
            ends = host.to(query.device, non_blocking=True)
        packed = [_packed(states, ends) for states in (query, key, value)]
        out, lse, seed, offset, _ = _FLASH(
            *packed, ends, ends, longest, longest, 0.0, True, False,
            scale=scale_of(query), **_sides(layout),
        )  # fmt: skip
        kept = (seed, offset) if ends is None else (seed, offset, ends)
        if ends is not None:  # [H, B * T]
            lse = lse.unflatten(1, (len(query), -1)).transpose(0, 1)
        return _unpacked(out, len(query)), lse, kept

    def backward(
        self,
        grad: Tensor,
        states: tuple[Tensor, Tensor, Tensor],
        merged: tuple[Tensor, Tensor],
        kept: tuple[Tensor, ...],
        layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Engine` says."""
        if not kept:
            zeros = [torch.zeros_like(each) for each in states]
            return zeros[0], zeros[1], zeros[2]
        (seed, offset, *more), (out, lse) = kept, merged
        ends, longest = None, grad.shape[2]
        if more:
            ends, lse = more[0], lse.transpose(0, 1).flatten(1)
            longest = max(stop - start for start, stop in pairwise(layout.ends(len(grad), longest)))
        packed = [_packed(each.to(states[0].dtype), ends) for each in (grad, *states, out)]
        found = _FLASH_BACKWARD(
            *packed, lse.contiguous(), ends, ends, longest, longest, 0.0, True, seed, offset,
            scale=scale_of(states[0]), **_sides(layout),
        )  # fmt: skip
        query, key, value = (_unpacked(each, len(grad)) for each in found)
        return query, key, value


class PlainEngine:
    """A block of queries after the other, on any device."""

    narrow = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Block:
        """As `Engine` says."""
        key, value = layout.every(key), layout.every(value)
        outs, totals = [], []
        for at, scores in _scores(query, key, layout):
            total = torch.logsumexp(scores, -1).clamp(min=_NOTHING)
            outs.append(_product((scores - total[..., None]).exp(), value[:, :, : at.stop]))
            totals.append(total)
        return torch.cat(outs, 2), torch.cat(totals, 2), ()

    def backward(
        self,
        grad: Tensor,
        states: tuple[Tensor, Tensor, Tensor],
        merged: tuple[Tensor, Tensor],
        kept: tuple[Tensor, ...],
        layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Engine` says."""
        query, (out, lse) = states[0], merged
        key, value = layout.every(states[1]), layout.every(states[2])
        delta = dots(grad, out)
        d_query, d_key, d_value = map(torch.zeros_like, (query, key, value))
        for at, scores in _scores(query, key, layout):
            share = (scores - lse[:, :, at, None]).exp()
            here = grad[:, :, at]
            d_value[:, :, : at.stop] += _product(share.mT, here)
            d_share = _product(here, value[:, :, : at.stop].mT) - delta[:, :, at, None]
            d_score = share * d_share * scale_of(query)
            d_query[:, :, at] = _product(d_score, key[:, :, : at.stop])
            d_key[:, :, : at.stop] += _product(d_score.mT, query[:, :, at])
        return d_query, layout.summed(d_key), layout.summed(d_value)


def wide(states: Tensor) -> Tensor:
    """In fp32 at least."""
    return states.to(torch.promote_types(torch.float32, states.dtype))


def scale_of(query: Tensor) -> float:
    """Factor of the scores."""
    return 1 / math.sqrt(query.shape[-1])


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


def _scores(query: Tensor, key: Tensor, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
    """Slots of every block of queries, and its scores [B, Hq, n, stop], -inf out of sight."""
    batch, _, length, _ = query.shape
    document = documents_of(layout.spans, batch, length, query.device)
    order = torch.arange(length, device=query.device)
    for start in range(0, length, _QUERIES):
        at = slice(start, min(start + _QUERIES, length))
        ago = order[at, None] - order[: at.stop]
        seen = (ago >= 0) & (document[:, at, None] == document[:, None, : at.stop])
        if layout.window is not None:
            seen = seen & (ago + layout.shift < layout.window)
        scores = _product(query[:, :, at], key[:, :, : at.stop].mT) * scale_of(query)
        yield at, scores.masked_fill(~seen[:, None], float("-inf"))


def _product(one: Tensor, other: Tensor) -> Tensor:
    """[..., m, n], in the dtype of both: autocast would narrow them."""
    with torch.autocast(one.device.type, enabled=False):
        return one @ other


def _sees_nothing(layout: Layout) -> bool:
    """Whether the window ends before the block: only diagonals are in sight."""
    return layout.window is not None and layout.shift >= layout.window


def _sides(layout: Layout) -> dict[str, Any]:
    """The window as flash attention is told it."""
    if layout.window is None:
        return {}
    return {"window_size_left": layout.window - 1 - layout.shift, "window_size_right": 0}


def _packed(states: Tensor, ends: Tensor | None) -> Tensor:
    """[B, T, h, d], or [B * T, h, d] where documents have ends."""
    turned = states.transpose(1, 2)
    return turned if ends is None else turned.flatten(0, 1)


def _unpacked(states: Tensor, batch: int) -> Tensor:
    """[B, h, T, d] of what `_packed` made."""
    turned = states if states.ndim == 4 else states.unflatten(0, (batch, -1))
    return turned.transpose(1, 2)


def _rows_last(lse: Tensor, out: Tensor) -> Tensor:
    """Log-sum-exp as [B, H, T]; the fused kernel gives [B, T, H] in some versions of torch."""
    return lse if lse.shape == out.shape[:3] else lse.transpose(1, 2)


def _window_mask(length: int, window: int, shift: int, like: Tensor) -> Tensor:
    """[T, T] additive: causal, and within the window of where step `shift` stands."""
    order = torch.arange(length, device=like.device)
    ago = order[:, None] - order
    seen = (ago >= 0) & (ago + shift < window)
    mask = torch.zeros(length, length, dtype=like.dtype, device=like.device)
    # A slot may see no step-0 key at all, then its row is all floor; the merge gives it no weight.
    return mask.masked_fill_(~seen, _NOTHING)
