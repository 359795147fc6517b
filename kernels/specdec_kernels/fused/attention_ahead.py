"""Tree attention compiled ahead of time: what its programs take on a GPU that is not here."""

from __future__ import annotations

from typing import Any

import torch

from specdec_kernels.fused.aot import Argument, Compiled, compiled
from specdec_kernels.fused.attention import COMBINED_ROWS, Form
from specdec_kernels.fused.attention_programs import attend_split, combine_splits
from specdec_kernels.fused.tiles import SPAN, Tile


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
    arguments = _arguments(form, dtype, cache or dtype) | form.split_constants(tile, widen=False)
    return compiled(attend_split, arguments, arch, tile.warps, tile.stages)


def compiled_combine(form: Form, arch: int, dtype: torch.dtype) -> Compiled:
    """`combine_splits` for compute capability `arch` / 10 and outputs of `dtype`."""
    constants = form.combine_constants(COMBINED_ROWS)
    return compiled(combine_splits, _arguments(form, dtype, dtype) | constants, arch)


def compiled_ordered(
    program: Any, form: Form, tile: Tile, arch: int, dtype: torch.dtype
) -> Compiled:
    """`attend_prefix` or `attend_rest` of attention in the order of positions."""
    arguments = _arguments(form, dtype, dtype) | form.split_constants(tile, widen=False)
    arguments |= {"SPAN": SPAN, "HAS_SINKS": form.sinks, "V_SCALED": form.v_scaled}
    return compiled(program, arguments, arch, tile.warps, tile.stages)


def _arguments(form: Form, dtype: torch.dtype, cache: torch.dtype) -> dict[str, Argument]:
    """Arguments of all programs by name: types, and strides as a model's tensors have them."""
    near = {name: "i32:16" for x in ("q", "k", "v") for name in (f"{x}_b", f"{x}_h")}
    return {
        "Q": dtype, "K": cache, "V": cache, "Words": torch.int64, "Ancestors": torch.int32,
        "Depth": torch.int32, "Size": torch.int32, "Prefix": torch.int32,
        "PartOut": torch.float32, "PartLse": torch.float32, "PartMost": torch.float32,
        "PartTotal": torch.float32, "Out": dtype, "Lse": torch.float32,
        "KScale": torch.float32 if form.k_scaled else None,
        "VScale": torch.float32 if form.v_scaled else None,
        "Sinks": dtype if form.sinks else None,
        "Start": torch.int32 if form.padded else None,
        "Table": torch.int32 if form.page else None,
        "scale": "fp32", "nodes": "i32", "splits": "i32", **near, "q_t": "i32:16",
        "k_s": "i32:16", "v_s": "i32:16", "w_b": "i32", "w_t": "i32", "w_w": 1, "d_b": "i32",
        "d_t": 1, "a_b": "i32", "a_t": "i32", "a_d": 1, "t_b": "i32", "t_p": 1,
    }  # fmt: skip
