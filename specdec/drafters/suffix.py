"""Suffix decoding: what followed the text's suffix before, in this text and in stored ones.

Oliaro et al., "SuffixDecoding" (arXiv 2411.04975), on a suffix automaton as in SAM decoding (Hu et
al., arXiv 2411.10666). Free, like prompt lookup, but it knows every occurrence and how often each
continuation came. With a store it also knows what the model wrote in other calls.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from specdec.artifacts.tokenizers import tokenizer_fingerprint, tokenizer_in
from specdec.contracts import BatchState
from specdec.drafters.row import DraftRow, RowDrafter, RowRound
from specdec.errors import ConfigError
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TokenTree
from specdec.sources.suffix_draft import Limits, View, draft_tree
from specdec.sources.suffix_index import NO_MATCH, Match, SuffixIndex
from specdec.sources.suffix_store import SuffixStore, check_names

_FROM_TEXT, _FROM_STORE = 0, 1
_STORE_NOVELTY = 2.0  # other texts are less like this one; measured against 1 and 4
_STORE_CONTEXT = 64  # prompt tokens matched with the store; more would hardly change a draft


@dataclass(frozen=True)
class SuffixConfig(MethodOptions):
    """Options of `suffix`."""

    max_depth: Annotated[int, Range(1, MAX_NODES)] = 24
    """Deepest level of a tree."""
    max_nodes: Annotated[int, Range(1, MAX_NODES, tries=(2, 4, 7, 11, 16, 32, 64))] = 32
    """Most nodes of a tree."""
    nodes_per_match: Annotated[float, Range(0, MAX_NODES, tries=(0.5, 1.0, 2.0, 4.0, 8.0))] = 4.0
    """Nodes allowed per matched token: a longer match is trusted further."""
    extra_nodes: Annotated[int, Range(0, tries=(0, 1, 2, 4, 8))] = 4
    """Nodes allowed besides those."""
    min_probability: Annotated[float, Range(1e-6, 1, tries=(0.05, 0.1, 0.2, 0.35, 0.5, 0.7))] = 0.1
    """Least estimated probability of a node, the path to it included."""
    store: str | Path | None = None
    """Folder in which generated texts are kept for other calls and processes; none by default."""
    space: str = "default"
    """Part of the store; spaces share nothing."""
    tokenizer: Any = None
    """The model's tokenizer, or its fingerprint; a store needs it."""
    store_tokens: Annotated[int, Range(2)] = 200_000
    """Stored tokens held in memory, the newest."""
    store_update: bool = True
    """Whether the call's own texts are added to the store."""

    def check(self) -> None:
        """A store has a place and a tokenizer."""
        if self.store is not None and (not isinstance(self.store, str | Path) or not self.store):
            raise ConfigError(f"store must be the path of a folder, got {self.store!r}")
        if self.store is not None and self.tokenizer is None:
            raise ConfigError(
                "a store needs tokenizer=, the model's tokenizer or its fingerprint: stored token "
                "ids mean nothing without the tokenizer that made them"
            )
        fingerprint = self.tokenizer if isinstance(self.tokenizer, str) else "0" * 64
        check_names(self.space, fingerprint)
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            tokenizer_in(self.tokenizer)


class SuffixRow(DraftRow):
    """A row's own index, and where the row's end stands in those of the store."""

    def __init__(self, text: list[int], drafter: Suffix) -> None:
        super().__init__(text, drafter)
        self._store, self._index = drafter.store, SuffixIndex()
        self._index.extend(text)
        self._places: list[tuple[SuffixIndex, Match]] = []
        if self._store is not None:
            with self._store.locked():
                end = text[-_STORE_CONTEXT:]
                self._places = [(one, one.follow(NO_MATCH, end)) for one in self._store.indexes]

    def propose(self, budget: int) -> TokenTree:
        """The most probable continuations; one path where the target takes only chains."""
        config = self.config
        views = [View(self._index, self._index.match(), _FROM_TEXT)]
        views += [View(one, match, _FROM_STORE, _STORE_NOVELTY) for one, match in self._places]
        longest = max(view.match.length for view in views)
        allowed = int(config.nodes_per_match * longest) + config.extra_nodes
        limits = Limits(
            min(budget, config.max_nodes, allowed),
            config.max_depth,
            config.min_probability,
            self.drafter.chains_only,
        )
        with self._reading():
            tokens, parents, scores, sources = draft_tree(views, limits)
        return TokenTree([self.text[-1], *tokens], [-1, *parents], [0.0, *scores], [0, *sources])

    def observe(self, outcome: RowRound) -> None:
        """Indexes the new text and follows it in the store."""
        self._index.extend(outcome.tokens)
        with self._reading():
            self._places = [(one, one.follow(match, outcome.tokens)) for one, match in self._places]

    def _reading(self) -> AbstractContextManager[None]:
        return nullcontext() if self._store is None else self._store.locked()


class Suffix(RowDrafter):
    """One tree a round, from the row's own text and, if asked for, from the store."""

    Config, Row = SuffixConfig, SuffixRow
    source_names, size_option = ("text", "store"), "max_nodes"

    def __init__(self, config: SuffixConfig) -> None:
        super().__init__(config)
        self.store: SuffixStore | None = None

    def start(self, state: BatchState) -> None:
        """Begins a call; looks for what has been added to the store."""
        super().start(state)
        if self.config.store is not None:
            self.store = self._open_store(self.config.store, state.memory)
            self.store.refresh()

    def _open_store(self, folder: str | Path, memory: dict[str, Any]) -> SuffixStore:
        """The store and the fingerprint live as long as the augmented model: both take a while."""
        config, fingerprint = self.config, self.config.tokenizer
        if not isinstance(fingerprint, str):
            known = memory.get("suffix.tokenizer")
            if known is None or known[0] is not config.tokenizer:
                known = (config.tokenizer, tokenizer_fingerprint(config.tokenizer))
                memory["suffix.tokenizer"] = known
            fingerprint = known[1]
        where = (str(folder), config.space, fingerprint, config.store_tokens)
        store: SuffixStore = memory.setdefault(f"suffix.store {where}", SuffixStore(*where))
        return store

    def end(self, state: BatchState) -> None:
        """Adds what the rows emitted to the store; prompts stay out of it."""
        if self.store is not None and self.config.store_update:
            for tokens, prompt_length in zip(state.tokens, state.prompt_lengths, strict=True):
                self.store.add(tokens[prompt_length:])
