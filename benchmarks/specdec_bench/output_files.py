"""Looks at a file before a command replaces it: at its end it would be too late to ask."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from specdec.errors import ConfigError

_START = 400  # bytes that are looked at


def check_replaceable(path: Path, flag: str, mark: bytes, inputs: Iterable[Path] = ()) -> None:
    """Refuses a file that is not of the kind that will be written.

    Args:
        path: What will be replaced, if it is there.
        flag: Option that named it.
        mark: Stands in the first bytes of every file of that kind.
        inputs: Files that the command reads or writes besides.

    Raises:
        ConfigError: It is something else; nobody wants to lose prompts to a mistyped name.
    """
    where = path.expanduser()
    try:
        same = next((other for other in inputs if _is_same(where, other.expanduser())), None)
        if same is not None:
            raise ConfigError(f"{flag} {path} is {same}, which is needed; choose another name")
        if where.is_dir():
            raise ConfigError(f"{flag} {path} is a folder; give the name of a file")
        if not where.exists():
            return
        start = b"-"
        if where.is_file():  # a pipe would wait for a writer
            with where.open("rb") as stream:
                start = stream.read(_START)
    except (OSError, RuntimeError, ValueError) as problem:
        if isinstance(problem, ConfigError):
            raise
        raise ConfigError(f"cannot look at {flag} {path}: {problem}") from problem
    if start and mark not in start:
        raise ConfigError(f"{flag} {path} exists and is no file of this kind; choose another name")


def _is_same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.absolute() == other.absolute()
