"""Tensors to and from safetensors files, flushed to the disk and hashed while they are written.

The library's own writer holds a second copy of all tensors or says nothing about what it wrote;
a checkpoint needs the hash, and an optimiser's state is the largest thing in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.artifacts.atomic_files import Digest, write_new
from specdec.errors import ConfigError, SpecdecError

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_ALIGNMENT = 8  # of the first tensor; the widest types come first, so all stand aligned


def check_tensors(tensors: Mapping[str, Tensor], what: str) -> int:
    """Bytes that the tensors take; refuses what cannot be written.

    Raises:
        ConfigError: A name, a type or a layout has no place in a safetensors file.
    """
    size = 0
    for name, tensor in tensors.items():
        if type(name) is not str or name == "__metadata__":
            raise ConfigError(f"{what} has a tensor named {name!r:.60}; give it another name")
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{name!r} in {what} is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in _NAMES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
            raise ConfigError(
                f"{name!r} in {what} is {tensor.dtype}, which safetensors does not hold; it "
                f"holds {known}"
            )
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device" if tensor.is_meta else str(tensor.layout)
            raise ConfigError(f"{name!r} in {what} is {kind}; only tensors with data can be kept")
        size += tensor.numel() * tensor.element_size()
    return size


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
    """Writes a new safetensors file; returns its size and hash.

    Args:
        path: A file that is not there yet.
        tensors: Of any device, shape and stride; one at a time is copied to the CPU.

    Raises:
        ConfigError: As `check_tensors`.
        OSError: It cannot be written.
    """
    check_tensors(tensors, path.name)
    return write_new(path, _content(tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        SpecdecError: It cannot be read.
    """
    try:
        with safe_open(path, "pt") as stream:
            # Copies: what is mapped would end the process when the file is cut short later.
            return {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as problem:
        raise SpecdecError(f"cannot read the tensors in {path}: {problem}") from problem


def _content(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, offset = {}, 0
    for name, tensor in ordered:
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        if tensor.numel():
            # The bytes themselves: NumPy knows neither bfloat16 nor the 8-bit types.
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            flat = plain.reshape(-1).view(torch.uint8)
            yield flat.numpy().data
