"""Prompt lookup: copies what followed the latest, longest occurrence of the text's suffix.

Saxena 2023, "Prompt Lookup Decoding". Free, and strong wherever the answer repeats its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from specdec.drafters.row import RowDrafter, RowRound
from specdec.errors import ConfigError
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TokenTree
from specdec.sources.ngram_index import NgramIndex

_LONGEST = 64  # an n-gram; every length below it has an index of its own


@dataclass(frozen=True)
class PromptLookupConfig(MethodOptions):
    """Options of `prompt_lookup`."""

    max_ngram: Annotated[int, Range(1, _LONGEST, tries=(2, 3, 4, 6))] = 4
    """Longest suffix that is looked up."""
    min_ngram: Annotated[int, Range(1, _LONGEST, tries=(1, 2, 3))] = 1
    """Shortest suffix that is looked up."""
    num_draft_tokens: Annotated[int, Range(1, MAX_NODES, tries=(1, 2, 3, 5, 7, 10, 16, 24))] = 10
    """Most tokens copied after a match."""
    tokens_per_match: Annotated[int, Range(1, tries=(1, 2, 3, 5, 10))] = 3
    """Tokens copied per matched token: a longer match is trusted further."""

    def check(self) -> None:
        """The shortest suffix is no longer than the longest."""
        if self.min_ngram > self.max_ngram:
            raise ConfigError(
                f"min_ngram must be at most max_ngram, got {self.min_ngram} and {self.max_ngram}"
            )


class PromptLookup(RowDrafter):
    """One chain a round, from the row's own prompt and output."""

    Config = PromptLookupConfig
    source_names = ("prompt",)

    def __init__(self, config: PromptLookupConfig) -> None:
        super().__init__(config)
        self.max_nodes = config.num_draft_tokens
        self._config = config
        self._index: dict[int, NgramIndex] = {}

    def start_row(self, row: int, prompt: list[int]) -> None:
        """Indexes the prompt."""
        self._index[row] = NgramIndex(self._config.max_ngram, self._config.min_ngram)
        self._index[row].extend(prompt)

    def propose_row(self, row: int, history: list[int], budget: int) -> TokenTree:
        """The continuation of the match as a chain."""
        index = self._index[row]
        trusted = self._config.tokens_per_match * index.match()[1]
        paths = index.paths(min(budget, self._config.num_draft_tokens, trusted))
        return TokenTree.chain(history[-1], paths[0][0] if paths else [])

    def observe_row(self, row: int, outcome: RowRound) -> None:
        """Indexes the new text."""
        self._index[row].extend(outcome.tokens)
