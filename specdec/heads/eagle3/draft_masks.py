"""What the slots of a draft may look at: a verified slot all slots before it, a node its ancestors.

Nothing is read from the device. None stands for "everything", which needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.caches.tree_cache import TreeCache


def last_slots_see(cache: TreeCache, window: int | None, alike: bool) -> Tensor | None:
    """[B, 1, K] bool: what each row's last verified slot sees.

    Args:
        cache: Lengths already count the verified slots.
        window: Newest positions in sight; None for all.
        alike: Rows of one length, so that all slots belong to all.
    """
    return None if alike and window is None else _slots_up_to(cache, cache.lengths - 1, window)


def ancestors_of_level(seen: Tensor | None, parents: Tensor) -> Tensor:
    """[B, W, n + W] bool: which drafted nodes each node of a new level sees, itself included.

    Args:
        seen: [B, W, n] of the level above; None for the first level.
        parents: [B, W] nodes of the level above.
    """
    batch, width = parents.shape
    own = torch.eye(width, dtype=torch.bool, device=parents.device).expand(batch, -1, -1)
    if seen is None:
        return own
    above = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
    return torch.cat([above, own], -1)


def level_sees(
    cache: TreeCache, verified: Sequence[int], seen: Tensor | None, level: int, window: int | None
) -> Tensor | None:
    """[B, W, K] bool: what the nodes of a level see; they stand in the cache, not in its lengths.

    Args:
        cache: Holds verified slots, then the levels of the draft.
        verified: Verified slots of each row.
        seen: [B, W, n] drafted nodes that each node sees; None for a chain, which sees them all.
        level: From 0.
        window: Newest positions in sight; None for all.
    """
    alike = cache.start is not None and window is None
    if seen is None:
        return None if alike else _slots_up_to(cache, cache.lengths, window)
    batch, width, drafted = seen.shape
    if alike:
        return torch.cat([seen.new_ones(batch, width, verified[0]), seen], -1)
    before = cache.lengths[:, None] - level * width
    keys = torch.arange(cache.stop, device=seen.device)
    visible = (keys < before)[:, None].expand(-1, width, -1)
    order = torch.arange(drafted, device=seen.device)
    if window is not None:
        visible = visible & (before + level - keys < window)[:, None]
        seen = seen & (level - order // width < window)
    return visible.scatter(2, (before + order)[:, None].expand(-1, width, -1), seen)


def _slots_up_to(cache: TreeCache, last: Tensor, window: int | None) -> Tensor:
    """[B, 1, K] bool: the slots up to `last` [B], and within the window before it."""
    keys, last = torch.arange(cache.stop, device=last.device), last[:, None]
    visible = keys <= last
    return (visible if window is None else visible & (last - keys < window))[:, None]
