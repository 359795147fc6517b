"""Where a checkpoint or a head comes from: versions, command, options, data, target, revision.

For people, months later, and never read back by the trainer. Nothing in here is secret, and nothing
in here can fail a run.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import specdec
from specdec.artifacts.source_revision import source_revision
from specdec.artifacts.target_fingerprint import TargetFingerprint

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "safetensors", "numpy")


def provenance(
    options: Any,
    data_hash: str | None = None,
    target: TargetFingerprint | None = None,
) -> dict[str, Any]:
    """Where something comes from, as plain values for JSON.

    Args:
        options: A dataclass, a mapping or anything else that says what was asked for.
        data_hash: Of the prepared data.
        target: Of the model that was learned from.
    """
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "specdec": specdec.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "revision": source_revision(Path(__file__)),
        "argv": [str(word) for word in sys.argv],
        "options": plain(options),
        "data_hash": data_hash,
        "target": None if target is None else target.to_dict(),
    }


def plain(value: Any) -> Any:
    """`value` in terms of JSON: dataclasses as objects, everything unknown as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(inner) for inner in value), key=str)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # strict JSON has no word for it
    if value is None or type(value) in (str, int, float, bool):
        return value
    return str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
