"""A folder that is whole or not there: written beside its place, flushed, renamed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from specdec.artifacts.atomic_files import flush_folder


@contextlib.contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """An empty folder that takes the name `place` when the block ends well.

    What had that name before goes last. A folder takes two renames to replace: killed between them,
    a process leaves the older one as `.NAME.PROCESS.old`.

    Args:
        place: May be there; callers look first at what they replace.

    Raises:
        OSError: It cannot be written. What was there is untouched, and nothing else is left.
    """
    new, old = (place.with_name(f".{place.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)  # of a killed process of this number
        new.mkdir()
        yield new
        _flush(new)
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        new.rename(place)
        flush_folder(place.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if not place.exists() and old.exists():
            with contextlib.suppress(OSError):
                old.rename(place)
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Waits for the disk: a name must not outlive a crash without what it stands for."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            flush_folder(path)
            continue
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
