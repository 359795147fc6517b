"""A file of answers that grows row by row and survives being cut off anywhere.

Rows are JSON lines and are only ever appended; a last line without its end was cut off and is
dropped. A description beside the file says what it was made with, and another run may only go on
with the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from specdec.artifacts.append_file import BusyError, append, only_writer
from specdec.artifacts.atomic_files import replace_file
from specdec.errors import ConfigError

_MOST_META_BYTES = 2**20


class AnswerFile:
    """The file, opened for more rows.

    Attributes:
        path: A JSONL file, which this process alone may write.
        done: Ids of the rows in it.
    """

    def __init__(self, path: Path, stream: BinaryIO, done: set[str]) -> None:
        self.path, self.done = path, done
        self._stream = stream

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows that are not there yet, in order, and waits for the disk."""
        fresh = [row for row in rows if row["id"] not in self.done]
        if not fresh:
            return
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh)
        append(self._stream.fileno(), lines.encode("utf-8", "replace"))
        os.fsync(self._stream.fileno())
        self.done.update(row["id"] for row in fresh)


@contextmanager
def open_answers(path: Path, made_with: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """Opens the file of answers, a new one or one to go on with.

    Args:
        path: The JSONL file; its description is beside it, `answers.meta.json` for `answers.jsonl`.
        made_with: What decides the answers, as JSON values; compared with the description.

    Raises:
        ConfigError: The file was made with something else, by something else, is in use, is
            damaged, or cannot be written.
    """
    path = path.expanduser()
    described = path.with_suffix(".meta.json")
    _check_place(path, described)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream, only_writer(stream.fileno(), path):
            if not stream.seek(0, os.SEEK_END):
                text = json.dumps(made_with, indent=2, sort_keys=True) + "\n"
                replace_file(described, text.encode())
            elif described.is_file():
                _compare(described, made_with)
            else:
                raise ConfigError(
                    f"--output {str(path)!r} has rows and no {described.name} beside it; give a "
                    "new file"
                )
            yield AnswerFile(path, stream, _recover(stream, path))
    except BusyError as problem:
        hint = problem.hint
        raise ConfigError(f"--output {str(path)!r} is in use by another run{hint}") from problem
    except OSError as problem:
        reason = problem.strerror or problem
        raise ConfigError(f"cannot write --output {str(path)!r}: {reason}") from problem


def _check_place(path: Path, described: Path) -> None:
    if path.suffix != ".jsonl":
        raise ConfigError(f"--output {str(path)!r} must end in .jsonl")
    for one in (path, described):
        if one.is_symlink():
            raise ConfigError(f"--output: {str(one)!r} is a symbolic link; name the file itself")
        if one.is_dir():
            raise ConfigError(f"--output: {str(one)!r} is a folder; name a file")


def _compare(described: Path, made_with: Mapping[str, Any]) -> None:
    """Raises `ConfigError` that lists what differs."""
    try:
        if described.stat().st_size > _MOST_META_BYTES:
            raise ValueError("it is too large")
        before = json.loads(described.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("it is no object")
    except ValueError as problem:
        raise ConfigError(f"{str(described)!r} is damaged: {problem}; delete it") from problem
    wanted = json.loads(json.dumps(made_with))
    different = [
        f"{name} (there {before.get(name)!r}, now {wanted.get(name)!r})"
        for name in sorted(before.keys() | wanted.keys())
        if before.get(name) != wanted.get(name)
    ]
    if different:
        raise ConfigError(
            f"the answers in --output were made with other options: {', '.join(different)}; give "
            "the same ones, or another file"
        )


def _recover(stream: BinaryIO, path: Path) -> set[str]:
    """The ids of the whole rows; cuts a torn last line off."""
    done: set[str] = set()
    stream.seek(0)
    end = 0
    for number, line in enumerate(iter(stream.readline, b""), 1):
        if not line.endswith(b"\n"):
            break
        try:
            done.add(str(json.loads(line)["id"]))
        except (ValueError, KeyError, TypeError) as problem:
            raise ConfigError(
                f"line {number} of {str(path)!r} is damaged; delete the file, or the lines from "
                "there on"
            ) from problem
        end += len(line)
    stream.truncate(end)
    stream.seek(end)
    return done
