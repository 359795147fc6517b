"""Tree attention in the order of positions: each node alone, as decoding one by one has it."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.tree import Tree


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Tree,
    ancestors: Tensor,
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
    """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T] of `specdec_kernels.tree_attention`.

    Every product has the shape that the node's position gives it, whatever else is in the batch, in
    the tree or in the cache; so the bits are those of one token on a chain. Reads lengths on the
    host.
    """
    batch, heads, nodes, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(batch, nodes, heads, v.shape[3])
    lse = q.new_full((batch, heads, nodes), float("-inf"), dtype=torch.float32)
    starts = [0] * batch if kv_start is None else kv_start.tolist()
    depths, paths = tree.depth.expand(batch, -1).tolist(), ancestors.expand(batch, -1, -1)
    lengths = zip(tree.prefix.tolist(), tree.size.tolist(), starts, strict=True)
    for row, (prefix, size, start) in enumerate(lengths):
        for node in range(size):
            # 1. The node's keys, in order of position.
            depth = depths[row][node]
            first = _first_seen(prefix + depth, start, window, chunk)
            path = prefix + paths[row, node, max(first - prefix, 0) : depth + 1].long()
            committed = torch.arange(min(first, prefix), prefix, device=q.device)
            slots = torch.cat([committed, path])
            keys, values = (
                _read(x, row, slots, block_table, factor, wide)
                for x, factor in ((k, k_scale), (v, v_scale))
            )
            # 2. Softmax over them; a sink is one more score, without a value.
            query = q[row, :, node].to(wide).reshape(keys.shape[0], -1, q.shape[3])
            scores = query @ keys.transpose(1, 2) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            total = torch.logsumexp(scores, -1)
            if sinks is not None:
                total = torch.logaddexp(total, sinks.to(wide).view(total.shape))
            mixed = torch.exp(scores - total[..., None]) @ values
            out[row, node], lse[row, :, node] = mixed.flatten(0, 1).to(q.dtype), total.flatten()
    return out, lse


def _first_seen(slot: int, start: int, window: int, chunk: int) -> int:
    """First slot of a text that its token in `slot` sees."""
    bounds = [start]
    if window:
        bounds.append(slot - window + 1)
    if chunk:
        bounds.append(slot - (slot - start) % chunk)
    return max(bounds)


def _read(
    x: Tensor,
    row: int,
    slots: Tensor,
    block_table: Tensor | None,
    factor: Tensor | None,
    wide: torch.dtype,
) -> Tensor:
    """[Hkv, slots, D] of a row, contiguous and in the wide type."""
    if block_table is None:
        found = x[row][:, slots]
    else:
        page = x.shape[2]
        found = x[block_table[row].long()[slots // page], :, slots % page].transpose(0, 1)
    found = found.to(wide).contiguous()
    return found if factor is None else found * factor.to(wide)[:, None, None]
