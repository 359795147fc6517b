"""The folders of the suffix store: made for their user alone, and refused where others may write.

Knows nothing about what is kept in them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

_OTHERS_WRITE = 0o022  # the group, everybody


class StoreError(OSError):
    """The store cannot be used: a damaged file, or a folder that others could write to."""


def open_folder(folder: Path, space: str, fingerprint: str) -> Path:
    """The folder of a space and a tokenizer, made with mode 0700 where it is missing.

    The store's own folder and the two below it must be the user's and nobody else's to write to;
    those above it need only keep others from putting another folder in its place. They may be
    links, as a system's folder of temporary files often is.

    Raises:
        OSError: It cannot be made.
        StoreError: A folder of the store is a symbolic link, belongs to another user, or somebody
            else may write to it.
    """
    for above in reversed(folder.parents):
        if not above.exists():
            _make(above)
    _check_above(folder.parent)
    for place in (folder, folder / space, folder / space / fingerprint):
        _make(place)
        _check_own(place)
    return folder / space / fingerprint


def _make(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):  # whatever it is, the checks see it
        folder.mkdir(mode=0o700)


def _check_own(folder: Path) -> None:
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise StoreError(f"{folder} is a symbolic link, which a store does not follow")
    if not stat.S_ISDIR(found.st_mode):
        raise StoreError(f"{folder} is not a folder")
    if os.name != "posix":
        return
    if found.st_uid != os.geteuid():
        raise StoreError(f"{folder} belongs to somebody else (user {found.st_uid})")
    if found.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(found.st_mode)
        raise StoreError(
            f"{folder} can be written by somebody else (mode {mode:04o}); chmod go-w mends that"
        )


def _check_above(folder: Path) -> None:
    if os.name != "posix":
        return
    resolved = folder.resolve()
    for place in (resolved, *resolved.parents):
        mode = place.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # sticky: names are safe, as in /tmp
            raise StoreError(
                f"{place}, above the store, can be written by everybody (mode "
                f"{stat.S_IMODE(mode):04o}); chmod o-w or o+t mends that"
            )
