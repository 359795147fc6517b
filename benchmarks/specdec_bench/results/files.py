"""Writes result files so that a kill costs at most the unit at work, and one writer at a time.

Lines are only appended, in groups that are flushed to the disk together; a torn last line is cut
off when the run is resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from specdec.artifacts.append_file import BusyError, append, only_writer
from specdec.artifacts.atomic_files import flush_folder, make_folder
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.results.reading import (
    BrokenRecordError,
    as_results,
    read_lines,
    read_results,
)
from specdec_bench.results.records import EndRecord, Header, Record, Results, to_json

__all__ = ["BrokenRecordError", "RecordWriter", "check_output", "is_unfinished", "read_results"]

_SAME_SUBJECT = ("target_sha256", "prompts_sha256", "head_sha256", "draft_sha256")
_SAME_PLACE = ("device_name", "threads", "specdec", "revision", "packages", "servers")
_HEADER_START = b'{"run_id":'


class RecordWriter:
    """An open result file that this process alone writes to; a context manager.

    Args:
        path: Of the file; its folder is made.
        header: Of the run that is to be written. Its `run_id` is replaced by that of the file when
            an unfinished run goes on.
        resume: Go on with an unfinished file of the same configuration.
        overwrite: Replace a result file, finished or not.
    """

    def __init__(
        self, path: str | Path, header: Header, resume: bool = False, overwrite: bool = False
    ) -> None:
        self._path, self._resume, self._overwrite = Path(path), resume, overwrite
        self.header = header
        self._descriptor: int | None = None
        self._opened = ExitStack()
        self._count = 0
        self._is_new = False
        self.before: Results | None = None
        """What an earlier start measured, or None for a new file."""

    def __enter__(self) -> RecordWriter:
        """Opens and locks the file.

        A new file gets its header, and an old one is replaced, with the first records: a run that
        fails before it has measured anything costs nobody a result.

        Raises:
            ConfigError: The file is finished, of another run, or no result file.
            SpecdecError: Another process writes to it, or the disk does not take it.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        try:
            make_folder(self._path.parent)
            with ExitStack() as opened:
                descriptor = os.open(self._path, flags, 0o666)
                opened.callback(os.close, descriptor)
                opened.enter_context(only_writer(descriptor, self._path))
                self._begin(descriptor)
                self._descriptor, self._opened = descriptor, opened.pop_all()
        except BusyError as problem:
            raise SpecdecError(
                f"another run writes to {self._path}; wait for it, or choose another "
                f"--output{problem.hint}"
            ) from None
        except OSError as problem:
            raise SpecdecError(
                f"cannot write {self._path}: {problem.strerror or problem}"
            ) from problem
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file, which gives the lock back."""
        self._opened.close()
        self._descriptor = None

    def append(self, *records: Record) -> None:
        """Adds whole lines and waits until they are on the disk.

        Raises:
            SpecdecError: The disk does not take them.
        """
        if not records:
            return
        if self._is_new:
            records = (self.header, *records)
        lines = b"".join(_line(record) for record in records)
        if self._descriptor is None:
            raise SpecdecError(f"{self._path} is closed")
        try:
            if self._is_new:
                os.ftruncate(self._descriptor, 0)
                flush_folder(self._path.parent)
                self._is_new = False
            append(self._descriptor, lines)
            os.fsync(self._descriptor)
        except OSError as problem:
            raise SpecdecError(
                f"cannot write {self._path}: {problem.strerror}; make room and go on with --resume"
            ) from problem
        self._count += len(records)

    def finish(self, stopped_by: str, seconds: float) -> None:
        """Adds the end mark."""
        count = self._count + self._is_new  # the header may still be to be written
        self.append(EndRecord(records=count, stopped_by=stopped_by, seconds=seconds))

    def _begin(self, descriptor: int) -> None:
        check_output(self._path, self._resume, self._overwrite)
        size = os.fstat(descriptor).st_size
        if size and not self._overwrite:
            self._go_on(descriptor)
        else:
            self._is_new = True

    def _go_on(self, descriptor: int) -> None:
        found = read_lines(self._path)
        if not found.records:  # killed while the header was written
            self._is_new = True
            return
        before = as_results(self._path, found.records)
        different = _differences(before.header, self.header)
        if different:
            raise ConfigError(
                f"{self._path} is of another run ({'; '.join(different[:3])}); give the same "
                "options on the same machine and version, or another --output"
            )
        os.ftruncate(descriptor, found.whole_bytes)
        os.fsync(descriptor)
        self.before, self.header, self._count = before, before.header, len(found.records)


def check_output(path: Path, resume: bool, overwrite: bool) -> None:
    """Refuses a file that a run may not write to, before anything is loaded.

    Raises:
        ConfigError: It is finished, stopped without `resume`, or no result file.
        SpecdecError: It cannot be read.
    """
    if path.is_symlink():
        raise ConfigError(f"--output {path} is a symbolic link; give the file itself")
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ConfigError(f"--output {path} is a {kind}; give the name of a file")
    if not path.is_file() or not path.stat().st_size:
        return
    if not _is_ours(path):
        raise ConfigError(f"--output {path} exists and is no result file; choose another name")
    if overwrite:
        return
    records = read_lines(path).records
    if records and isinstance(records[-1], EndRecord):
        raise ConfigError(
            f"{path} holds a finished run; choose another --output, or replace it with --overwrite"
        )
    if records and not resume:
        raise ConfigError(
            f"{path} holds a run that was stopped; go on with --resume, or replace it with "
            "--overwrite"
        )


def is_unfinished(path: Path) -> bool:
    """Whether a run was stopped that wrote to this file, so that it can go on."""
    try:
        records = read_lines(path).records
    except SpecdecError:
        return False
    return bool(records) and not isinstance(records[-1], EndRecord)


def _line(record: Record) -> bytes:
    try:
        text = json.dumps(to_json(record), separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise SpecdecError(f"a {record.kind!r} record cannot be written: {problem}") from problem
    return text.encode("ascii") + b"\n"


def _is_ours(path: Path) -> bool:
    """Whether the file begins as a header does; one that was torn within it counts, too."""
    with path.open("rb") as stream:
        start = stream.read(len(_HEADER_START))
    return _HEADER_START.startswith(start)


def _differences(before: Header, now: Header) -> list[str]:
    """What keeps a run from going on as the one in the file, in words."""
    found = []
    names = sorted(set(before.config) | set(now.config))
    for name in names:
        old, new = before.config.get(name), now.config.get(name)
        if old != new:
            found.append(f"--{name.replace('_', '-')}: {old} before, {new} now")
    if list(before.arms) != list(now.arms):
        found.append(f"arms: {', '.join(before.arms)} before, {', '.join(now.arms)} now")
    if list(before.settings) != list(now.settings):
        found.append("settings differ")
    for name in _SAME_SUBJECT:
        if _text(before.provenance, name) != _text(now.provenance, name):
            found.append(f"{name} differs: the files are not those of before")
    for name in _SAME_PLACE:
        old, new = _text(before.provenance, name), _text(now.provenance, name)
        if old != new:
            found.append(f"{name}: {old} before, {new} now, so times cannot be joined")
    return found


def _text(facts: Mapping[str, Any], name: str) -> str:
    return str(facts.get(name))
