"""Which methods can be replayed, and two that exist for replay only.

A recorded answer says what the target wrote and nothing else: not what it would have written after
a rejected draft, nor what it nearly wrote. So only methods that draft from text can be replayed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from specdec.contracts import Needs
from specdec.drafters.row import DraftRow, RowDrafter, RowRound
from specdec.errors import ConfigError
from specdec.loading import method_options
from specdec.registry import methods
from specdec.round.tree import MAX_NODES, TokenTree
from specdec.sources.ngram_index import NgramIndex
from specdec.sources.ngram_pool import NgramPool

DEFAULT = ("prompt_lookup", "suffix")
SPACE = "replay"
"""Part of a suffix store that replays use."""
_STORE = "+store"
_WHY_NOT: Mapping[str, str] = {
    "none": "it drafts nothing: one token a step",
    "lookahead": "its window guesses with what the target says at places that no answer records; "
    "ngram_pool replays the pool alone",
    "jacobi": "it guesses with what the target says at places that no answer records",
    "recycling": "it needs the target's next best candidates, which no answer records",
    "draft_model": "it needs forwards of a model",
    "eagle3": "it needs forwards of a model",
}
_REFUSED = ("store", "store_update", "space", "tokenizer")


@dataclass(frozen=True)
class TextbookLookupConfig:
    """Options of `textbook_lookup`."""

    max_ngram: int = 3
    """Longest suffix that is looked up."""
    num_draft_tokens: int = 10
    """Most tokens copied after a match."""

    def __post_init__(self) -> None:
        """Checks the ranges; raises `ConfigError`."""
        if self.max_ngram < 1 or not 1 <= self.num_draft_tokens <= MAX_NODES:
            raise ConfigError(
                f"textbook_lookup needs max_ngram >= 1 and num_draft_tokens from 1 to {MAX_NODES}, "
                f"got {self.max_ngram} and {self.num_draft_tokens}"
            )


class TextbookLookup(RowDrafter):
    """Prompt lookup as published: copies a fixed number of tokens, and ends where the text ends.

    specdec's own goes on periodically there, and copies more after a longer match.
    """

    Config = TextbookLookupConfig
    size_option = "num_draft_tokens"

    class Row(DraftRow):
        """An index of the row's text."""

        def __init__(self, text: list[int], drafter: RowDrafter) -> None:
            super().__init__(text, drafter)
            self._index = NgramIndex(self.config.max_ngram)
            self._index.extend(text)

        def propose(self, budget: int) -> TokenTree:
            """What followed the latest occurrence of the longest suffix."""
            end, size = self._index.match()
            most = min(budget, self.config.num_draft_tokens)
            return TokenTree.chain(self.text[-1], self.text[end : end + most] if size else [])

        def observe(self, outcome: RowRound) -> None:
            """Indexes the new text."""
            self._index.extend(outcome.tokens)


@dataclass(frozen=True)
class NgramPoolConfig:
    """Options of `ngram_pool`."""

    ngram: int = 5
    """Tokens of an n-gram, its key included."""
    guesses: int = 7
    """n-grams kept for a key, and verified."""

    @property
    def nodes(self) -> int:
        """Nodes of a full tree below the root."""
        return self.guesses * (self.ngram - 1)

    def __post_init__(self) -> None:
        """Checks the ranges; raises `ConfigError`."""
        if self.ngram < 2 or not 1 <= self.guesses <= MAX_NODES // self.ngram:
            raise ConfigError(
                f"ngram_pool needs ngram >= 2, guesses >= 1 and ngram x guesses up to {MAX_NODES}, "
                f"got {self.ngram} and {self.guesses}"
            )


class TextPool(RowDrafter):
    """Lookahead's n-gram pool, filled from text only: what its window adds comes on top."""

    Config = NgramPoolConfig

    class Row(DraftRow):
        """A pool of the row's text."""

        def __init__(self, text: list[int], drafter: RowDrafter) -> None:
            super().__init__(text, drafter)
            self._pool = NgramPool(self.config.guesses)
            self._pool.add_text(text, self.config.ngram)

        def propose(self, budget: int) -> TokenTree:
            """The pool's guesses as a tree."""
            return TokenTree.merge(self.text[-1], [path for path, _ in self._pool.paths(self.text)])

        def observe(self, outcome: RowRound) -> None:
            """Adds the new text's n-grams."""
            new_from = len(self.text) - len(outcome.tokens)
            self._pool.add_text(self.text, self.config.ngram, start=new_from)


_OWN: Mapping[str, tuple[type[Any], Callable[[Any], RowDrafter]]] = {
    "textbook_lookup": (TextbookLookupConfig, TextbookLookup),
    "ngram_pool": (NgramPoolConfig, TextPool),
}


