"""Reads JSON lines, plain or gzip, and says exactly where they are wrong: file, line and field.

A benchmark over half of a file would be a figure about something else, so nothing is skipped: the
first bad row ends the reading.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from specdec.errors import ConfigError

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
"""Names of files that hold one JSON object a line."""

COLUMNS = ".parquet"

_MOST_CHARS = 32 * 2**20  # of a line; a longer one is no prompt, and would fill the memory
_SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object and where it stands.

    Attributes:
        path: File.
        number: Line, from 1; of a Parquet file, the row.
        value: The object.
    """

    path: Path
    number: int
    value: Mapping[str, Any]

    def refuse(self, field: str, problem: str) -> ConfigError:
        """The error that names this row and one of its fields."""
        return ConfigError(f"{self.path}, line {self.number}, field {field!r}: {problem}")

    def text(self, field: str, value: Any) -> str:
        """`value` as a text that is not empty.

        Raises:
            ConfigError: It is something else, or has no UTF-8 form.
        """
        if not isinstance(value, str):
            raise self.refuse(field, f"must be text, got {shown(value)}")
        if not value.strip():
            raise self.refuse(field, "is empty")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as problem:  # "\ud800" is JSON, and half a character
            raise self.refuse(field, f"is no Unicode text: {problem.reason}") from problem
        return value

    def texts(self, field: str, value: Any) -> tuple[str, ...]:
        """`value` as a list of texts with at least one element.

        Raises:
            ConfigError: It is something else.
        """
        if not isinstance(value, list) or not value:
            raise self.refuse(field, f"must be a list of texts, got {shown(value)}")
        return tuple(self.text(f"{field}[{at}]", part) for at, part in enumerate(value))


def shown(value: Any) -> str:
    """A value in a message: its type, and the beginning of it."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"


def is_rows(path: Path) -> bool:
    """Whether the name is that of a file `read_rows` can read."""
    return path.name.endswith((*LINES, COLUMNS))


def stem(path: Path) -> str:
    """The file's name without its endings."""
    name = path.name
    for ending in sorted((*LINES, COLUMNS), key=len, reverse=True):
        name = name.removesuffix(ending)
    return name


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file (also gzip) or a Parquet file, in their order.

    Raises:
        ConfigError: The file cannot be read, is cut off or damaged, or a line is no JSON object.
    """
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r}")
    if path.name.endswith(COLUMNS):
        yield from _columns(path)
        return
    number = 0
    try:
        with _opened(path) as stream:
            while line := stream.readline(_MOST_CHARS + 1):
                number += 1
                if len(line) > _MOST_CHARS:
                    raise ConfigError(f"{path}, line {number}: longer than {_MOST_CHARS:,}")
                if line.strip():
                    yield Row(path, number, _object(path, number, line))
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise ConfigError(
            f"{path} is cut off or damaged after line {number} ({problem}); fetch it again"
        ) from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path} is not UTF-8 after line {number}: {problem.reason}") from problem
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror or problem}") from problem


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOBase]:
    """The text of a file; by its first bytes, not by its name, it is gzip or not."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        plain: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        # Only "\n" ends a line: JSON texts may hold other line separators.
        yield io.TextIOWrapper(plain, encoding="utf-8-sig", errors="strict", newline="\n")


def _object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{path}, line {number} is not JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise ConfigError(f"{path}, line {number} is no JSON object, but {shown(value)}")
    return value


def _columns(path: Path) -> Iterator[Row]:
    try:
        parquet: Any = import_module("pyarrow.parquet")  # comes with the extra `train`
    except ImportError as problem:
        raise ConfigError(
            f"{path} is a Parquet file, which needs pyarrow (pip install pyarrow); or write its "
            "rows as JSON lines"
        ) from problem
    try:
        table = parquet.read_table(path)
    except Exception as problem:  # any failure means that the file is wrong
        raise ConfigError(f"cannot read {path}: {problem}") from problem
    for number, value in enumerate(table.to_pylist(), 1):
        yield Row(path, number, value)
