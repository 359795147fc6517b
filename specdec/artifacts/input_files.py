"""Reads files that a user named, and never more of them than a bound says.

A path may lead to a device without an end, to a pipe that nobody writes to, or to ten gigabytes.
Nothing is read from what is larger than its bound, and nothing waits.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specdec.errors import ConfigError

MOST_TEXT = 16 << 20
"""Bytes of a text that is read whole: a prompt, a list of prompts."""

MOST_TEMPLATE = 1 << 20
"""Bytes of a chat template, or of somebody's settings."""
_SHOWN = 200  # characters of a path in a message


def check_path(path: Path, flag: str) -> None:
    """Refuses a path that the system cannot look for: too long, with a NUL, or in nobody's home.

    Args:
        path: As the user wrote it; "~" is a home.
        flag: The option that named it.

    Raises:
        ConfigError: Says why.
    """
    with _refusing(path, flag, "use") as place:
        str(place).encode()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            place.lstat()  # unlike `exists`, it says what is wrong with a name


def check_input_file(path: Path, flag: str) -> None:
    """Refuses at once what cannot be read, without reading it.

    Args:
        path: As the user wrote it; "~" is a home.
        flag: The option that named it.

    Raises:
        ConfigError: There is no such file, or it is a folder or may not be read.
    """
    with _refusing(path, flag) as place:
        found = place.stat()
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError
        if stat.S_ISREG(found.st_mode):  # opening a pipe would wake its writer
            os.close(os.open(place, os.O_RDONLY))


def read_input(path: Path, flag: str, most: int = MOST_TEXT) -> bytes:
    """All bytes of a file, a pipe or a device.

    Args:
        path: As the user wrote it; "~" is a home.
        flag: The option that named it.
        most: Bytes it may have.

    Raises:
        ConfigError: It cannot be read, or is larger.
    """
    with _refusing(path, flag) as place, os.fdopen(_opened(place), "rb") as stream:
        found = os.fstat(stream.fileno())
        content = b"" if found.st_size > most else stream.read(most + 1)
    if max(len(content), found.st_size) > most:
        raise ConfigError(too_large(f"{flag} {path}", most))
    return content


def read_input_text(path: Path, flag: str, most: int = MOST_TEXT) -> str:
    """As `read_input`, as text.

    Raises:
        ConfigError: It cannot be read, is larger, or is not UTF-8.
    """
    try:
        return read_input(path, flag, most).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{flag} {path} is not UTF-8 text: {problem.reason}") from problem


def read_start(path: Path, flag: str, most: int) -> str:
    """The first `most` characters of a text, however long it is.

    Raises:
        ConfigError: It cannot be read, or is not UTF-8 as far as it is read.
    """
    try:
        with (
            _refusing(path, flag) as place,
            os.fdopen(_opened(place), "r", encoding="utf-8") as text,
        ):
            return text.read(most)
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{flag} {path} is not UTF-8 text: {problem.reason}") from problem


def too_large(what: str, most: int) -> str:
    """What is said of an input beyond its bound."""
    return f"{what} is larger than the {most:,} bytes that are read; give a smaller one"


def _opened(place: Path) -> int:
    """A descriptor; opening a pipe does not wait for a writer, and reading one without ends."""
    descriptor = os.open(place, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if hasattr(os, "set_blocking"):
        os.set_blocking(descriptor, True)
    return descriptor


@contextmanager
def _refusing(path: Path, flag: str, verb: str = "read") -> Iterator[Path]:
    """Yields the path with its home; whatever the system says becomes a sentence."""
    text = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}..."
    try:
        yield path.expanduser()
    except ConfigError:
        raise
    except IsADirectoryError as problem:
        raise ConfigError(f"{flag} {text} is a folder; give a file") from problem
    except (OSError, RuntimeError, ValueError) as problem:  # RuntimeError: no such user after ~
        reason = getattr(problem, "strerror", None) or getattr(problem, "reason", None) or problem
        raise ConfigError(f"cannot {verb} {flag} {text}: {reason}") from problem
