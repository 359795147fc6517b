"""Tree attention as a dense softmax over all slots."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.tree import Tree, unpacked


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Tree,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_start: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T] of `specdec_kernels.tree_attention`."""
    batch, heads, size, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    # 1. Keys and values as [B, Hkv, S, D], pages put in order, fp8 scaled back.
    keys, values = _whole(k, block_table, k_scale, wide), _whole(v, block_table, v_scale, wide)
    # 2. Who sees what; slots that nobody sees may hold anything, NaN included.
    visible = visible_slots(tree, batch, keys.shape[2], window, chunk, kv_start)
    values = values.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    # 3. Scores [B, Hkv, G, T, S]: G query heads read one key head, and nothing is repeated.
    grouped = q.to(wide).reshape(batch, keys.shape[1], -1, size, q.shape[-1])
    scores = torch.einsum("bhgtd,bhsd->bhgts", grouped, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    # 4. A sink is one more score of its head, without a value.
    lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(wide).view(1, keys.shape[1], -1, 1))
    live = torch.arange(size, device=q.device) < tree.size[:, None]
    weights = torch.exp(scores - lse[..., None].masked_fill(lse[..., None].isinf(), 0.0))
    out = torch.einsum("bhgts,bhsd->bthgd", weights, values).flatten(2, 3)
    # 5. Padded nodes are zero.
    out = out.masked_fill(~live[:, :, None, None], 0.0).to(q.dtype)
    lse = lse.reshape(batch, heads, size).masked_fill(~live[:, None], float("-inf"))
    return out, lse.float()


def visible_slots(
    tree: Tree, batch: int, slots: int, window: int, chunk: int, kv_start: Tensor | None
) -> Tensor:
    """[B, T, S] bool: the committed slots and the ancestors that each live node sees."""
    device, size = tree.words.device, tree.words.shape[1]
    slot = torch.arange(slots, device=device)
    prefix = tree.prefix.long()[:, None, None]
    first = torch.zeros_like(prefix) if kv_start is None else kv_start.long()[:, None, None]
    # 1. Node j is in slot prefix + j; slots outside the tree look at node 0, masked.
    node = slot - prefix
    in_tree = (node >= 0) & (node < size)
    at = node.clamp(0, size - 1).expand(batch, size, slots)
    sees = unpacked(tree.words, size).expand(batch, size, size).gather(2, at)
    visible = torch.where(in_tree, sees, (slot >= first) & (slot < prefix))
    # 2. Positions: the slot for committed tokens, prefix + depth in the tree, from kv_start on.
    depth = tree.depth.long().expand(batch, size)
    query = prefix + depth[:, :, None] - first
    key = torch.where(in_tree, prefix + depth.gather(1, at[:, 0])[:, None], slot) - first
    if window:
        visible = visible & (query - key < window)
    if chunk:
        visible = visible & (query // chunk == key // chunk)
    live = torch.arange(size, device=device) < tree.size[:, None]
    return visible & live[:, :, None]


def _whole(
    x: Tensor, block_table: Tensor | None, scale: Tensor | None, wide: torch.dtype
) -> Tensor:
    """[B, Hkv, S, D] in the wide type, from a contiguous cache or from pages [P, Hkv, page, D]."""
    if block_table is not None:
        x = x[block_table.long()].transpose(1, 2).flatten(2, 3)
    x = x.to(wide)
    return x if scale is None else x * scale.to(wide)[:, None, None]
