"""Files that are either whole or not there: written aside, flushed to the disk, renamed at the end.

Used for whatever a crash must not damage. Knows bytes and paths, and nothing of what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a write that found no room: the disk, the quota, the largest file allowed."""

# O_NONBLOCK: a pipe in the place of a file must not make anybody wait.
_NO_LINKS: int = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
_PIECE = 16 << 20  # bytes a write or a read


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file holds.

    Attributes:
        size: In bytes.
        sha256: 64 hexadecimal digits.
    """

    size: int
    sha256: str


def write_new(path: Path, content: Iterable[bytes | memoryview]) -> Digest:
    """Writes a file that was not there and flushes it to the disk; returns what it holds.

    On failure the file stays, in parts: callers write into a place that they remove.

    Raises:
        OSError: It exists, or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS, 0o666)
    try:
        size, digest = 0, hashlib.sha256()
        for part in content:
            rest = memoryview(part).cast("B")
            while len(rest):
                written = os.write(descriptor, rest[:_PIECE])
                digest.update(rest[:written])
                rest, size = rest[written:], size + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Digest(size, digest.hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file, over an older one if there is one; after a crash one of the two is whole.

    Raises:
        OSError: It cannot be written; the older one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()  # of a process that had this number and was killed
        write_new(temporary, [content])
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, that survive a loss of power; it may be there.

    Raises:
        OSError: It cannot be made, or a file has its name.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)  # exist_ok: another process may have been faster
    flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder survive a loss of power; does nothing where that is not known."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """A descriptor to read a file by; symbolic links and whatever is no file are refused.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    if path.is_symlink():  # said in words; O_NOFOLLOW would call it a loop
        raise OSError(errno.EINVAL, "is a symbolic link, which is not followed")
    descriptor = os.open(path, os.O_RDONLY | _NO_LINKS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file")
    return descriptor


def digest_of(path: Path) -> Digest:
    """What a file holds.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    size, digest = 0, hashlib.sha256()
    with os.fdopen(open_regular(path), "rb") as stream:
        while piece := stream.read(_PIECE):
            size += len(piece)
            digest.update(piece)
    return Digest(size, digest.hexdigest())


def read_small(path: Path, most: int) -> bytes:
    """All of a file that must not have more than `most` bytes.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
    """
    with os.fdopen(open_regular(path), "rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"is larger than the {most:,} bytes that it may have")
    return content


def to_json(value: Mapping[str, Any], what: str) -> bytes:
    """`value` as JSON, the same bytes for the same value.

    Numbers, not-a-number included, come back exactly; tuples come back as lists.

    Raises:
        ConfigError: JSON cannot hold some value; names where it stands in `what`.
    """
    _check_json(value, what)
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def from_json(content: bytes) -> dict[str, Any]:
    """The object that JSON text holds.

    Raises:
        ValueError: It holds none.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__} and no object")
    return value


def is_running(process: int) -> bool:
    """Whether a process of this machine may still be at work."""
    if os.name != "posix":
        return True  # asking would end it there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's, or no process number at all
    return True


def size_text(size: int) -> str:
    """Bytes for people: "12.3 GB"."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    if depth > 100:
        raise ConfigError(f"{where} is nested more than 100 deep, or holds itself")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if type(name) is not str:
                raise ConfigError(f"{where} has the key {name!r:.60}; keys must be text")
            _check_json(inner, f"{where}[{name!r}]", depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_json(inner, f"{where}[{index}]", depth + 1)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ConfigError(
            f"{where} is a {type(value).__name__}, which JSON does not hold; give plain numbers, "
            "text, lists and mappings, and tensors as tensors"
        )
