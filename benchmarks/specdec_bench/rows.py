"""Rows of prompts and answers; messages say exactly where they are wrong: file, line and field.

A benchmark over half of a file would be a figure about something else, so nothing is skipped: the
first bad row ends the reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.artifacts.json_lines import COLUMNS, LINES, BadLine, columns, lines, reading
from specdec.errors import ConfigError

_ENDINGS = (*(f"{ending}.gz" for ending in LINES), *LINES, *COLUMNS)
_WORDS = {"line_too_long": "is too long", "not_utf8": "is not UTF-8", "broken_json": "is not JSON"}
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
    return path.name.endswith(_ENDINGS)


def stem(path: Path) -> str:
    """The file's name without its endings."""
    ending = next((end for end in _ENDINGS if path.name.endswith(end)), "")
    return path.name.removesuffix(ending)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file (also gzip) or a Parquet file, in their order.

    Raises:
        ConfigError: The file cannot be read, is cut off or damaged, or a line is no JSON object.
    """
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r}")
    if path.name.endswith(COLUMNS):
        yield from (Row(path, number, value) for number, value in columns(path))
        return
    with reading(path) as stream:
        for number, value in lines(path, stream):
            if isinstance(value, BadLine):
                words = f"{_WORDS[value.reason]}: {value.detail}"
                raise ConfigError(f"{path}, line {number} {words}")
            if not isinstance(value, dict):
                raise ConfigError(f"{path}, line {number} is no JSON object, but {shown(value)}")
            yield Row(path, number, value)
