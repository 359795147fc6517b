"""RMSNorm, and rotary embedding into a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `specdec_kernels.rms_norm` says."""
    wide = torch.promote_types(states.dtype, torch.float32)
    found = states.to(wide)
    found = found * torch.rsqrt(found.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return found.to(torch.promote_types(states.dtype, weight.dtype))


def rotate_into_cache(
    joined: Tensor,
    turn: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    cache: tuple[Tensor, Tensor],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """As `specdec_kernels.rotate_into_cache` says."""
    keys, values = cache
    _, width, heads, dim = joined.shape
    wide = torch.promote_types(joined.dtype, torch.float32)
    # 1. [B, heads, n, d] apart.
    states = joined.to(wide).transpose(1, 2)
    query, key, value = states.split([heads - 2 * keys.shape[1], *[keys.shape[1]] * 2], 1)
    if q_norm is not None and k_norm is not None:
        query, key = rms_norm(query, q_norm.to(wide), eps), rms_norm(key, k_norm.to(wide), eps)
    # 2. Queries and keys turned by their positions.
    cos, sin = (table.to(wide)[positions][:, None] for table in turn)
    query = query * cos + query.roll(dim // 2, -1) * sin
    key = key * cos + key.roll(dim // 2, -1) * sin
    # 3. Keys and values into their slots.
    at = (slots[:, None] + torch.arange(width, device=slots.device))[:, None, :, None]
    for buffer, part in ((keys, key), (values, value)):
        buffer.scatter_(2, at.expand(part.shape), part.to(buffer.dtype))
    found: Tensor = query.to(joined.dtype).contiguous()
    return found
