"""The n-gram pool of Lookahead decoding (arXiv 2402.02057): first token -> followers, LRU."""

from __future__ import annotations

from collections.abc import Sequence


class NgramPool:
    """Keeps, for every key token, the most recently seen followers.

    Args:
        guesses: Followers kept for a key (G); the least recently seen one goes first.
    """

    def __init__(self, guesses: int) -> None:
        self._guesses = guesses
        self._followers: dict[int, dict[tuple[int, ...], int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._followers.values()))

    def add(self, key: int, followers: Sequence[int], origin: int = 0) -> None:
        """Stores `followers` under `key` as the newest entry, remembering where it came from."""
        entries = self._followers.setdefault(key, {})
        gram = tuple(followers)
        entries.pop(gram, None)
        entries[gram] = origin  # a dict keeps insertion order: the first entry is the oldest
        if len(entries) > self._guesses:
            # A kept pool may be shared by threads: copies are taken in one step, keys may be gone.
            for oldest in list(entries)[: len(entries) - self._guesses]:
                entries.pop(oldest, None)

    def add_with_tails(self, key: int, followers: Sequence[int], origin: int = 0) -> None:
        """Stores an n-gram and every shorter one that it ends with, down to two tokens."""
        self.add(key, followers, origin)
        for start in range(len(followers) - 1):
            self.add(followers[start], followers[start + 1 :], origin)

    def add_text(self, text: Sequence[int], ngram: int, start: int = 0, origin: int = 0) -> None:
        """Stores every n-gram of `text` whose last token is at `start` or later."""
        for end in range(max(start, ngram - 1), len(text)):
            self.add(text[end - ngram + 1], text[end - ngram + 2 : end + 1], origin)

    def guesses(self, key: int) -> list[tuple[tuple[int, ...], int]]:
        """(followers, origin) stored under `key`, newest first."""
        return list(self._followers.get(key, {}).items())[::-1]

    def paths(self, ids: Sequence[int]) -> list[tuple[list[int], float]]:
        """Continuations of the last token of `ids`, newest first, with a falling score."""
        found = self.guesses(ids[-1]) if ids else []
        return [(list(gram), -float(rank)) for rank, (gram, _) in enumerate(found)]
