"""Reads rows from files, folders, hub data sets and the bundled corpus, one bad line at a time.

JSON lines are read here and not by `datasets`, whose reader gives up on the first broken line.
Everything that goes wrong within a row becomes a `BadRow` in the stream; everything that is wrong
with a file is a `ConfigError`.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from specdec.artifacts import json_lines
from specdec.artifacts.hub import require_hub
from specdec.artifacts.json_lines import COLUMNS, LINES, BadLine, columns, lines, reading
from specdec.artifacts.places import is_hub_id
from specdec.demo.corpus import fingerprint, read_sources
from specdec.errors import ConfigError
from specdec_training.data.bad_rows import BadRow, shown
from specdec_training.data.conversations import Row, parse_row
from specdec_training.data.options import ReadOptions

DEMO, DEMO_HELD_OUT = "demo", "demo-held-out"
"""Names of the bundled corpus where an input is asked for: what the toy was trained on, and the
modules that it never saw."""

_MOST_ARRAY_BYTES = 2**30  # a JSON array is read at once
_ARRAYS, _TEXTS = (".json",), (".txt",)
_SUFFIXES = (*LINES, *_ARRAYS, *COLUMNS, *_TEXTS)
_CHUNK = 2**20


@dataclass(frozen=True)
class ReadRow:
    """One row of the input, good or bad.

    Attributes:
        where: File and line, for messages.
        row: The row, or None when it is bad.
        problem: Why it is bad.
    """

    where: str
    row: Row | None = None
    problem: BadRow | None = None


class Inputs:
    """The rows of all inputs in a fixed order, without those that were read before.

    Args:
        options: Names the inputs, and what is skipped in them.

    Raises:
        ConfigError: An input is missing or has no readable file.
    """

    def __init__(self, options: ReadOptions) -> None:
        if not options.input:
            raise ConfigError("--input is missing; give files, folders, a hub name or demo")
        self._options = options
        self._sources = [source for name in options.input for source in _sources(name, options)]

    def hash(self) -> str:
        """SHA-256 over what will be read: the files' bytes, and how the corpus is cut."""
        digest = hashlib.sha256(str(self._options.limit).encode())
        for source in self._sources:
            digest.update(source.hash().encode())
        return digest.hexdigest()

    def rows(self) -> Iterator[ReadRow]:
        """Every row, until the limit of rows is reached.

        Raises:
            ConfigError: There is none, or a file cannot be read.
        """
        contents: set[str] = set()
        count = 0
        for count, found in enumerate(self._all(), 1):
            if self._options.limit is not None and count > self._options.limit:
                return
            if found.row is not None:
                row = found.row.as_chat() if self._options.as_chat else found.row
                found, key = ReadRow(found.where, row), row.key()
                if key in contents:
                    found = ReadRow(found.where, problem=BadRow("duplicate_content"))
                contents.add(key)
            yield found
        if not count:
            raise ConfigError(
                f"{', '.join(map(shown, self._options.input))} has no rows; give an input with "
                "at least one"
            )

    def _all(self) -> Iterator[ReadRow]:
        for source in self._sources:
            names: dict[str, str] = {}  # ids start again in every file
            for where, value in source.rows():
                found = self._read(where, value)
                row = found.row
                if row is not None and row.name:
                    key = row.key()
                    if names.setdefault(row.name, key) != key:
                        found = ReadRow(where, problem=BadRow("duplicate_id", row.name))
                yield found

    def _read(self, where: str, value: Any) -> ReadRow:
        """The row in `value`, which is a JSON value, or a `BadLine`."""
        try:
            if isinstance(value, BadLine):
                raise BadRow(value.reason, value.detail)
            return ReadRow(where, parse_row(value, self._options.ignore_field))
        except BadRow as problem:
            return ReadRow(where, problem=problem)


@dataclass(frozen=True)
class _File:
    path: Path

    def hash(self) -> str:
        digest = hashlib.sha256(_kind(self.path).encode())  # which says how the bytes are read
        try:
            with self.path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        except OSError as problem:
            raise ConfigError(f"cannot read {str(self.path)!r}: {problem.strerror}") from problem
        return digest.hexdigest()

    def rows(self) -> Iterator[tuple[str, Any]]:
        for number, value in self._values():
            yield f"{self.path.name}:{number}", value

    def _values(self) -> Iterator[tuple[int, Any]]:
        if self.path.suffix in COLUMNS:
            yield from ((number, _without_nulls(row)) for number, row in columns(self.path))
            return
        with reading(self.path) as stream:
            if _kind(self.path) in _TEXTS:
                yield 1, _document(stream)
            else:
                yield from _array(stream, self.path) or lines(self.path, stream)


@dataclass(frozen=True)
class _Table:
    """A `datasets.Dataset`, from the hub or from `save_to_disk`."""

    name: str
    data: Any

    def hash(self) -> str:
        return str(self.data._fingerprint)

    def rows(self) -> Iterator[tuple[str, Any]]:
        for number, value in enumerate(self.data, 1):
            yield f"{self.name}:{number}", _without_nulls(value)


