"""Tree attention in Triton: two launches, sized by the capacity of the cache alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from specdec_kernels.dispatch import interpreting
from specdec_kernels.fused.attention_programs import attend_split, combine_splits
from specdec_kernels.fused.tiles import Tile, Use, require_types, splits_for, tile_for

_INTERPRETED_ARCH = 90
_INTERPRETED_PROCESSORS = 4  # few programs: each costs the interpreter a millisecond or more
COMBINED_ROWS = 4
"""Rows of a block that puts splits together."""
_INTERPRETED_COMBINED_ROWS = 64
_SMALLEST_DIM = 16  # of a matrix product


@dataclass(frozen=True, slots=True)
class Form:
    """What the two programs are compiled for, beside the types of their arguments and the tile.

    Attributes:
        heads: Key heads.
        group: Query heads of a key head.
        dim: Head dimension of keys.
        value_dim: Head dimension of values.
        page: Slots of a page; 0 for a contiguous cache.
        window: As in `tree_attention`; chunk and softcap too.
        padded: Whether rows start at a slot of their own.
        sinks: Whether heads have sinks.
        k_scaled: Whether keys have a factor a head; v_scaled of values.
    """

    heads: int
    group: int
    dim: int
    value_dim: int
    page: int = 0
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    padded: bool = False
    sinks: bool = False
    k_scaled: bool = False
    v_scaled: bool = False

    def split_constants(self, tile: Tile, widen: bool) -> dict[str, int | float | bool]:
        """Constants of `attend_split`; `widen` is for the interpreter."""
        return {
            "HEADS": self.heads, "GROUP": self.group, "DK": self.dim, "DV": self.value_dim,
            "PAD_K": _padded(self.dim), "PAD_V": _padded(self.value_dim),
            "ROWS": tile.rows, "KEYS": tile.keys, "PAGE": self.page, "WINDOW": self.window,
            "CHUNK": self.chunk, "SOFTCAP": self.softcap, "HAS_START": self.padded,
            "K_SCALED": self.k_scaled, "UP": widen,
        }  # fmt: skip

    def combine_constants(self, rows: int) -> dict[str, int | float | bool]:
        """Constants of `combine_splits` with `rows` rows a block."""
        return {
            "HEADS": self.heads, "GROUP": self.group, "DV": self.value_dim,
            "PAD_V": _padded(self.value_dim), "ROWS": rows, "HAS_SINKS": self.sinks,
            "V_SCALED": self.v_scaled,
        }  # fmt: skip


def _padded(dim: int) -> int:
    """The power of two that a head dimension is computed as."""
    return max(_SMALLEST_DIM, int(triton.next_power_of_2(dim)))


@torch.library.custom_op("specdec::tree_attention", mutates_args=())
def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, depth: Tensor, size: Tensor, prefix: Tensor,
    scale: float, window: int = 0, chunk: int = 0, softcap: float = 0.0,
    sinks: Tensor | None = None, kv_start: Tensor | None = None, block_table: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, splits: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T] of `specdec_kernels.tree_attention`.

    The tree comes as tensors, so that the call is an operator of torch; `splits` is the number of
    parts that the keys are read in, 0 for what the device and the cache's capacity suggest.

    Raises:
        KernelError: The head dimension or a type is not one that the kernel has here.
    """
    batch, heads, nodes, dim = q.shape
    form = Form(
        k.shape[1], heads // k.shape[1], dim, v.shape[3], 0 if block_table is None else k.shape[2],
        window, chunk, softcap, kv_start is not None, sinks is not None, k_scale is not None,
        v_scale is not None,
    )  # fmt: skip
    pairs, rows = batch * form.heads, nodes * form.group
    capacity = k.shape[2] * (1 if block_table is None else block_table.shape[1])
    tile, chosen = _plan(q, k.dtype, form, capacity)
    splits = splits or chosen
    widen = interpreting()
    part = q.new_empty(pairs, splits, rows, form.value_dim, dtype=torch.float32)
    part_lse = q.new_empty(pairs, splits, rows, dtype=torch.float32)
    out = q.new_empty(batch, nodes, heads, form.value_dim)
    lse = q.new_empty(batch, heads, nodes, dtype=torch.float32)
    with torch.cuda.device_of(q):
        # 1. Each split of the keys on its own.
        attend_split[(triton.cdiv(rows, tile.rows), pairs, splits)](
            q, k, v, k_scale, words, depth, size, prefix, kv_start, block_table, part, part_lse,
            scale, nodes, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *words.expand(batch, -1, -1).stride(), *depth.expand(batch, -1).stride(),
            *((0, 0) if block_table is None else block_table.stride()),
            **form.split_constants(tile, widen), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        # 2. All of them together.
        together = _INTERPRETED_COMBINED_ROWS if widen else COMBINED_ROWS
        combine_splits[(triton.cdiv(rows, together), pairs)](
            part, part_lse, v_scale, sinks, size, out, lse, nodes, splits,
            **form.combine_constants(together),
        )  # fmt: skip
    return out, lse


@tree_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_tree: object, **_options: object) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes and types that the operator returns."""
    batch, heads, nodes, _ = q.shape
    out = q.new_empty(batch, nodes, heads, v.shape[3])
    return out, q.new_empty(batch, heads, nodes, dtype=torch.float32)


def _plan(q: Tensor, cache: torch.dtype, form: Form, capacity: int) -> tuple[Tile, int]:
    """Tile and number of splits of a call, from shapes and the device: no length is read.

    Raises:
        KernelError: As `tree_attention`.
    """
    arch, processors = device_of(q.device)
    require_types(arch, q.dtype, cache)
    batch, _, nodes, _ = q.shape
    rows, bounds = nodes * form.group, [far for far in (form.window, form.chunk) if far]
    tile = tile_for(arch, Use(rows, max(form.dim, form.value_dim), q.dtype == torch.float32))
    programs = triton.cdiv(rows, tile.rows) * batch * form.heads
    reach = min([capacity, *(far + nodes for far in bounds)])
    return tile, splits_for(reach, programs, tile, processors)


def device_of(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten and multiprocessors of a device, or what stands in for one."""
    if device.type != "cuda":
        return _INTERPRETED_ARCH, _INTERPRETED_PROCESSORS
    found = torch.cuda.get_device_properties(device)
    return found.major * 10 + found.minor, found.multi_processor_count
