"""What a kernel becomes on a GPU, on a machine without one: Triton brings compiler and assembler.

Needs a process in which Triton's interpreter is off.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

Argument = torch.dtype | str | int | float | bool | None
"""A pointer to that type, aligned to 16 bytes; the type of a scalar ("i32", or "i32:16" for a
multiple of 16); or the value of a constant, which Triton also makes of None and of strides of 1."""

_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32",
    torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_KILOBYTE = 1024
_RESERVED = 1024  # bytes of shared memory that the system takes of every block
_REGISTERS, _THREADS, _BLOCKS, _TENSOR_COLUMNS = 65536, 2048, 32, 512  # of a multiprocessor
_REGISTER_UNIT = 256  # registers are handed to a warp in such units
_SHARED = {80: 164, 90: 228, 100: 228}  # kilobytes of a multiprocessor
_TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|QGMMA|IMMA|IGMMA|UTC\w*MMA)\b")
_SPILLS = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel in machine code.

    Attributes:
        registers: Registers of a thread.
        stack: Bytes of a thread's stack.
        spills: Instructions that move registers to the stack or back.
        shared: Bytes of a block's shared memory.
        tensor_cores: The kinds of instructions that run on tensor cores.
        blocks: Blocks that fit on one multiprocessor side by side; 0 when not even one does.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_cores: tuple[str, ...]
    blocks: int


def compiled(
    kernel: Any, arguments: Mapping[str, Argument], arch: int, warps: int = 4, stages: int = 3
) -> Compiled:
    """Compiles `kernel` for compute capability `arch` / 10 (80, 90 or 100) and looks at the code.

    Args:
        kernel: A function under `triton.jit`.
        arguments: By name, all of the kernel's.
        arch: The target.
        warps: Warps of a block.
        stages: Tiles in flight.

    Raises:
        Exception: Whatever Triton raises for a kernel that the target cannot run.
    """
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.dtype):
            signature[parameter.name] = f"*{_NAMES[value]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, str):
            signature[parameter.name], _, multiple = value.partition(":")
            if multiple:
                attributes[(index,)] = [["tt.divisibility", int(multiple)]]
        else:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage = _output_of("cuobjdump", "--dump-resource-usage", file.name)
        code = _output_of("nvdisasm", "-c", file.name)
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", usage)}
    shared = int(made.metadata.shared)
    columns = int(getattr(made.metadata, "tmem_size", 0) or 0)
    return Compiled(
        registers=used["REG"],
        stack=used["STACK"],
        spills=len(_SPILLS.findall(code)),
        shared=shared,
        tensor_cores=tuple(sorted(set(_TENSOR_CORES.findall(code)))),
        blocks=_blocks(arch, warps, used["REG"], shared, columns),
    )


def _blocks(arch: int, warps: int, registers: int, shared: int, columns: int) -> int:
    """Blocks that share a multiprocessor: what runs out first of all that a block takes."""
    of_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    room = _SHARED[arch] * _KILOBYTE
    return min(
        _REGISTERS // (of_warp * warps),
        room // (shared + _RESERVED),
        _THREADS // (32 * warps),
        _BLOCKS,
        _TENSOR_COLUMNS // columns if columns else _BLOCKS,
    )


def _output_of(tool: str, *arguments: str) -> str:
    """What one of the tools beside Triton's compiler prints."""
    done = subprocess.run(  # noqa: S603 - a program of Triton's own, on a file of ours
        [str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout
