"""Which commit measured or trained something."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SECONDS = 10


def source_revision(file: Path) -> str | None:
    """The git commit of a source file's checkout, with "+changes"; None when it is in none."""
    folder = file.resolve().parent
    head = _git(folder, "rev-parse", "HEAD")
    # A file that git does not know lies in somebody else's checkout, as a virtual environment may.
    if head is None or _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changes else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - fixed words, no shell
            ["git", "-C", str(folder), *words],  # noqa: S607 - the user's own git
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