@dataclass(frozen=True)
class ReplayMethod:
    """A method that can be replayed.

    Attributes:
        name: As the user wrote it.
        method: Name of the method.
        options: Its options, checked.
        budget: Nodes a round may hold; None for the method's own size.
        store: A suffix store is filled from the answers to other prompts.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None
    store: bool = False

    def create(self, store: Path | None = None, fingerprint: str = "") -> RowDrafter:
        """A fresh drafter for one answer.

        Args:
            store: Folder of the store, where there is one.
            fingerprint: Of the tokenizer.
        """
        if self.method in _OWN:
            config_class, drafter_class = _OWN[self.method]
            return drafter_class(config_class(**self.options))
        options = dict(self.options)
        if store is not None:
            options |= {"store": store, "space": SPACE, "tokenizer": fingerprint}
            options["store_update"] = False  # replay adds answers when their prompt is done
        drafter = methods.create(self.method, options)
        if not isinstance(drafter, RowDrafter) or drafter.needs != Needs():
            reason = _WHY_NOT.get(self.method, "it reads more from the target than its text")
            raise ConfigError(f"method {self.method!r} cannot be replayed: {reason}")
        return drafter


def config_of(method: ReplayMethod) -> Any:
    """The options of a method with its defaults filled in."""
    if method.method in _OWN:
        return _OWN[method.method][0](**method.options)
    return methods.configure(method.method, dict(method.options))


def parse_methods(
    specs: Sequence[str], ngram: int | None = None, draft: int | None = None
) -> list[ReplayMethod]:
    """Reads `prompt_lookup:max_ngram=3`, `suffix+store` and the like; commas may join several.

    Args:
        specs: As the user wrote them; empty for the default.
        ngram: Longest suffix for the lookup methods, where their own options do not say.
        draft: Tokens that these copy, however short the match.

    Raises:
        ConfigError: A method is unknown, cannot be replayed (says why), or an option is wrong.
    """
    # A comma begins a new method, unless what follows is one more option.
    parts = [part for spec in specs or DEFAULT for part in re.split(r",(?![^,:]*=)", spec)]
    found = [_parse("".join(part.split())) for part in parts]
    if ngram is not None or draft is not None:
        if not any(one.method in _LOOKUPS for one in found):
            raise ConfigError(f"--ngram and --draft are for {' and '.join(_LOOKUPS)}")
        found = [_with_sizes(one, ngram, draft) for one in found]
    names = [one.name for one in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"method {twice[0]!r} is named twice")
    return found


_LOOKUPS = ("prompt_lookup", "textbook_lookup")


def _with_sizes(one: ReplayMethod, ngram: int | None, draft: int | None) -> ReplayMethod:
    if one.method not in _LOOKUPS:
        return one
    sizes: dict[str, Any] = {} if ngram is None else {"max_ngram": ngram}
    if draft is not None:
        sizes["num_draft_tokens"] = draft
        if one.method == "prompt_lookup":
            sizes["tokens_per_match"] = draft
    changed = replace(one, options={**sizes, **one.options})
    changed.create()  # checks the ranges
    return changed


def _parse(name: str) -> ReplayMethod:
    method, _, rest = name.partition(":")
    pairs = tuple(pair for pair in rest.split(",") if pair)
    budgets = [pair.partition("=")[2] for pair in pairs if pair.startswith("budget=")]
    pairs = tuple(pair for pair in pairs if not pair.startswith("budget="))
    if budgets and not (budgets[-1].isdecimal() and 1 <= int(budgets[-1]) <= MAX_NODES):
        raise ConfigError(f"method {name!r}: budget must be from 1 to {MAX_NODES}")
    store = method.endswith(_STORE)
    method = method.removesuffix(_STORE)
    if store and method != "suffix":
        raise ConfigError(f"method {name!r}: only suffix has a store")
    found = ReplayMethod(
        name, method, _options(name, method, pairs), int(budgets[-1]) if budgets else None, store
    )
    found.create()  # checks ranges, and whether it can be replayed
    return found


def _options(name: str, method: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    if method in _OWN:
        return _own_options(name, method, pairs)
    if method not in methods.names():
        known = [m for m in methods.names() if m not in _WHY_NOT]
        raise ConfigError(
            f"unknown method {method!r}; those that can be replayed are "
            f"{', '.join([*known, f'suffix{_STORE}', *_OWN])}"
        )
    if method in _WHY_NOT:
        raise ConfigError(f"method {method!r} cannot be replayed: {_WHY_NOT[method]}")
    kept = [pair for pair in pairs if pair.partition("=")[0].replace("-", "_") in _REFUSED]
    if kept:
        raise ConfigError(
            f"method {name!r}: {kept[0]} would let it see its own answer; suffix+store fills a "
            "store from the answers to other prompts"
        )
    try:
        return method_options(method, pairs)
    except ConfigError as problem:
        raise ConfigError(f"method {name!r}: {problem}") from problem


def _own_options(name: str, method: str, pairs: Sequence[str]) -> dict[str, int]:
    known = [option.name for option in fields(_OWN[method][0])]
    found = {}
    for pair in pairs:
        option, _, text = pair.partition("=")
        if option not in known or not text.isdecimal():
            takes = ", ".join(f"{one}=N" for one in known)
            raise ConfigError(f"method {name!r}: {method} takes {takes}, got {pair!r}")
        found[option] = int(text)
    return found
