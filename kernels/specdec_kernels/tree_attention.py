"""The entry of tree attention: one contract, checked here, for the reference and for Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.reference import attention as reference_attention
from specdec_kernels.reference import ordered as reference_ordered
from specdec_kernels.tree import WORD, Tree

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that a cache may have beside that of the queries."""


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, *, scale: float, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None, kv_start: Tensor | None = None,
    block_table: Tensor | None = None, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, ordered: bool = False, ancestors: Tensor | None = None,
    return_lse: bool = False, backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of every node of a token tree to the committed prefix and to its own ancestors.

    Node i of row b sees slot s when `kv_start[b] <= s < prefix[b]`, and slot `prefix[b] + j` when
    it sees node j; with a window or a chunk, only where the positions lie in it. A committed slot's
    position is its index, a node's is `prefix + depth`; both count from kv_start for chunks.
    Lengths are read on the device, and slots that nobody sees may hold NaN.

    Args:
        q: [B, Hq, T, Dk] bfloat16, float16 or float32; any strides but a contiguous last dimension.
        k: [B, Hkv, S, Dk] with `prefix + T <= S`, or pages [P, Hkv, page, Dk] with `block_table`;
            of q's dtype, float8_e4m3fn or float8_e5m2. Hkv divides Hq.
        v: As k, with last dimension Dv.
        tree: The trees of the rows.
        scale: Factor of the scores.
        window: Positions that a node looks back, itself included; 0 for no window.
        chunk: Positions of an attention chunk: a node sees its own chunk only; 0 for none.
        softcap: Scores s become `softcap * tanh(s / softcap)`; 0 for no cap.
        sinks: [Hq] a score of each head that takes weight and has no value (gpt-oss), or None.
        kv_start: [B] int32 or int64 first slot of a left-padded row, or None.
        block_table: [B, pages] int32 page of every `page` slots of a row, or None.
        k_scale: [Hkv] float32 factor of float8 keys, or None.
        v_scale: [Hkv] float32 factor of float8 values, or None.
        ordered: Sum in the order of positions: at some cost, the bits of a node are those of one
            token behind the same text, whatever the batch, the rest of the tree and the capacity.
        ancestors: [B or 1, T, most depth + 1] int32 of `tree_ancestors`, with `ordered`.
        return_lse: Also return the log-sum-exp of the scores, sinks included.
        backend: Implementation to run; None for that of the device.

    Returns:
        [B, T, Hq, Dv] of q's dtype, zero at padded nodes; with `return_lse` also [B, Hq, T]
        float32, natural logarithm, -inf at padded nodes.

    Raises:
        KernelError: A shape, stride or type is out of the contract, or the device has no
            arithmetic for it.
    """
    _check(q, k, v, tree, block_table, sinks)
    options: dict[str, Any] = {
        "scale": scale, "window": window, "chunk": chunk, "softcap": softcap, "sinks": sinks,
        "kv_start": kv_start, "block_table": block_table, "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip
    if ordered and ancestors is None:
        raise KernelError("ordered attention needs ancestors: tree_ancestors(words, depth, width)")
    if chosen_backend(q.device, backend) == "triton":
        out, lse = _fused(q, k, v, tree, ancestors if ordered else None, options)
    elif ordered and ancestors is not None:
        out, lse = reference_ordered.tree_attention(q, k, v, tree, ancestors, **options)
    else:
        out, lse = reference_attention.tree_attention(q, k, v, tree, **options)
    return (out, lse) if return_lse else out


def _fused(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, ancestors: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The Triton kernel; in order of positions where the ancestors are given."""
    found: tuple[Tensor, Tensor]
    lengths = (tree.depth, tree.size, tree.prefix)
    if ancestors is None:
        from specdec_kernels.fused.attention import tree_attention as fused

        found = fused(q, k, v, tree.words, *lengths, **options)
    else:
        from specdec_kernels.fused.ordered import ordered_tree_attention

        found = ordered_tree_attention(q, k, v, ancestors, *lengths, **options)
    return found


def _check(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, block_table: Tensor | None, sinks: Tensor | None
) -> None:
    """Raises `KernelError` for shapes that no kernel could read; asks no device for a value."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise KernelError(f"q, k and v have four dimensions, got {shapes}")
    batch, heads, size, dim = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[3] != dim or heads % k.shape[1]:
        raise KernelError(
            f"k must be [B, Hkv, S, {dim}] with Hkv dividing {heads}, and v like it but for its "
            f"last dimension, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if any(x.stride(3) != 1 for x in (q, k, v)):
        raise KernelError("the last dimension of q, k and v must be contiguous")
    if k.dtype != v.dtype or (k.dtype != q.dtype and k.dtype not in FLOAT8):
        raise KernelError(
            f"k and v must be of q's type {q.dtype} or both of one float8 type, got {k.dtype} and "
            f"{v.dtype}"
        )
    if block_table is None and k.shape[0] != batch:
        raise KernelError(f"k must have {batch} rows as q has, got {k.shape[0]}")
    if tree.words.shape[1:] != (size, -(-size // WORD)) or tree.words.shape[0] not in (1, batch):
        raise KernelError(
            f"words must be [{batch} or 1, {size}, {-(-size // WORD)}], "
            f"got {tuple(tree.words.shape)}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise KernelError(f"sinks must be [{heads}], one a query head, got {tuple(sinks.shape)}")
