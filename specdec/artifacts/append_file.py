"""Files that grow by whole pieces, each written to by one process or by several that share it.

Knows bytes and paths, and nothing of what they mean.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLock, Timeout, lock_descriptor

from specdec.errors import SpecdecError

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems
_PATIENCE = 0.2  # seconds to find out that the process which a marker names is dead


class BusyError(SpecdecError):
    """Another process writes to the file.

    Attributes:
        hint: What to do if that process is gone; empty where the lock would be gone with it.
    """

    def __init__(self, path: Path, hint: str = "") -> None:
        super().__init__(f"another process writes to {path}{hint}")
        self.hint = hint


@contextmanager
def only_writer(descriptor: int, path: Path) -> Iterator[None]:
    """Keeps other processes that ask from writing to a file.

    The lock is the operating system's own, so a killed process leaves none. Where the file system
    has none, a marker beside the file names the process, and that of a dead one is taken over.

    Args:
        descriptor: Of the file, open for writing; the lock ends with it at the latest.
        path: Its name, for messages.

    Raises:
        BusyError: Another process holds the lock.
        OSError: It cannot be taken.
    """
    try:
        is_ours = lock_descriptor(descriptor, blocking=False)
    except OSError as problem:
        if problem.errno not in _UNSUPPORTED:
            raise
    else:
        if not is_ours:
            raise BusyError(path)
        yield
        return
    marker = SoftFileLock(f"{path}.lock", timeout=_PATIENCE)
    try:
        marker.acquire()
    except Timeout:
        raise BusyError(path, f". If it is gone, delete {marker.lock_file}") from None
    try:
        yield
    finally:
        marker.release()


def append(descriptor: int, content: bytes) -> None:
    """Adds a piece in one write, so that no other writer's piece gets into it.

    Args:
        descriptor: Of a file that was opened to append.

    Raises:
        OSError: It does not fit; what part of it reached the file has been cut off again.
    """
    written = os.write(descriptor, content)
    while written < len(content):  # the disk is full, or a pipe takes parts
        try:
            written += os.write(descriptor, content[written:])
        except OSError:
            found = os.fstat(descriptor)
            end = os.lseek(descriptor, 0, os.SEEK_CUR) if stat.S_ISREG(found.st_mode) else -1
            if end == found.st_size:  # else another writer has added something behind it
                os.ftruncate(descriptor, end - written)
            raise
