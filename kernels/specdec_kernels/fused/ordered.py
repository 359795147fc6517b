"""Tree attention in the order of positions, in Triton: two launches, one tile for every call."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from specdec_kernels.dispatch import interpreting
from specdec_kernels.fused.attention import Form, device_of
from specdec_kernels.fused.ordered_programs import attend_prefix, attend_rest
from specdec_kernels.fused.tiles import SPAN, ordered_tile_for, require_types


@torch.library.custom_op("specdec::ordered_tree_attention", mutates_args=())
def ordered_tree_attention(
    q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, depth: Tensor, size: Tensor, prefix: Tensor,
    scale: float, window: int = 0, chunk: int = 0, softcap: float = 0.0,
    sinks: Tensor | None = None, kv_start: Tensor | None = None, block_table: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, span: int = SPAN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp of `specdec_kernels.tree_attention` with `ordered`.

    Neither the tile nor `span`, the tiles of a split, depends on the call: they are part of what
    the bits of a row mean.

    Raises:
        KernelError: The head dimension or a type is not one that the kernel has here.
    """
    batch, heads, nodes, _ = q.shape
    form = Form(
        k.shape[1], heads // k.shape[1], q.shape[3], v.shape[3],
        0 if block_table is None else k.shape[2], window, chunk, softcap, kv_start is not None,
        sinks is not None, k_scale is not None, v_scale is not None,
    )  # fmt: skip
    arch, _ = device_of(q.device)
    require_types(arch, q.dtype, k.dtype)
    exact = q.dtype == torch.float32
    tile = ordered_tile_for(arch, max(form.dim, form.value_dim), form.group, exact)
    pairs, rows = batch * form.heads, nodes * form.group
    capacity = k.shape[2] * (1 if block_table is None else block_table.shape[1])
    splits = triton.cdiv(capacity, tile.keys * span)
    part = q.new_empty(pairs, splits, rows, form.value_dim, dtype=torch.float32)
    most, total = (q.new_empty(pairs, splits, rows, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(batch, nodes, heads, form.value_dim)
    lse = q.new_empty(batch, heads, nodes, dtype=torch.float32)
    table = (0, 0) if block_table is None else block_table.stride()
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    options = {
        **form.split_constants(tile, interpreting()), "SPAN": span, "num_warps": tile.warps,
        "num_stages": tile.stages,
    }  # fmt: skip
    with torch.cuda.device_of(q):
        # 1. Whole tiles of committed slots, for all nodes together.
        attend_prefix[(triton.cdiv(rows, tile.rows), pairs, splits)](
            q, k, v, k_scale, depth, size, prefix, kv_start, block_table, part, most, total, scale,
            nodes, *strides, *depth.expand(batch, -1).stride(), *table, **options,
        )  # fmt: skip
        # 2. Each node's own tiles, and all in order.
        attend_rest[(nodes, pairs)](
            q, k, v, k_scale, v_scale, sinks, ancestors, depth, size, prefix, kv_start, block_table,
            part, most, total, out, lse, scale, nodes, splits, *strides,
            *ancestors.expand(batch, -1, -1).stride(), *depth.expand(batch, -1).stride(), *table,
            **options, HAS_SINKS=form.sinks, V_SCALED=form.v_scaled,
        )  # fmt: skip
    return out, lse


@ordered_tree_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_tree: object, **_options: object) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes and types that the operator returns."""
    batch, heads, nodes, _ = q.shape
    out = q.new_empty(batch, nodes, heads, v.shape[3])
    return out, q.new_empty(batch, heads, nodes, dtype=torch.float32)
