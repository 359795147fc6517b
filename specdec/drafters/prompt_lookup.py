"""Prompt lookup: copies what followed the latest, longest occurrence of the text's suffix.

Saxena 2023, "Prompt Lookup Decoding". Free, and strong wherever the answer repeats its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from specdec.drafters.base import RowDrafter, RowRound
from specdec.errors import ConfigError
from specdec.sources.ngram_index import NgramIndex
from specdec.tree import MAX_NODES, TokenTree

_LONGEST = 64  # an n-gram; every length below it has an index of its own


@dataclass(frozen=True)
class PromptLookupConfig:
    """Options of `prompt_lookup`."""

    max_ngram: int = 4
    """Longest suffix that is looked up."""
    min_ngram: int = 1
    """Shortest suffix that is looked up."""
    num_draft_tokens: int = 10
    """Most tokens copied after a match."""
    tokens_per_match: int = 3
    """Tokens copied per matched token: a longer match is trusted further."""

    def __post_init__(self) -> None:
        """Checks the ranges; raises `ConfigError`."""
        if not 1 <= self.min_ngram <= self.max_ngram <= _LONGEST:
            raise ConfigError(
                f"prompt_lookup needs 1 <= min_ngram <= max_ngram <= {_LONGEST}, got min_ngram="
                f"{self.min_ngram}, max_ngram={self.max_ngram}"
            )
        if self.num_draft_tokens < 1 or self.tokens_per_match < 1:
            raise ConfigError(
                "prompt_lookup needs num_draft_tokens >= 1 and tokens_per_match >= 1, got "
                f"{self.num_draft_tokens} and {self.tokens_per_match}"
            )
        if self.num_draft_tokens > MAX_NODES:
            raise ConfigError(
                f"prompt_lookup takes num_draft_tokens up to {MAX_NODES}, got "
                f"{self.num_draft_tokens}"
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
