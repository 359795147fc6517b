"""One progress bar at a time for what `datasets` does, instead of one for each of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from tqdm import tqdm

_PATIENCE = 2.0  # seconds of work that need no bar


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keeps the bars of `datasets` from showing, and leaves its setting as it was."""
    was_quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_quiet:
            datasets.enable_progress_bars()


def row_bar(what: str, rows: Iterable[Any] | None = None, total: int | None = None) -> Any:
    """A bar that counts rows, and appears only when there is something to wait for."""
    return tqdm(rows, total=total, desc=what, unit="row", delay=_PATIENCE, dynamic_ncols=True)
