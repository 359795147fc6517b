"""What a drafter proposed, made safe to verify: whatever it is, it cannot change the text (I5).

A drafter that builds its trees on the device is not asked what it put there, and no copy is made
to look. What the host knows of the tensors (shape, dtype, device) is checked and named; what only
the device knows is put right: roots are the loop's own, ids can be looked up, a node that hangs
nowhere, or deeper than was said, hangs below the root, where it is a proposal like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.errors import DrafterError
from specdec.round.tree import MAX_NODES, Structure, TreeBatch, bucket_size


def sealed(
    trees: Any, pending: Tensor, vocab_size: int, *, chain: bool, sampled: bool, whose: str
) -> TreeBatch:
    """The proposal as a batch of the loop's own, whose tensors no drafter holds.

    Args:
        trees: What `propose` returned.
        pending: [B] int64 tokens of the roots.
        vocab_size: Ids at or above it cannot be looked up.
        chain: The target takes one path a row: the nodes are that path, in their order.
        sampled: A `draft_law` counts; such drafts are verified as one path a row, too.
        whose: Name of the drafter, for messages.

    Raises:
        DrafterError: It is no batch of these rows, or its tensors cannot be one.
    """
    if not isinstance(trees, TreeBatch) or not _has_rows(trees.tokens, len(pending)):
        raise DrafterError(
            f"{whose}.propose must return a TreeBatch of {len(pending)} rows, "
            f"got {type(trees).__name__}"
        )
    if trees.size <= 1:
        return TreeBatch.roots(pending)
    _check(trees, pending, whose)
    rooted = torch.cat([pending[:, None], trees.tokens[:, 1:].long()], dim=1)
    tokens = rooted.clamp(0, vocab_size - 1)
    law = trees.draft_law if sampled else None
    if law is not None:  # a token that was put right was not drawn from any law
        law = law * (tokens == rooted)[:, :, None]
    sizes = trees.sizes.to(torch.int32).clamp(1, trees.size)
    if chain or law is not None:
        path = TreeBatch.chains(tokens)
        structure, depth = path.structure(), path.max_depth
    else:
        depth = min(max(trees.max_depth, 1), trees.size - 1)
        known = trees.known_structure()
        structure = known if known and known.is_watched else _hung_up(trees.parents, depth)
    own = TreeBatch(tokens, structure.parents, sizes, depth, trees.scores, trees.sources, law)
    return own.knowing(structure)


def _has_rows(tokens: object, rows: int) -> bool:
    return isinstance(tokens, Tensor) and tokens.ndim == 2 and len(tokens) == rows


def _hung_up(parents: Tensor, depth: int) -> Structure:
    """The trees of `parents` [B, T], with every node that cannot stay moved below the root."""
    size = parents.shape[1]
    order, parents = torch.arange(size, device=parents.device), parents.long()
    known = (parents >= 0) & (parents < order)
    own = torch.where(known, parents, 0).to(torch.int32)
    own[:, 0] = -1
    found = Structure.found(own)
    if depth == size - 1:
        return found
    # A node that is too deep has no position yet; what hangs below it is deeper still.
    deep = found.depths > depth
    alone = (order[:, None] == order) | (order == 0)
    mask = torch.where(deep[:, :, None], alone, found.mask)
    return Structure.of(torch.where(deep, 0, own), mask, torch.where(deep, 1, found.depths))


def _check(trees: TreeBatch, pending: Tensor, whose: str) -> None:
    """Raises `DrafterError` for what the host can tell of the tensors."""
    rows, size = trees.tokens.shape
    if size > bucket_size(MAX_NODES + 1):
        raise DrafterError(
            f"{whose}.propose must return at most {MAX_NODES} nodes below a root, got {size - 1}"
        )
    if not isinstance(trees.max_depth, int) or isinstance(trees.max_depth, bool):
        raise DrafterError(
            f"{whose}.propose must say max_depth as an int, got {type(trees.max_depth).__name__}"
        )
    whole, optional = (rows, size), (trees.scores, trees.sources)
    shapes: list[tuple[str, Any, tuple[int, ...]]] = [
        ("tokens", trees.tokens, whole),
        ("parents", trees.parents, whole),
        ("sizes", trees.sizes, (rows,)),
        *(pair for pair in zip(("scores", "sources"), optional, (whole, whole), strict=True)
          if pair[1] is not None),
    ]  # fmt: skip
    if trees.draft_law is not None:
        shapes.append(("draft_law", trees.draft_law, whole))
    for name, tensor, shape in shapes:
        if not isinstance(tensor, Tensor) or tensor.shape[: len(shape)] != shape:
            raise DrafterError(
                f"{whose}.propose must return {name} of shape {list(shape)}, got "
                f"{list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__}"
            )
        if tensor.ndim != len(shape) + (name == "draft_law"):
            raise DrafterError(f"{whose}.propose returned {name} of {tensor.ndim} dimensions")
        if tensor.device != pending.device:
            raise DrafterError(
                f"{whose}.propose must return {name} on {pending.device}, got {tensor.device}"
            )
        _check_dtype(name, tensor, whose)


def _check_dtype(name: str, tensor: Tensor, whose: str) -> None:
    fractions = name in ("scores", "draft_law")
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tensor.is_floating_point() if fractions else whole:
        return
    raise DrafterError(
        f"{whose}.propose must return {name} as {'floats' if fractions else 'integers'}, got "
        f"{str(tensor.dtype).removeprefix('torch.')}"
    )
