"""Writes a folder as a whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from specdec.artifacts.whole_folder import whole_folder
from specdec.errors import ConfigError

_META = "meta.json"


@contextlib.contextmanager
def fresh_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well.

    Args:
        path: The folder to write; it must not exist, or be empty, or be replaced.
        overwrite: Replace finished data that are there.

    Raises:
        ConfigError: `path` is something else, or cannot be written. Nothing is left behind.
    """
    path = path.expanduser()
    check_folder(path, overwrite)
    try:
        with whole_folder(path) as folder:
            yield folder
            check_folder(path, overwrite)  # it may have appeared meanwhile
    except (OSError, SafetensorError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise ConfigError(f"cannot write --output {str(path)!r}: {reason}") from problem


def check_folder(path: Path, overwrite: bool = False) -> None:
    """Refuses a folder to write where that would lose something, or go somewhere else.

    Args:
        overwrite: Finished data there may be replaced.

    Raises:
        ConfigError: It is a file, a symbolic link, or holds anything else.
    """
    path = path.expanduser()
    what = f"--output {str(path)!r}"
    try:
        if path.is_symlink():
            raise ConfigError(f"{what} is a symbolic link; name the folder itself")
        if not path.name or path.name in (".", ".."):
            raise ConfigError(f"{what} names no folder to write")
        if not path.exists():
            return
        if not path.is_dir():
            raise ConfigError(f"{what} is a file; name a folder")
        if not any(path.iterdir()):
            return
        if not (path / _META).is_file():
            raise ConfigError(f"{what} holds other files; name a folder that is new or empty")
    except OSError as problem:
        raise ConfigError(f"cannot look for {what}: {problem.strerror}") from problem
    if not overwrite:
        raise ConfigError(f"{what} holds finished data; give another folder or --overwrite")
