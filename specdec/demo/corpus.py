"""The demo target's training text: the Python standard library of the running interpreter.

It is on every machine, its licence (PSF-2.0) allows it, and code is what prompt n-grams are good
at. Whole modules are held out by name, so that evaluation prompts were never trained on.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_MODULES = frozenset({
    "bisect", "calendar", "colorsys", "csv", "difflib", "fractions", "graphlib", "heapq",
    "json", "queue", "sched", "shlex", "statistics", "string", "textwrap", "wave",
})  # fmt: skip
"""Standard-library modules (with their tests) that the demo target never saw."""

_SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "encodings", "config"})
_MAX_FILE_BYTES = 400_000  # larger ones are generated tables


def stdlib_path() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relative: Path) -> bool:
    """Whether a file (path relative to the standard library) belongs to a held-out module."""
    names = {part.removesuffix(".py") for part in relative.parts}
    return bool(names & HELD_OUT_MODULES) or any(
        name.startswith("test_") and name.removeprefix("test_") in HELD_OUT_MODULES
        for name in names
    )


def _source_files(held_out: bool) -> Iterator[Path]:
    root = stdlib_path()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skipped = any(
            part in _SKIPPED_FOLDERS or part.startswith("config-") for part in relative.parts
        )
        readable = not skipped and path.stat().st_size <= _MAX_FILE_BYTES
        if readable and is_held_out(relative) == held_out:
            yield path


def read_sources(held_out: bool = False) -> list[str]:
    """Source texts of the training modules, or of the held-out ones, in a fixed order.

    Files that are not valid UTF-8 or nearly empty are left out.
    """
    texts = []
    for path in _source_files(held_out):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= 100:
            texts.append(text)
    return texts


def fingerprint(texts: list[str]) -> str:
    """SHA-256 over the texts in order: says whether two builds saw the same corpus."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()
