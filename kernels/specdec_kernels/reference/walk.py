"""The walk hop by hop, for all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def walk(
    tokens: Tensor, parents: Tensor, size: Tensor, picks: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `specdec_kernels.walk` says."""
    count = tokens.shape[1]
    nodes = torch.arange(count, device=tokens.device)
    # 1. The nodes that carry their parent's pick.
    wanted = picks.gather(1, parents.long().clamp(min=0))
    live = (nodes > 0) & (nodes < size[:, None])
    carries = live & (wanted >= 0) & (tokens == wanted)
    # 2. From the root to the first such child, and on from there. Nothing hangs below node T, so a
    #    walk that finds no child has ended.
    here, hops = torch.zeros_like(tokens[:, :1]), []
    for _ in range(max_depth):
        here = torch.where(carries & (parents == here), nodes, count).amin(1, keepdim=True)
        hops.append(here)
    path = torch.cat(hops, 1) if hops else tokens.new_empty(len(tokens), 0)
    path = torch.where(path < count, path, -1)
    length = (path >= 0).sum(1)
    # 3. What the picks say on the way.
    along = picks.gather(1, pad(path, (1, 0)).clamp(min=0))
    steps = torch.arange(max_depth + 1, device=tokens.device)
    return path.int(), length, torch.where(steps <= length[:, None], along, -1)
