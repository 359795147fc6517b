"""Reads rows from files: JSON lines, plain or gzip, and Parquet.

A line that is no JSON does not end the reading: it is told apart from the values, for some readers
skip it and others may not. A file that is damaged ends it, for what it lost is unknown.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from specdec.errors import ConfigError

MOST_LINE_BYTES = 32 * 2**20
"""A longer line is none: reading it would fill the memory."""
LINES, COLUMNS = (".jsonl", ".ndjson"), (".parquet",)
"""Endings of files that hold one JSON object a line, also with .gz behind them, and of tables."""
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class BadLine:
    """Stands for a line that holds no value.

    Attributes:
        reason: Why.
        detail: What exactly was found.
    """

    reason: Literal["line_too_long", "not_utf8", "broken_json"]
    detail: str


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file; by its first ones, not by its name, it is gzip or not.

    Raises:
        ConfigError: It cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
    except _DAMAGED as problem:
        raise _damaged(path, "", problem) from problem
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror or problem}") from problem


def lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of every line that is not blank; or a `BadLine`.

    Args:
        path: Of the file, for messages.
        stream: As `reading` gives it.

    Raises:
        ConfigError: The file is damaged; names the last good line.
    """
    number = 0
    try:
        while line := stream.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                # Told before its end is looked for: whoever refuses it need not read a terabyte.
                yield number, BadLine("line_too_long", f"more than {MOST_LINE_BYTES:,} bytes")
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_CHUNK)
            elif line.strip():
                yield number, _value(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except _DAMAGED as problem:
        raise _damaged(path, f" after line {number}", problem) from problem


def columns(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of every row of a Parquet file.

    Raises:
        ConfigError: It cannot be read, or pyarrow is not installed.
    """
    try:
        parquet: Any = import_module("pyarrow.parquet")  # comes with the extra `train`
    except ImportError as problem:
        raise ConfigError(
            f"{path} is a Parquet file, which needs pyarrow (pip install pyarrow); or write its "
            "rows as JSON lines"
        ) from problem
    try:
        rows = (
            row for part in parquet.ParquetFile(path).iter_batches() for row in part.to_pylist()
        )
        yield from enumerate(rows, 1)
    except Exception as problem:  # any failure means that the file is wrong
        raise ConfigError(f"cannot read {path}: {problem}") from problem


def _value(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as problem:
        return BadLine("not_utf8", problem.reason)
    except (ValueError, RecursionError) as problem:  # too many digits, too many brackets
        return BadLine("broken_json", str(problem))


def _damaged(path: Path, where: str, problem: Exception) -> ConfigError:
    return ConfigError(
        f"cannot read {path}: it is cut off or damaged{where} ({problem}); fetch it again"
    )
