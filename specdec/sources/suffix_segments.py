"""The files of the suffix store: one append-only segment per process, read by all.

A segment is a header (magic, version, tokenizer fingerprint) and records (length, CRC-32, token ids
as little-endian uint32). It comes into being under a temporary name and is renamed when its header
is complete; a record is one write to a descriptor in append mode, opened for it. So readers see
whole records, and after a crash at most one torn tail, in the file of the process that crashed.

Nothing in a file is believed before it is checked: lengths against the file's size, records against
their checksum, and no symbolic link is followed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specdec.sources.store_folder import StoreError

MAGIC, VERSION = b"SPDSUFFX", 1
HEADER = struct.Struct("<8sI32s")
RECORD = struct.Struct("<II")
MAX_RECORD_TOKENS = 1 << 20
MAX_SEGMENT_BYTES = 8 << 20
MAX_SEGMENTS = 256

Tokens = NDArray[np.uint32]

_NAME = re.compile(r"\d{20}-\d{1,10}-[0-9a-f]{8}\.seg")
_TEMPORARY = re.compile(r"\.\d{20}-\d{1,10}-[0-9a-f]{8}\.tmp")
# O_NONBLOCK: a pipe in the place of a segment must not make anybody wait.
_NO_LINKS: int = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
_UNTOUCHED_SECONDS = 3600.0  # a file this old has no writer in the middle of a record
_WRITING_SECONDS = 2.0  # a record that ends too early may still be on its way


class Writer:
    """Appends texts to a segment of its own; a process that was forked needs another writer.

    Args:
        folder: Of one space and tokenizer, as `open_folder` returned it.
        fingerprint: The tokenizer's, 64 hexadecimal digits.
        keep_tokens: Tokens that readers want; older segments beyond twice as many are deleted.
    """

    def __init__(self, folder: Path, fingerprint: str, keep_tokens: int) -> None:
        self._folder, self._fingerprint = folder, bytes.fromhex(fingerprint)
        self._keep_bytes = 2 * 4 * keep_tokens
        self._segment: Path | None = None

    def append(self, tokens: Sequence[int]) -> None:
        """Writes one text; the newest tokens of it, where it is longer than a record may be.

        Raises:
            OSError: Nothing was added; what part of it reached the file has been cut off again.
        """
        payload = np.array(tokens[-MAX_RECORD_TOKENS:], dtype="<u4").tobytes()
        record = RECORD.pack(len(payload), zlib.crc32(payload)) + payload
        descriptor = self._open(len(record))
        try:
            before = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, record)
                if written != len(record):
                    raise StoreError(f"only {written} of {len(record)} bytes could be written")
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)

    def _open(self, more: int) -> int:
        """A descriptor of the segment; of a new one where it has no room or was deleted."""
        flags = os.O_WRONLY | os.O_APPEND | _NO_LINKS
        if self._segment is not None:
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(self._segment, flags)
                if os.fstat(descriptor).st_size + more <= MAX_SEGMENT_BYTES:
                    return descriptor
                os.close(descriptor)
        self._delete_old()
        self._segment = self._new_segment()
        return os.open(self._segment, flags)

    def _new_segment(self) -> Path:
        """A new file with nothing but its header."""
        stem = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary, final = self._folder / f".{stem}.tmp", self._folder / f"{stem}.seg"
        header = HEADER.pack(MAGIC, VERSION, self._fingerprint)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS, 0o600)
        try:
            if os.write(descriptor, header) != len(header):
                raise StoreError(f"{temporary} could not be written")
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(descriptor)
        temporary.rename(final)
        return final

    def _delete_old(self) -> None:
        """Deletes what no reader would load, and temporary files of crashed processes."""
        untouched = time.time() - _UNTOUCHED_SECONDS
        size = 0
        for number, (path, found) in enumerate(segments(self._folder)):
            size += found.st_size
            wanted = size <= self._keep_bytes and number < MAX_SEGMENTS
            if not wanted and found.st_mtime < untouched:
                with contextlib.suppress(OSError):
                    path.unlink()
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if _TEMPORARY.fullmatch(path.name) and path.lstat().st_mtime < untouched:
                    path.unlink()


def segments(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """All files that are named like segments, the one written to last first."""
    found = []
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # deleted in between
                found.append((path, path.lstat()))
    return sorted(found, key=lambda entry: (entry[1].st_mtime_ns, entry[0].name), reverse=True)


@dataclass(slots=True)
class _Progress:
    """How far a segment has been read, and its size then; -1 to look again in any case."""

    offset: int = 0
    size: int = -1
    damaged: bool = False


class Reader:
    """Reads what all processes have added since the last time.

    Args:
        folder: Of one space and tokenizer, as `open_folder` returned it.
        fingerprint: The tokenizer's; segments of others are refused.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._fingerprint = folder, bytes.fromhex(fingerprint)
        self._progress: dict[str, _Progress] = {}

    def new_texts(self, limit: int) -> tuple[list[Tokens], list[str]]:
        """(the newest texts, `limit` tokens or a text more, oldest first; what was wrong).

        A file that is damaged is named once, and its texts before the damage are used.

        Raises:
            OSError: The folder cannot be read.
        """
        newest: list[Tokens] = []
        problems: list[str] = []
        count = 0
        for path, found in segments(self._folder):
            progress = self._progress.setdefault(path.name, _Progress())
            if progress.damaged or progress.size == found.st_size:
                continue
            progress.size = found.st_size
            if count >= limit:
                continue  # older than all that was read
            texts: list[Tokens] = []
            try:
                self._read(path, found, progress, texts)
            except OSError as problem:
                progress.damaged = True
                problems.append(f"{path}: {problem.strerror or problem}")
            for text in reversed(texts):
                if count < limit:
                    newest.append(text)
                    count += len(text)
        return newest[::-1], problems

    def _read(
        self, path: Path, found: os.stat_result, progress: _Progress, texts: list[Tokens]
    ) -> None:
        """Adds the texts after `progress.offset`; raises `OSError` at damage."""
        if not stat.S_ISREG(found.st_mode):
            raise StoreError("not a regular file; the store follows no symbolic links")
        with os.fdopen(os.open(path, os.O_RDONLY | _NO_LINKS), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_SEGMENT_BYTES:
                raise StoreError(f"{size} bytes are more than a segment may have")
            if progress.offset == 0:
                self._check_header(file.read(HEADER.size))
                progress.offset = HEADER.size
            file.seek(progress.offset)
            data = file.read(size - progress.offset)
        at = 0
        while at < len(data):
            if not _is_whole(data, at):
                if time.time() - found.st_mtime < _WRITING_SECONDS:
                    progress.size = -1
                    return
                raise StoreError("the last record is torn; the texts before it are used")
            length, checksum = RECORD.unpack_from(data, at)
            payload = data[at + RECORD.size : at + RECORD.size + length]
            if zlib.crc32(payload) != checksum:
                raise StoreError("a record is damaged; the texts before it are used")
            texts.append(np.frombuffer(payload, dtype="<u4"))
            at += RECORD.size + length
            progress.offset += RECORD.size + length

    def _check_header(self, header: bytes) -> None:
        if len(header) < HEADER.size:
            raise StoreError("shorter than the header of a segment")
        magic, version, fingerprint = HEADER.unpack(header)
        if magic != MAGIC or version != VERSION:
            raise StoreError(f"not a segment of version {VERSION}")
        if fingerprint != self._fingerprint:
            raise StoreError("written with another tokenizer")


def _is_whole(data: bytes, at: int) -> bool:
    """Whether the record at `at` lies inside `data`; raises `StoreError` for a senseless length."""
    if at + RECORD.size > len(data):
        return False
    length = RECORD.unpack_from(data, at)[0]
    if length == 0 or length % 4 or length > 4 * MAX_RECORD_TOKENS:
        raise StoreError(f"a record claims {length} bytes; the texts before it are used")
    return at + RECORD.size + int(length) <= len(data)
