"""Every kernel that is not attention, compiled for GPUs that are not here: no spills."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec_kernels.fused.aot import compiled
from specdec_kernels.fused.commit import commit_kernel
from specdec_kernels.fused.head import norm_kernel, rotate_kernel
from specdec_kernels.fused.loss import loss_kernel
from specdec_kernels.fused.picks import merge_kernel, part_kernel, sample_kernel
from specdec_kernels.fused.walk import walk_kernel
from specdec_kernels.fused.words import words_kernel

I32, I64, F32, BF16 = torch.int32, torch.int64, torch.float32, torch.bfloat16


def words(arguments: str) -> dict[str, str]:
    """Scalars of the kernel, all of them 32-bit integers."""
    return dict.fromkeys(arguments.split(), "i32")


def walk(block: int, steps: int) -> dict[str, Any]:
    tensors = {"Tokens": I64, "Parents": I32, "Size": I32, "Picks": I64, "Path": I32,
               "Length": I64, "Emitted": I64}  # fmt: skip
    scalars = words("max_depth token_row parent_row pick_row")
    strides = {"token_node": 1, "parent_node": 1, "pick_node": 1}
    return tensors | scalars | strides | {"BLOCK": block, "STEPS": steps}


def commit(unit: Any, units: int) -> dict[str, Any]:
    tensors = {"Table": I64, "Path": I32, "Length": I64, "Prefix": I64}
    scalars = words("most heads path_row") | {"path_step": 1}
    return tensors | scalars | {"TYPE": unit, "SLOTS": 16, "UNITS": units}


def part(count: int, sums: bool) -> dict[str, Any]:
    tensors = {"Logits": BF16, "Keys": I64, "Sums": F32}
    scalars = {"size": "i32", "row_stride": "i32:16", "column_stride": 1}
    return tensors | scalars | {"COUNT": count, "SUMS": sums, "BLOCK": 2048}


MERGE = {"Keys": I64, "Sums": F32, "Scores": F32, "Offsets": I64, "Tokens": I64, "Found": F32,
         "parts": "i32", "score_stride": 1, "COUNT": 10, "SCORES": True, "MAP": True,
         "PARTS": 16, "KEYS": 256}  # fmt: skip
SAMPLE = {"Scores": F32, "Noise": F32, "Depth": I64, "Picks": I64, "score_column": 1,
          "noise_column": 1, "depth_node": 1, "BLOCK": 2048,
          **words("size score_batch score_node noise_batch noise_level depth_batch")}  # fmt: skip
LOSS = {"Logits": BF16, "Target": F32, "Values": F32, "size": "i32:16", "steps": "i32",
        "target_row": "i32:16", "value_stride": "i32", "ARE_LOGITS": True,
        "BLOCK": 4096}  # fmt: skip
NORM = {"States": BF16, "Weight": BF16, "Found": BF16, "size": "i32:16", "row_stride": "i32:16",
        "column_stride": 1, "weights": 1, "eps": "fp32", "BLOCK": 4096}  # fmt: skip
ROTATE = {"Joined": BF16, "Cos": BF16, "Sin": BF16, "Positions": I64, "Slots": I64, "Keys": BF16,
          "Values": BF16, "Query": BF16, "QNorm": BF16, "KNorm": BF16, "eps": "fp32",
          "position_token": 1, "slot_stride": 1, "NORM": True, "BLOCK": 128,
          **words("dim heads kv_heads joined_row joined_token joined_head position_row key_row "
                  "key_head key_slot value_row value_head value_slot")}  # fmt: skip

KERNELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "words": (words_kernel, {"Parents": I32, "Words": I64, "Depth": I32, "node_stride": 1,
                             "BLOCK": 64, **words("size row_stride")}, 1),
    "walk of 64 nodes": (walk_kernel, walk(64, 16), 1),
    "walk of 4096 nodes": (walk_kernel, walk(4096, 64), 8),
    "argmax": (part_kernel, part(1, False), 4),
    "expansion": (part_kernel, part(10, True), 4),
    "expansion of 32": (part_kernel, part(32, True), 4),
    "merge": (merge_kernel, MERGE, 4),
    "sampled picks": (sample_kernel, SAMPLE, 8),
    "loss of logits": (loss_kernel, LOSS, 8),
    "loss of probabilities": (loss_kernel, LOSS | {"ARE_LOGITS": False}, 8),
    "norm": (norm_kernel, NORM, 8),
    "rotation": (rotate_kernel, ROTATE, 1),
    "rotation without norms": (rotate_kernel,
                               ROTATE | {"QNorm": None, "KNorm": None, "NORM": False}, 1),
}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel(name: str, arch: int) -> None:
    kernel, arguments, warps = KERNELS[name]
    made = compiled(kernel, arguments, arch, warps)
    assert made.spills == 0, made
    assert made.blocks * warps >= 16, made


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("unit", [8, 2])
def test_the_commit(unit: int, arch: int) -> None:
    import triton.language as tl

    kind = {8: tl.int64, 2: tl.int16}[unit]
    made = compiled(commit_kernel, commit(kind, 128), arch)
    assert made.spills == 0, made
    assert made.blocks >= 4, made
