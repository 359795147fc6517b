"""Finds the latest occurrence of the longest suffix: the source behind prompt lookup.

Prompt lookup decoding is by Apoorv Saxena (2023). This index is incremental, prefers the longest
match and, among equals, the latest one.
"""

from __future__ import annotations

from collections.abc import Sequence


class NgramIndex:
    """Maps every n-gram of a growing text to the position after its latest occurrence.

    Args:
        max_ngram: Longest suffix to look up.
        min_ngram: Shortest suffix worth a draft.
    """

    def __init__(self, max_ngram: int, min_ngram: int = 1) -> None:
        self._sizes = range(min_ngram, max_ngram + 1)
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in self._sizes]
        self._text: list[int] = []
        self._indexed = 0  # n-grams that end before this position are in the tables

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens; the suffix itself is indexed only once something follows it."""
        self._text.extend(tokens)
        for end in range(self._indexed + 1, len(self._text)):
            for size, ends in zip(self._sizes, self._ends, strict=True):
                if size <= end:
                    ends[tuple(self._text[end - size : end])] = end
        self._indexed = max(len(self._text) - 1, self._indexed)

    def match(self) -> tuple[int, int]:
        """(position after the match, matched length) of the longest suffix; length 0 if none."""
        text = self._text
        for size, ends in zip(reversed(self._sizes), reversed(self._ends), strict=True):
            if size <= len(text):
                end = ends.get(tuple(text[len(text) - size :]))
                if end is not None:
                    return end, size
        return 0, 0

    def paths(self, count: int) -> list[tuple[list[int], float]]:
        """At most one path: up to `count` tokens that followed the match, scored by its length.

        A match that runs into the end of the text goes on periodically.
        """
        end, size = self.match()
        if not size or count <= 0:
            return []
        period = len(self._text) - end
        tokens = [self._text[end + offset % period] for offset in range(count)]
        return [(tokens, float(size))]
