"""The opt-in store of generated texts, across calls and processes, as suffix indexes in memory.

On disk a store is a folder; in it, for each space and tokenizer, one file per process
(`suffix_segments`). In memory it is two suffix automata, a young and an old one: when the young one
holds half of the tokens, the old one is dropped and the young one takes its place. So the newest
texts stay and nothing is ever taken out of an automaton.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from specdec.errors import ConfigError
from specdec.sources.store_folder import open_folder
from specdec.sources.suffix_index import NO_MATCH, SuffixIndex
from specdec.sources.suffix_segments import Reader, Writer

_SPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class StoreWarning(UserWarning):
    """A store, or a file of it, is not used; generation goes on without it."""


def check_names(space: str, fingerprint: str) -> None:
    """Raises `ConfigError` for a space or a fingerprint that may not become a folder's name."""
    if not isinstance(space, str) or not _SPACE.fullmatch(space) or ".." in space:
        raise ConfigError(
            "space must be a name of up to 64 letters, digits, '-', '_' and single '.', beginning "
            f"with a letter or digit, got {space!r:.100}"
        )
    if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
        raise ConfigError(
            "a tokenizer's fingerprint has 64 hexadecimal digits, as tokenizer_fingerprint() gives "
            f"them, got {fingerprint!r:.100}"
        )


class SuffixStore:
    """Texts that other calls and processes generated.

    Whatever goes wrong on disk is one `StoreWarning`; after a failure of the folder or of a write,
    the store stays as it is for the rest of the process. Threads may share a store: hold `locked()`
    while reading the indexes. A forked child begins anew, with a file of its own.

    Args:
        folder: Where; made with mode 0700 when missing.
        space: Name of the part of the store; spaces share nothing.
        fingerprint: The tokenizer's, for ids mean nothing without it.
        limit: Tokens held in memory; between half of it and all, the newest.

    Raises:
        ConfigError: A name or the limit is out of range.
    """

    def __init__(
        self, folder: str | Path, space: str, fingerprint: str, limit: int = 200_000
    ) -> None:
        check_names(space, fingerprint)
        if limit < 2:
            raise ConfigError(f"a store holds at least 2 tokens, got a limit of {limit}")
        self._folder, self._space, self._fingerprint = Path(folder), space, fingerprint
        self._limit = limit
        self._begin()

    def __reduce__(self) -> tuple[type[SuffixStore], tuple[Path, str, str, int]]:
        """A copy is another reader and writer of the same folder."""
        return SuffixStore, (self._folder, self._space, self._fingerprint, self._limit)

    def __len__(self) -> int:
        """Tokens held in memory."""
        return sum(map(len, self.indexes))

    @property
    def indexes(self) -> tuple[SuffixIndex, SuffixIndex]:
        """The young and the old index; hold `locked()` while looking into them."""
        return self._young, self._old

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other threads from changing the indexes."""
        if os.getpid() != self._pid:
            self._begin()  # the lock may have been copied while another thread held it
        with self._lock:
            yield

    def refresh(self) -> None:
        """Indexes what all processes have added since the last time."""
        self._attempt(self._load)

    def add(self, tokens: Sequence[int]) -> None:
        """Writes one generated text, unless the young index already holds all of it."""
        if len(tokens) > 1:
            self._attempt(lambda problems: self._append(tokens, problems))

    def _begin(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._young, self._old = SuffixIndex(), SuffixIndex()
        self._opened: tuple[Reader, Writer] | None = None
        self._place: Path | None = None  # where the folder lies, from the first use on
        self._is_off = False

    def _attempt(self, work: Callable[[list[str]], None]) -> None:
        """Works on the files; problems become warnings, and a failure switches the store off."""
        problems: list[str] = []
        with self.locked():
            if self._is_off:
                return
            try:
                work(problems)
            except (OSError, ValueError, RuntimeError) as failure:  # also from odd folder names
                self._is_off = True
                problems.append(f"{failure}; the store is off for the rest of this process")
        for problem in problems:
            warnings.warn(f"suffix store: {problem}", StoreWarning, stacklevel=3)

    def _append(self, tokens: Sequence[int], problems: list[str]) -> None:
        newest = tokens[-(self._limit // 2) :]  # all that the young index takes of a text
        if self._young.follow(NO_MATCH, newest).length < len(newest):
            self._files()[1].append(newest)
            self._load(problems)

    def _files(self) -> tuple[Reader, Writer]:
        """Reader and writer; the folders are looked at every time, for their modes may change."""
        if self._place is None:
            self._place = self._folder.expanduser().absolute()
        folder = open_folder(self._place, self._space, self._fingerprint)
        if self._opened is None:
            self._opened = (
                Reader(folder, self._fingerprint),
                Writer(folder, self._fingerprint, self._limit),
            )
        return self._opened

    def _load(self, problems: list[str]) -> None:
        texts, found = self._files()[0].new_texts(self._limit)
        problems.extend(found)
        for text in texts:
            newest = text[-(self._limit // 2) :].tolist()
            if len(self._young) + len(newest) > self._limit // 2:
                self._young, self._old = SuffixIndex(), self._young
            self._young.extend(newest)
            self._young.separate()
