"""Reads the one pickle that this library opens: `pytorch_model.bin`, for `specdec convert`.

The first EAGLE-3 heads were published in this format only. PyTorch's restricted unpickler builds
nothing but tensors and plain containers (from 2.10 on, which the package requires); even so no
other part of the library comes here, and a test holds it to that.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from specdec.artifacts.atomic_files import open_regular, size_text
from specdec.errors import ConfigError
from specdec.heads.checkpoints.strict_files import LEGACY, StoredTensors, TensorInfo, inside

_MOST_TENSORS = 4096
_MOST_BYTES = 64 << 30
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.uint8: "U8",
}


def has_legacy_weights(folder: Path) -> bool:
    """Whether the folder's only weights are a pickle."""
    return (folder / LEGACY).is_file() and not any(folder.glob("model*.safetensors*"))


def legacy_tensors(folder: Path) -> StoredTensors:
    """The tensors of a `pytorch_model.bin`.

    Raises:
        ConfigError: It holds anything but named tensors.
    """
    path = inside(folder, LEGACY)
    try:
        with open(open_regular(path), "rb") as stream:  # noqa: PTH123 - a checked descriptor
            found = torch.load(stream, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as problem:  # whatever a broken or hostile file leads to
        text = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise ConfigError(f"{path} is no file of plain tensors: {text}") from problem
    if not isinstance(found, dict) or not 0 < len(found) <= _MOST_TENSORS:
        raise ConfigError(f"{path} must hold named tensors, got {type(found).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ConfigError(f"{path} holds {name!r:.60}, which is no tensor")
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES or tensor.is_meta:
            raise ConfigError(f"{name!r:.60} in {path} is {tensor.dtype}, {tensor.layout}")
        tensors[name] = tensor.detach()
    # A view can claim more than its file holds.
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > min(_MOST_BYTES, 4 * path.stat().st_size):
        raise ConfigError(f"{path} claims {size_text(size)} of tensors")
    infos = {n: TensorInfo(_DTYPES[x.dtype], tuple(x.shape)) for n, x in tensors.items()}
    return StoredTensors(infos, lambda names: {n: tensors[n].clone() for n in names})
