"""The trace of a call: one JSON line a round, appended to a file that calls and threads may share.

A trace is a record for people, so whatever goes wrong with its file is one warning, and the call
goes on without it. Knows nothing of what a round holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specdec.artifacts.append_file import append
from specdec.contracts import RoundResult
from specdec.loop import Observer
from specdec.stats import RoundRecord

# O_NONBLOCK: a pipe that nobody reads must not make anybody wait.
_NO_WAIT: int = getattr(os, "O_NONBLOCK", 0)
_FLAGS: int = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_WAIT | getattr(os, "O_BINARY", 0)
_FAILED = "trace.failed"


class TraceWarning(UserWarning):
    """A trace is not written, or not further; the text is what it would have been."""


@contextmanager
def traced(path: str | Path | None, memory: MutableMapping[str, Any]) -> Iterator[list[Observer]]:
    """What writes the rounds of one call to a file; nothing where no file was asked for.

    Args:
        path: Where; lines are appended, and "~" is the user's home.
        memory: Of the augmented model: a file that failed is named once, until it works again.
    """
    if path is None:
        yield []
        return
    trace = _Trace(Path(path), memory.setdefault(_FAILED, set()))
    try:
        yield [trace]
    finally:
        trace.close()


class _Trace:
    """Opens its file at the first round; after a failure, no more is written in this call."""

    def __init__(self, path: Path, failed: set[str]) -> None:
        self._path, self._failed = path, failed
        self._descriptor: int | None = None
        self._is_off = False

    def __call__(self, result: RoundResult, record: RoundRecord) -> None:
        if self._is_off:
            return
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path.expanduser(), _FLAGS, 0o666)
                if _NO_WAIT:
                    os.set_blocking(self._descriptor, True)  # whoever does read may be slow
            append(self._descriptor, json.dumps(record.to_json()).encode("ascii") + b"\n")
        except (OSError, ValueError, RuntimeError) as failure:  # also from odd names
            self._is_off = True
            self._warn(failure)

    def close(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):  # nothing that was written is at stake
            os.close(self._descriptor)
        self._descriptor = None
        if not self._is_off:
            self._failed.discard(str(self._path))

    def _warn(self, failure: Exception) -> None:
        name = str(self._path)
        if name in self._failed:
            return
        self._failed.add(name)
        reason = getattr(failure, "strerror", None) or failure
        warnings.warn(
            f"specdec: the trace {name!r:.200} is not written: {reason}; the text stays the same, "
            "and this is not said again until the file works",
            TraceWarning,
            stacklevel=4,
        )
