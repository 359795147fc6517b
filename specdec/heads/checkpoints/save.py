"""Writes a draft head in the dialect of its readers, whole or not at all.

Without an engine, a dialect is a container: everything is written that it has a place for, and
`specdec_config.json` says the rest. With an engine it is a promise: what that engine would silently
compute in another way is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from specdec.artifacts.atomic_files import write_new
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.artifacts.whole_folder import whole_folder
from specdec.errors import ConfigError
from specdec.heads.checkpoints.aux_layers import check_layers
from specdec.heads.checkpoints.read_dialects import DIALECTS
from specdec.heads.checkpoints.rope import read_rope
from specdec.heads.checkpoints.sidecar import NAME, Sidecar, read_sidecar
from specdec.heads.checkpoints.strict_files import WEIGHTS
from specdec.heads.checkpoints.tensors import EMBEDDINGS, LM_HEAD, dialect_name, separate
from specdec.heads.checkpoints.write_dialects import checked_for, config_json
from specdec.heads.eagle3.head import Eagle3Head

Dialect = Literal["specforge", "safeailab", "speculators", "modelopt", "nemo"]
"""Formats that can be written."""

Engine = Literal["sglang", "vllm"]
"""Engines that can be written for."""

_OURS = {WEIGHTS, "config.json", NAME}
_WITH_EMBEDDINGS = ("speculators", "nemo")
_NO_FACTS: Mapping[str, Any] = {}


def save_head(
    head: Eagle3Head,
    folder: str | Path,
    *,
    dialect: Dialect = "specforge",
    engine: Engine | None = None,
    fingerprint: TargetFingerprint | None,
    num_target_layers: int,
    facts: Mapping[str, Any] = _NO_FACTS,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `model.safetensors`, `config.json` and `specdec_config.json`.

    Args:
        head: With embeddings, if the dialect keeps them.
        folder: New, empty, or one that this function wrote.
        dialect: Whose files.
        engine: Whose loader must understand them; None for no promise.
        fingerprint: Of the target, or None.
        num_target_layers: Of the target.
        facts: Where the head comes from: plain values.
        dtype: Of the weights; None for that of the head's `fc`, lent embeddings included.

    Raises:
        ConfigError: The head cannot be said in that dialect or to that engine, or the folder is
            something else.
    """
    if dialect not in DIALECTS:
        raise ConfigError(f"dialect must be one of {', '.join(DIALECTS)}, got {dialect!r:.60}")
    if fingerprint is not None and fingerprint.num_hidden_layers != num_target_layers:
        raise ConfigError(
            f"num_target_layers is {num_target_layers}, and the fingerprint's target has "
            f"{fingerprint.num_hidden_layers}"
        )
    config = replace(head.config, rope=read_rope({"rope_parameters": dict(head.config.rope)}) or {})
    check_layers(config.aux_output_layers, num_target_layers, "aux_output_layers")
    sidecar = Sidecar(config, dialect, engine, num_target_layers, fingerprint, dict(facts))
    checked_for(sidecar)
    tensors = _tensors(head, dialect, dtype)
    has_lm_head = dialect_name(LM_HEAD, dialect) in tensors
    stored = str(tensors[dialect_name("fc.weight", dialect)].dtype).removeprefix("torch.")
    described = json.dumps(config_json(sidecar, stored, has_lm_head), indent=2).encode("ascii")
    _write(Path(folder), {"config.json": described + b"\n", NAME: sidecar.to_bytes()}, tensors)


def _tensors(head: Eagle3Head, dialect: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    found, dtype = dict[str, Tensor](), dtype or head.fc.weight.dtype
    for name, tensor in separate(head.state_dict(), head.config).items():
        if tensor.is_meta:
            raise ConfigError(f"tensor {name!r} of the head has no data; load it before saving")
        plain = tensor.detach().cpu()
        found[name] = plain.to(dtype) if plain.is_floating_point() else plain
    if EMBEDDINGS in found and not head.owns_embeddings and dialect not in _WITH_EMBEDDINGS:
        del found[EMBEDDINGS]
    if dialect == "modelopt":
        found.pop("t2d", None)
        if not head.owns_lm_head:
            found.pop(LM_HEAD, None)
    elif LM_HEAD not in found:
        raise ConfigError(
            f"lm_head is missing, and {dialect} keeps one; attach the target's first "
            "(head.attach, or --target NAME)"
        )
    if dialect in _WITH_EMBEDDINGS and EMBEDDINGS not in found:
        raise ConfigError(
            f"embed_tokens is missing, and {dialect} keeps the embeddings; attach the target's "
            "first (head.attach, or --target NAME)"
        )
    # Copies: safetensors refuses tensors that share memory, as tied matrices do.
    return {dialect_name(name, dialect): x.contiguous().clone() for name, x in found.items()}


def _write(folder: Path, files: Mapping[str, bytes], tensors: Mapping[str, Tensor]) -> None:
    folder = place_of(folder)
    try:
        _check_free(folder)
        with whole_folder(folder) as new:
            for name, content in files.items():
                write_new(new / name, [content])
            save_file(dict(tensors), new / WEIGHTS, metadata={"format": "pt"})
            # safetensors makes files for the owner alone; all of a head is equally readable.
            (new / WEIGHTS).chmod((new / next(iter(files))).stat().st_mode)
    except (OSError, SafetensorError) as problem:  # the latter's writer says so of a full disk
        reason = getattr(problem, "strerror", None) or problem
        raise ConfigError(f"cannot write {folder}: {reason}") from problem


def place_of(folder: Path) -> Path:
    """The folder by its full name, without links on the way to it; it may be one itself.

    Raises:
        ConfigError: It cannot be the name of a new folder.
    """
    if "\0" in str(folder):
        raise ConfigError(f"{str(folder)!r:.200} is no name of a folder")
    try:
        folder = folder.expanduser()
        if folder.name in ("", ".."):  # of the root, of "." and of "../.."
            folder = folder.resolve()
        place = folder.parent.resolve() / folder.name
    except (OSError, RuntimeError) as problem:
        raise ConfigError(f"cannot write {str(folder)!r:.200}: {problem!s:.200}") from problem
    if not folder.name:
        raise ConfigError(f"{folder} cannot become a head; name a new folder")
    return place


def check_destination(folder: Path, source: Path, overwrite: bool) -> None:
    """Refuses to write over what a head is read from, and over another head unless told to.

    Args:
        folder: Where a head is to go.
        source: The folder that it is read from.
        overwrite: Whether a head that specdec wrote may be replaced.

    Raises:
        ConfigError: Names the folder, and what to do.
    """
    place, origin = place_of(folder), source.resolve()
    try:
        real = place.resolve()
        if real == origin or real in origin.parents:
            raise ConfigError(
                f"{folder} is where the head is read from, or holds it; name another folder"
            )
        _check_free(place)
        taken = place.is_dir() and any(place.iterdir())
    except OSError as problem:
        raise ConfigError(f"cannot write {folder}: {problem.strerror or problem}") from problem
    if taken and not overwrite:
        raise ConfigError(
            f"{folder} holds a draft head already; --overwrite replaces it, or name a new folder"
        )


def _check_free(folder: Path) -> None:
    """Refuses to put a head in the place of anything but an older one of ours."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is no folder; name a new one")
    if not folder.is_dir():
        return
    found = {path.name for path in folder.iterdir()}
    if not found:
        return
    if found - _OURS or NAME not in found:
        other = min(found - _OURS, default=f"no {NAME}")
        raise ConfigError(
            f"{folder} is no head that specdec wrote (it holds {other}) and is not overwritten; "
            "name a new folder"
        )
    read_sidecar(folder)
