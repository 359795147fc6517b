"""One run per folder: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import json
import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from specdec.artifacts.append_file import BusyError, only_writer
from specdec.errors import SpecdecError

_MOST_BYTES = 1000
LOCKS = ("run.lock", "run.lock.lock")
"""Files of a locked folder: the lock, and its marker where the file system has no locks."""


class RunLock:
    """Keeps a second run out of a folder while this one writes there.

    Args:
        folder: Made when it is missing. The lock is the file `run.lock` in it, which stays:
            deleting it would let two others lock an old and a new one. Whoever holds it is named
            there.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._path = self._folder / "run.lock"
        self._held = ExitStack()

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            SpecdecError: Another run holds it, or the folder cannot be written.
        """
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as held:
                descriptor = os.open(self._path, flags, 0o666)
                held.callback(os.close, descriptor)
                try:
                    held.enter_context(only_writer(descriptor, self._path))
                except BusyError as busy:
                    raise SpecdecError(
                        f"another run writes to {self._folder}: {_owner(descriptor)}; wait for "
                        f"it, stop it or choose another folder{busy.hint}"
                    ) from None
                held.callback(_forget, descriptor)
                _sign(descriptor)
                self._held = held.pop_all()
        except OSError as problem:
            raise SpecdecError(
                f"cannot lock the folder {self._folder}: {problem.strerror}"
            ) from problem
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the lock back."""
        self._held.close()


def _sign(descriptor: int) -> None:
    mine = {"process": os.getpid(), "host": socket.gethostname()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(mine).encode("ascii"), 0)


def _forget(descriptor: int) -> None:
    with suppress(OSError):
        os.ftruncate(descriptor, 0)


def _owner(descriptor: int) -> str:
    """What the holder wrote about itself."""
    found: Any = None
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
    known = found if isinstance(found, dict) else {}
    return f"process {known.get('process')} on {known.get('host')}"