@dataclass(frozen=True)
class _Demo:
    """The bundled corpus, cut into pieces of whole lines."""

    name: str
    lines: tuple[int, int]
    seed: int

    def _texts(self) -> list[str]:
        return read_sources(held_out=self.name == DEMO_HELD_OUT)

    def hash(self) -> str:
        return f"{self.name} {fingerprint(self._texts())} {self.lines} {self.seed}"

    def rows(self) -> Iterator[tuple[str, Any]]:
        chosen, (least, most) = random.Random(self.seed), self.lines
        pieces = []
        for text in self._texts():
            lines = text.splitlines(keepends=True)
            at = 0
            while at < len(lines):
                size = chosen.randint(least, most)
                if at + size <= len(lines):  # a rest would be shorter than was asked for
                    pieces.append("".join(lines[at : at + size]))
                at += size
        chosen.shuffle(pieces)
        filled = (piece for piece in pieces if piece.strip())
        for number, piece in enumerate(filled, 1):
            yield f"{self.name}:{number}", {"text": piece}


def _sources(name: str, options: ReadOptions) -> list[Any]:
    if name in (DEMO, DEMO_HELD_OUT):
        if not 1 <= options.min_lines <= options.max_lines:
            raise ConfigError(
                f"--min-lines must be from 1 to --max-lines, got {options.min_lines} and "
                f"{options.max_lines}"
            )
        return [_Demo(name, (options.min_lines, options.max_lines), options.seed)]
    if not name:
        raise ConfigError("an input is empty; give a file, a folder, a hub name or demo")
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as problem:
        raise ConfigError(f"cannot look for the input {shown(name)!r}: {problem}") from problem
    if is_folder:
        return _in_folder(path)
    if is_file:
        if _kind(path) not in _SUFFIXES:
            raise ConfigError(
                f"the input {name!r} is none of {', '.join(_SUFFIXES)} (or those .gz)"
            )
        return [_File(path)]
    if not is_hub_id(name) or _kind(path) in _SUFFIXES:
        raise ConfigError(f"there is no file or folder {shown(name)!r} to read rows from")
    return [_Table(name, _from_hub(name, options))]


def _kind(path: Path) -> str:
    """The suffix that says what is in a file, compression aside."""
    inner = Path(path.stem).suffix
    return (inner if inner not in COLUMNS else "") if path.suffix == ".gz" else path.suffix


def _in_folder(path: Path) -> list[Any]:
    if (path / "meta.json").is_file() and (path / "examples").is_dir():
        raise ConfigError(f"the input {str(path)!r} is prepared already; train on it as it is")
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        import datasets

        try:
            return [_Table(path.name, datasets.load_from_disk(str(path)))]
        except Exception as problem:  # any failure to read foreign files means that they are wrong
            raise ConfigError(f"cannot load the input {str(path)!r}: {shown(problem)}") from problem
    files = sorted(
        found
        for found in path.rglob("*")
        if _kind(found) in _SUFFIXES and found.is_file() and not found.name.startswith(".")
    )
    # Beside rows, a text is what somebody wrote about them.
    files = [found for found in files if _kind(found) not in _TEXTS] or files
    if not files:
        raise ConfigError(f"the input {str(path)!r} holds no {', '.join(_SUFFIXES)} file")
    return [_File(found) for found in files]


def _from_hub(name: str, options: ReadOptions) -> Any:
    import datasets

    require_hub(name, "data set")
    try:
        return datasets.load_dataset(name, options.subset, split=options.split)
    except Exception as problem:  # any failure to get foreign data means that they are not there
        raise ConfigError(
            f"cannot load {name!r}, split {options.split!r}, from the hub: {shown(problem)}"
        ) from problem


def _document(stream: BinaryIO) -> Any:
    """The row of a text file, all of which is one text."""
    most = json_lines.MOST_LINE_BYTES
    content = stream.read(most + 1)
    if len(content) > most:
        return BadLine("line_too_long", f"more than {most:,} bytes")
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as problem:
        return BadLine("not_utf8", problem.reason)
    return {"text": text.replace("\r\n", "\n")}


def _array(stream: BinaryIO, path: Path) -> Iterator[tuple[int, Any]] | None:
    """The rows of a .json file that holds a list; None when it holds lines after all."""
    if _kind(path) not in _ARRAYS:
        return None
    start = stream.read(_CHUNK)
    if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        stream.seek(0)
        return None
    text = start + stream.read(_MOST_ARRAY_BYTES)
    if len(text) > _MOST_ARRAY_BYTES:
        raise ConfigError(f"{str(path)!r} is too large for a JSON list; write it as .jsonl")
    try:
        values = json.load(io.BytesIO(text))
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{str(path)!r} is no JSON list: {shown(problem)}") from problem
    return iter(list(enumerate(values, 1)))


def _without_nulls(value: Any) -> Any:
    """A value of a columnar file without the fields that it has only because others have them."""
    if isinstance(value, dict):
        return {n: _without_nulls(inner) for n, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
