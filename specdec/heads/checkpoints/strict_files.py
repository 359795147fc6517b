"""Reads the files of a checkpoint that others wrote, and believes nothing in them.

Sizes are capped, JSON has no key twice and no NaN, shard names stay inside the folder, and a
safetensors header is checked against the file's length before a single tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.artifacts.atomic_files import open_regular, read_small
from specdec.errors import ConfigError

WEIGHTS, INDEX, LEGACY = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
"""Names of the weight files."""

_MOST_JSON = 1 << 20  # bytes of a config; real ones have a few thousand
_MOST_HEADER = 4 << 20  # bytes of a safetensors header; a head has about twenty tensors
_MOST_TENSORS, _MOST_SHARDS = 4096, 64
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor.

    Attributes:
        dtype: As safetensors names it.
        shape: Its sizes.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensors:
    """Tensors that are described now and read later.

    Attributes:
        infos: By the name that the file gives them.
        read: Reads the tensors of these names, to the CPU.
    """

    infos: Mapping[str, TensorInfo]
    read: Callable[[list[str]], dict[str, Tensor]]


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: It cannot be read, is too large, or is no strict JSON object.
    """
    try:
        text = read_small(path, _MOST_JSON).decode("utf-8")
        found = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror or problem}") from problem
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{path} is not valid JSON: {problem!s:.200}") from problem
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} stands in it twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def inside(folder: Path, name: str) -> Path:
    """The file of this name, wherever links lead inside the folder.

    Raises:
        ConfigError: A link leads out of the folder.
    """
    root, path = folder.resolve(), (folder / name).resolve()
    # A snapshot in the Hugging Face cache links to ../../blobs.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not path.is_relative_to(root) and not path.is_relative_to(blobs):
        raise ConfigError(f"{name} in {folder} is a link out of the folder; put the file itself in")
    return path


def stored_tensors(folder: Path) -> StoredTensors:
    """The tensors of a checkpoint in one safetensors file or in several.

    Raises:
        ConfigError: There is none, only a pickle, or a header makes no sense.
    """
    if (folder / WEIGHTS).exists():
        shards = [WEIGHTS]
    elif (folder / INDEX).exists():
        shards = _shards(read_object(inside(folder, INDEX)), folder)
    else:
        raise ConfigError(_no_weights(folder))
    infos: dict[str, TensorInfo] = {}
    places: dict[str, Path] = {}
    for shard in shards:
        path = inside(folder, shard)
        for name, info in read_header(path).items():
            if name in infos:
                raise ConfigError(f"tensor {name!r:.80} stands in two files of {folder}")
            infos[name], places[name] = info, path
    if len(infos) > _MOST_TENSORS:
        raise ConfigError(f"{folder} holds {len(infos)} tensors; a draft head has about twenty")
    return StoredTensors(infos, lambda names: _read(places, names))


def _no_weights(folder: Path) -> str:
    if (folder / LEGACY).exists():
        return (
            f"{folder} holds its weights in {LEGACY}, a pickle, which is not loaded; run "
            f"`specdec convert {folder} NEW_FOLDER --to specforge` once and use the new folder"
        )
    return (
        f"{folder} holds no weights: there is neither {WEIGHTS} nor {INDEX} in it; a head that was "
        f"published as {LEGACY} is read by `specdec convert` alone"
    )


def _shards(index: dict[str, Any], folder: Path) -> list[str]:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ConfigError(f"weight_map in {folder / INDEX} must map tensors to files")
    shards = sorted({str(name) for name in files.values()})
    for name in shards:
        if not _SHARD.fullmatch(name):
            raise ConfigError(
                f"weight_map in {folder / INDEX} names the file {name!r:.80}; only plain names of "
                "safetensors files in the same folder are opened"
            )
    if len(shards) > _MOST_SHARDS:
        raise ConfigError(f"weight_map in {folder / INDEX} names {len(shards)} files")
    return shards


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a safetensors file, checked against its length.

    Raises:
        ConfigError: The file is cut short, or its header is too large or contradicts itself.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if size < 8 or length > min(_MOST_HEADER, size - 8):
                raise ConfigError(
                    f"{path} is no whole safetensors file: its header claims {length} bytes, the "
                    f"file has {size}, and a header has at most {_MOST_HEADER}"
                )
            text = stream.read(length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror or problem}") from problem
    except (ValueError, RecursionError) as problem:
        if isinstance(problem, ConfigError):
            raise
        raise ConfigError(f"header of {path} is not valid JSON: {problem!s:.200}") from problem
    if not isinstance(header, dict):
        raise ConfigError(f"header of {path} must be an object, got {type(header).__name__}")
    header.pop("__metadata__", None)
    return _checked_header(header, size - 8 - length, path)


def _checked_header(header: dict[str, Any], room: int, path: Path) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    stops = [0]
    for name, entry in header.items():
        infos[name], start, stop = _entry(entry, f"tensor {name!r:.80} in {path}")
        stops += [start, stop]
    if max(stops) != room:
        raise ConfigError(
            f"{path} holds {room} bytes of tensors, and its header describes {max(stops)}; the "
            "file is cut short or damaged"
        )
    return infos


def _entry(entry: Any, where: str) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is not described by an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ConfigError(f"{where} has the dtype {dtype!r:.40}, which no draft head uses")
    if not _whole_numbers(shape) or len(shape) > 8 or not _whole_numbers(offsets):
        raise ConfigError(f"{where} has the shape {shape!r:.80} at {offsets!r:.80}")
    size = math.prod(shape) * _ITEM_BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ConfigError(f"{where} has shape {shape} of {dtype} and {offsets!r:.80} bytes for it")
    return TensorInfo(dtype, tuple(shape)), offsets[0], offsets[1]


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**53
        for number in value
    )


def _read(places: Mapping[str, Path], names: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted({places[name] for name in names}):
        try:
            with safe_open(path, "pt") as stream:
                for name in names:
                    if places[name] == path:
                        # A copy: what is mapped would end the process if the file shrank later.
                        found[name] = stream.get_tensor(name).clone()
        except (SafetensorError, OSError, RuntimeError, ValueError) as problem:
            raise ConfigError(f"cannot read the tensors in {path}: {problem!s:.200}") from problem
    return found
