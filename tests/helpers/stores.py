"""Suffix stores in temporary folders, and what they hold."""

from __future__ import annotations

import warnings
from pathlib import Path

from specdec.sources.suffix_index import NO_MATCH
from specdec.sources.suffix_store import StoreWarning, SuffixStore

KEY = "a" * 64


def store_in(folder: Path, limit: int = 200_000, key: str = KEY, space: str = "s") -> SuffixStore:
    return SuffixStore(folder, space, key, limit)


def holds(store: SuffixStore, text: list[int]) -> bool:
    return any(index.follow(NO_MATCH, text).length == len(text) for index in store.indexes)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def refresh_with_warning(store: SuffixStore) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        store.refresh()
    return [str(warning.message) for warning in seen if warning.category is StoreWarning]
