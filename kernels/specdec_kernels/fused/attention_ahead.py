"""Tree attention compiled ahead of time: what its programs take on a GPU that is not here."""

from __future__ import annotations

import torch

from specdec_kernels.fused.aot import Argument, Compiled, compiled
from specdec_kernels.fused.attention import COMBINED_ROWS, Form
from specdec_kernels.fused.attention_programs import attend_split, combine_splits
from specdec_kernels.fused.tiles import Tile


def compiled_split(
    form: Form, tile: Tile, arch: int, dtype: torch.dtype, cache: torch.dtype | None = None
) -> Compiled:
    """`attend_split` for compute capability `arch` / 10, on tensors as a model has them.

    Args:
        form: What is compiled in.
        tile: How it is cut.
        arch: 80, 90 or 100.
        dtype: Of the queries.
        cache: Of the keys and values; None for that of the queries.
    """
    cache = cache or dtype
    near = {name: "i32:16" for x in ("q", "k", "v") for name in (f"{x}_b", f"{x}_h")}
    arguments: dict[str, Argument] = {
        "Q": dtype, "K": cache, "V": cache, "Words": torch.int64, "Depth": torch.int32,
        "Size": torch.int32, "Prefix": torch.int32, "PartOut": torch.float32,
        "PartLse": torch.float32, "KScale": torch.float32 if form.k_scaled else None,
        "Start": torch.int32 if form.padded else None,
        "Table": torch.int32 if form.page else None,
        "scale": "fp32", "nodes": "i32", **near, "q_t": "i32:16", "k_s": "i32:16",
        "v_s": "i32:16", "w_b": "i32", "w_t": "i32", "w_w": 1, "d_b": "i32", "d_t": 1,
        "t_b": "i32", "t_p": 1,
    }  # fmt: skip
    constants = form.split_constants(tile, widen=False)
    return compiled(attend_split, {**arguments, **constants}, arch, tile.warps, tile.stages)


def compiled_combine(form: Form, arch: int, dtype: torch.dtype) -> Compiled:
    """`combine_splits` for compute capability `arch` / 10 and outputs of `dtype`."""
    arguments: dict[str, Argument] = {
        "PartOut": torch.float32, "PartLse": torch.float32, "Size": torch.int32, "Out": dtype,
        "Lse": torch.float32, "VScale": torch.float32 if form.v_scaled else None,
        "Sinks": dtype if form.sinks else None, "nodes": "i32", "splits": "i32",
    }  # fmt: skip
    return compiled(combine_splits, {**arguments, **form.combine_constants(COMBINED_ROWS)}, arch)
