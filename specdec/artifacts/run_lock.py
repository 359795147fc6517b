"""One run per folder: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from specdec.artifacts.atomic_files import is_running
from specdec.errors import SpecdecError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_MOST_BYTES = 1000
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems


class RunLock:
    """Keeps a second run out of a folder while this one writes there.

    The lock is the operating system's own, so a killed process leaves none. Where the file system
    has none, the process number in the file decides: a lock of a dead process is taken over.

    Args:
        folder: Made when it is missing. The lock is the file `run.lock` in it, which stays.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._path = self._folder / "run.lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            SpecdecError: Another run holds it, or the folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            self._descriptor = os.open(self._path, flags, 0o666)
        except OSError as problem:
            raise SpecdecError(
                f"cannot lock the folder {self._folder}: {problem.strerror}"
            ) from problem
        try:
            self._take(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = None
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the lock back."""
        if self._descriptor is not None:
            # The file stays: deleting it would let two others lock an old and a new one.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, descriptor: int) -> None:
        held = is_held(descriptor)
        if held is not False:
            owner = _owner(descriptor)
            process, host = owner.get("process"), owner.get("host")
            if held or _may_live(process, host):
                raise SpecdecError(
                    f"another run writes to {self._folder}: process {process} on {host}; wait for "
                    f"it, stop it or choose another folder"
                    + ("" if held else f". If it is gone, delete {self._path}")
                )
        mine = {"process": os.getpid(), "host": socket.gethostname()}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(mine).encode("ascii"), 0)
        except OSError as problem:
            raise SpecdecError(f"cannot write {self._path}: {problem.strerror}") from problem


def is_held(descriptor: int) -> bool | None:
    """Whether another process has locked an open file; if not, we have. None where nobody can."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as problem:
        if problem.errno in _UNSUPPORTED:
            return None
        raise
    return False


def _owner(descriptor: int) -> dict[str, Any]:
    """What the holder wrote about itself; empty when nobody did."""
    try:
        found = json.loads(os.pread(descriptor, _MOST_BYTES, 0) or b"{}")
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _may_live(process: Any, host: Any) -> bool:
    """Whether the process that the file names may still be at work."""
    if not isinstance(process, int) or process <= 0:
        return False
    if host != socket.gethostname():
        return True
    return process != os.getpid() and is_running(process)
