"""Prompt lookup: copies what followed the latest, longest occurrence of the text's suffix.

Saxena 2023, "Prompt Lookup Decoding". Free, and strong wherever the answer repeats its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from specdec.drafters.row import DraftRow, RowDrafter, RowRound
from specdec.errors import ConfigError
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TokenTree
from specdec.sources.ngram_index import NgramIndex


@dataclass(frozen=True)
class PromptLookupConfig(MethodOptions):
    """Options of `prompt_lookup`."""

    max_ngram: Annotated[int, Range(1, 64, tries=(2, 3, 4, 6))] = 4
    """Longest suffix that is looked up."""
    min_ngram: Annotated[int, Range(1, 64, tries=(1, 2, 3))] = 1
    """Shortest suffix that is looked up."""
    num_draft_tokens: Annotated[int, Range(1, MAX_NODES, tries=(1, 2, 3, 5, 7, 10, 16, 24))] = 10
    """Most tokens copied after a match."""
    tokens_per_match: Annotated[int, Range(1, tries=(1, 2, 3, 5, 10))] = 3
    """Tokens copied per matched token: a longer match is trusted further."""

    def check(self) -> None:
        """The shortest suffix is no longer than the longest."""
        if self.min_ngram > self.max_ngram:
            sizes = f"{self.min_ngram} and {self.max_ngram}"
            raise ConfigError(f"min_ngram must be at most max_ngram, got {sizes}")


class _Row(DraftRow):
    def __init__(self, text: list[int], drafter: PromptLookup) -> None:
        super().__init__(text, drafter)
        self._index = NgramIndex(self.config.max_ngram, self.config.min_ngram)
        self._index.extend(text)

    def propose(self, budget: int) -> TokenTree:
        """The continuation of the match as a chain."""
        trusted = self.config.tokens_per_match * self._index.match()[1]
        paths = self._index.paths(min(budget, self.config.num_draft_tokens, trusted))
        return TokenTree.chain(self.text[-1], paths[0][0] if paths else [])

    def observe(self, outcome: RowRound) -> None:
        """Indexes the new text."""
        self._index.extend(outcome.tokens)


class PromptLookup(RowDrafter):
    """One chain a round, from the row's own prompt and output."""

    Config, Row = PromptLookupConfig, _Row
    source_names, size_option = ("prompt",), "num_draft_tokens"
