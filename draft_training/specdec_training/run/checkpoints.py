"""Checkpoints of a training run that are whole or not there, whenever the process is killed.

A checkpoint is a folder `step-00000040` with one safetensors file for each part, `state.json`, and
`COMPLETE.json` with the size and SHA-256 of all of them, which is written last. It comes into being
as `.tmp-40-<process>`, is flushed to the disk and then renamed. Knows nothing about training.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.artifacts.atomic_files import (
    FULL,
    Digest,
    digest_of,
    flush_folder,
    from_json,
    is_running,
    make_folder,
    read_small,
    size_text,
    to_json,
    write_new,
)
from specdec.artifacts.tensor_files import check_tensors, read_tensors, write_tensors
from specdec.errors import ConfigError, SpecdecError

_FORMAT, _VERSION = "specdec-checkpoint", 1
_MARKER, _STATE = "COMPLETE.json", "state.json"
_MOST_MARKER_BYTES, _MOST_STATE_BYTES = 1 << 20, 64 << 20
_MOST_STEP = 10**15
_PART = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_FILE = re.compile(r"([a-z0-9][a-z0-9_-]{0,63})\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A checkpoint that is being replaced by another one of the same step is `.old-` for a moment.
_FOLDER = re.compile(r"(step|\.old)-(\d{8,16})")
_TEMPORARY = re.compile(r"\.tmp-\d{1,16}-(\d{1,10})")


class CheckpointError(SpecdecError):
    """A checkpoint cannot be written, or what is there cannot be read."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over for an older one."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found whole.

    Attributes:
        step: Of the training run.
        state: What was saved as `state`; tuples have become lists.
    """

    folder: Path
    step: int
    state: dict[str, Any] = field(repr=False)
    _files: dict[str, Digest] = field(repr=False)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names that `tensors` takes."""
        return tuple(name.removesuffix(".safetensors") for name in self._files if name != _STATE)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, bit for bit as they were saved, on the CPU.

        Raises:
            CheckpointError: There is no such part, or it is damaged since it was checked.
        """
        if name not in self.parts:
            raise CheckpointError(
                f"checkpoint {self.folder} has no part {name!r:.80}, only {', '.join(self.parts)}"
            )
        try:
            return read_tensors(self.folder / f"{name}.safetensors")
        except SpecdecError as problem:
            raise CheckpointError(str(problem)) from problem


class CheckpointStore:
    """The checkpoints of one run, in a folder that nobody else writes to (see `RunLock`).

    Args:
        folder: Made at the first save.
        keep: Newest checkpoints that stay; the others go once a newer one is whole.

    Raises:
        ConfigError: `keep` is below 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ConfigError(f"keep must be at least 1 checkpoint, got {keep}")
        self._folder, self._keep = Path(folder), keep

    def save(
        self, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Path:
        """Writes a checkpoint; when this returns, it survives a kill and a loss of power.

        Args:
            step: Of the training run; a checkpoint of the same step is replaced.
            files: Name of a part -> its tensors, of any type and device.
            state: Plain values beside the tensors, kept as JSON.

        Returns:
            The checkpoint's folder.

        Raises:
            ConfigError: A name or a value cannot be saved.
            CheckpointError: The disk is full or cannot be written, or there is a whole checkpoint
                of a later step. All checkpoints that were there are untouched.
        """
        text, needed = _check(step, files, state)
        temporary = self._folder / f".tmp-{step}-{os.getpid()}"
        try:
            make_folder(self._folder)
            self._remove_leftovers()
            self._refuse_later(step)
            self._refuse_without_room(step, needed)
            try:
                _write(temporary, step, files, text)
                final = self._put(temporary, step)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as problem:
            raise self._failure(step, needed, problem) from problem
        self._rotate(step)
        return final

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that could be a checkpoint, not even a damaged one.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        return not self._found()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are all whole, or None when there is none.

        Damaged ones are passed over with a `CheckpointWarning` that says what was wrong.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        damaged = False
        for step, folder in self._found():
            try:
                found = _read(folder, step)
            except (OSError, ValueError) as problem:
                damaged = True
                reason = getattr(problem, "strerror", None) or problem
                warnings.warn(
                    f"checkpoint {folder} is damaged and passed over: {reason}",
                    CheckpointWarning,
                    stacklevel=2,
                )
                continue
            if damaged:
                warnings.warn(
                    f"going on from the older checkpoint {folder}", CheckpointWarning, stacklevel=2
                )
            return found
        return None

    def _found(self) -> list[tuple[int, Path]]:
        """(step, folder) of all that are named like checkpoints, the newest first."""
        try:
            names = sorted(path.name for path in self._folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as problem:
            raise CheckpointError(f"cannot read {self._folder}: {problem.strerror}") from problem
        matches = [found for found in map(_FOLDER.fullmatch, names) if found]
        # Of the same step, the one that replaces the other comes first.
        ordered = sorted(matches, key=lambda found: (int(found[2]), found[1]), reverse=True)
        return [(int(found[2]), self._folder / found[0]) for found in ordered]

    def _remove_leftovers(self) -> None:
        """Removes what dead processes left half written, and this one at an earlier attempt."""
        for path in self._folder.iterdir():
            found = _TEMPORARY.fullmatch(path.name)
            if found and (int(found[1]) == os.getpid() or not is_running(int(found[1]))):
                _remove(path)

    def _refuse_later(self, step: int) -> None:
        """A later checkpoint would be taken at the next start, and this one in vain."""
        for later, folder in self._found():
            if later <= step:
                return
            try:
                _read(folder, later)
            except (OSError, ValueError):
                continue  # damaged: `_rotate` removes it
            raise CheckpointError(
                f"cannot save step {step}: {folder} is later and whole. It is of another run or "
                "course of training; delete it, or save to another folder"
            )

    def _refuse_without_room(self, step: int, needed: int) -> None:
        if shutil.disk_usage(self._folder).free < needed:
            raise self._failure(step, needed, OSError(FULL[0], os.strerror(FULL[0])))

    def _failure(self, step: int, needed: int, problem: OSError) -> CheckpointError:
        text = f"cannot save step {step} in {self._folder}: {problem.strerror or problem}"
        if problem.errno in FULL:
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self._folder).free
                text += f"; it needs {size_text(needed)}, {size_text(free)} are free"
            text += ". Make room, or lift the quota"
        return CheckpointError(f"{text}. The checkpoints that are there are untouched")

    def _put(self, temporary: Path, step: int) -> Path:
        """Gives a complete checkpoint its name; one of the same step makes way for it."""
        final = self._folder / f"step-{step:08d}"
        aside = self._folder / f".old-{step:08d}"
        if os.path.lexists(final):
            _remove(aside)
            final.rename(aside)  # `latest` finds it there, should this process end here
        temporary.rename(final)
        flush_folder(self._folder)
        return final

    def _rotate(self, step: int) -> None:
        """Removes the checkpoints beyond `keep`, and damaged ones of later steps."""
        kept = 0
        for found, folder in self._found():
            is_whole = found <= step and folder.name.startswith("step") and _is_marked(folder)
            if is_whole and kept < self._keep:
                kept += 1
            else:
                _remove(folder)


def _check(
    step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> tuple[bytes, int]:
    """(the state as JSON, bytes of the whole checkpoint) or the reason why it cannot be saved."""
    if type(step) is not int or not 0 <= step < _MOST_STEP:
        raise ConfigError(f"step must be a whole number from 0 on, got {step!r:.60}")
    text = to_json(state, "state")
    if len(text) > _MOST_STATE_BYTES:
        raise ConfigError(
            f"state takes {size_text(len(text))} as JSON, more than "
            f"{size_text(_MOST_STATE_BYTES)}; save what is large as tensors"
        )
    needed = len(text)
    for name, tensors in files.items():
        if type(name) is not str or not _PART.fullmatch(name):
            raise ConfigError(
                "a part of a checkpoint is named with up to 64 small letters, digits, '-' and '_', "
                f"got {name!r:.80}"
            )
        needed += check_tensors(tensors, name)
    return text, needed


def _write(
    folder: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state: bytes
) -> None:
    """Writes a whole checkpoint, its marker last, and flushes everything."""
    folder.mkdir()
    found = {_STATE: write_new(folder / _STATE, [state])}
    for name, tensors in files.items():
        found[f"{name}.safetensors"] = write_tensors(folder / f"{name}.safetensors", tensors)
    flush_folder(folder)
    write_new(folder / _MARKER, [_marker(step, found)])
    flush_folder(folder)


def _marker(step: int, files: Mapping[str, Digest]) -> bytes:
    listed = {name: {"bytes": d.size, "sha256": d.sha256} for name, d in files.items()}
    content = {"format": _FORMAT, "version": _VERSION, "step": step, "files": listed}
    return to_json(content, _MARKER)


def _read(folder: Path, step: int) -> Checkpoint:
    """The checkpoint in a folder; raises `OSError` or `ValueError` unless every byte is right."""
    files = _read_marker(folder, step)
    for name, wanted in files.items():
        path = folder / name
        size = path.lstat().st_size  # at once, where hashing takes minutes
        if size != wanted.size:
            raise ValueError(f"{name} has {size:,} bytes instead of {wanted.size:,}")
    for name, wanted in files.items():
        if digest_of(folder / name) != wanted:
            raise ValueError(f"{name} does not have the hash that it had when it was written")
    state = from_json(read_small(folder / _STATE, _MOST_STATE_BYTES))
    return Checkpoint(folder, step, state, files)


def _read_marker(folder: Path, step: int) -> dict[str, Digest]:
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise ValueError("it is no folder, or a symbolic link")
    try:
        text = read_small(folder / _MARKER, _MOST_MARKER_BYTES)
        content = from_json(text)
    except FileNotFoundError:
        raise ValueError(f"there is no {_MARKER}, so it was never finished") from None
    except (OSError, ValueError) as problem:
        raise ValueError(f"{_MARKER}: {getattr(problem, 'strerror', None) or problem}") from None
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise ValueError(f"{_MARKER} is not of a checkpoint that this release writes")
    files = dict(_listed(content.get("files")))
    if _marker(step, files) != text:  # any other byte is damage, too
        raise ValueError(f"{_MARKER} is not as it was written for step {step}")
    return files


def _listed(files: Any) -> Iterator[tuple[str, Digest]]:
    if not isinstance(files, dict) or _STATE not in files:
        raise ValueError(f"{_MARKER} lists no {_STATE}")
    for name, facts in files.items():
        if name != _STATE and not _FILE.fullmatch(name):
            raise ValueError(f"{_MARKER} lists a file {name!r:.80}, which is no checkpoint's")
        size, sha256 = (
            (facts.get("bytes"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        )
        if type(size) is not int or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"{_MARKER} says nothing usable about {name}")
        yield name, Digest(size, sha256)


def _is_marked(folder: Path) -> bool:
    """Whether a folder has the marker; says nothing about its files."""
    return not folder.is_symlink() and (folder / _MARKER).is_file()


def _remove(path: Path) -> None:
    """Removes a folder, or a file or link in its place, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        # First of all the marker: what is left of a checkpoint must not look like one.
        with contextlib.suppress(OSError):
            (path / _MARKER).unlink()
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
