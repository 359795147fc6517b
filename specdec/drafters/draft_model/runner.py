"""Runs a draft model behind a cache of its own: catches up with the text, steps, and goes back.

All of it stays on the draft's device: between the steps of a round nothing is read from it. A draft
that can hold rows of different length runs all rows at once, and what was stepped over and then
rejected lies beyond the committed lengths, so going back costs no copy. A draft that folds tokens
into a state, or whose attention needs aligned rows, runs one row: its state is put back after every
round and reads the accepted tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.caches.state_cache import StateCache
from specdec.caches.tree_cache import TreeCache
from specdec.hf.compat import input_device, max_positions
from specdec.hf.names import cache_argument
from specdec.hf.steps import prefill_as_plain, prepared_call, step_inputs
from specdec.round.tree import TreeBatch
from specdec.targets.prompts import Prompt
from specdec.targets.tree_target import HFTarget

_SHORT = 16  # tokens a row that are caught up in one forward with logits at all of them
_PREFILL_CHUNK = 2048  # tokens a forward over a long text; its mask grows with the square


class DraftRunner(Protocol):
    """A draft model and its cache, for the rows of one call.

    Attributes:
        device: Where the draft runs.
        positions: Longest text that it has positions for.
    """

    device: torch.device
    positions: int

    def catch_up(self, texts: Sequence[Sequence[int]], known: Sequence[int]) -> Tensor:
        """Runs what is new in every text; logits [B, V] after its last token.

        Args:
            texts: Known ids of each row, at least one longer than what the cache holds of it; an
                empty text takes no part, and its row forgets what it held.
            known: Leading ids of each row that the cache holds, as `go_back` said.
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Runs one more token [B] of every row; logits [B, V] after it."""
        ...

    def go_back(self, lengths: Sequence[int]) -> list[int]:
        """Ends a round of which each row keeps this many ids; returns how many the cache holds."""
        ...


class RaggedRunner:
    """All rows at once, over a `TreeCache`.

    Args:
        model: A model whose self-test chose tree mode.
        rows: Rows of the batch.
        capacity: Slots to allocate at first.

    Attributes:
        cache: Keys and values of each row's text.
        device: Where the draft runs.
        positions: Longest text that it has positions for.
    """

    def __init__(self, model: Any, rows: int, capacity: int) -> None:
        self.model, self.device = model, input_device(model)
        self.positions = max_positions(model.config)
        self.cache = TreeCache(rows, self.device, capacity)
        self._target = HFTarget(model, Prompt(None, None, []), self.cache)

    def catch_up(self, texts: Sequence[Sequence[int]], known: Sequence[int]) -> Tensor:
        """As `DraftRunner` says.

        Every row gets the same number of tokens, the newest ones: rewriting a slot with its own
        token is harmless, and rows that advance alike need no upload of their lengths.
        """
        width = max(len(text) - n for text, n in zip(texts, known, strict=True) if text)
        kept = [max(len(text) - width, 0) for text in texts]
        if kept != self.cache.host_lengths:
            self.cache.set_lengths(kept)
        new = [list(text[n:]) or [0] * width for text, n in zip(texts, kept, strict=True)]
        counts = [len(tokens) for tokens in new]
        padded = [tokens + [0] * (width - len(tokens)) for tokens in new]
        ids = torch.tensor(padded, device=self.device)
        if width > _SHORT or min(counts) < width:
            prompt = Prompt(ids, None, counts)
            target = HFTarget(self.model, prompt, self.cache, prefill_chunk=_PREFILL_CHUNK)
            return target.prefill().logits[:, 0]
        return self._forward(TreeBatch.chains(ids))

    def step(self, tokens: Tensor) -> Tensor:
        """As `DraftRunner` says."""
        return self._forward(TreeBatch.roots(tokens))

    def go_back(self, lengths: Sequence[int]) -> list[int]:
        """As `DraftRunner` says; the slots beyond are overwritten by the next round."""
        return list(lengths)

    def _forward(self, chains: TreeBatch) -> Tensor:
        logits = self._target.forward_tree(chains).logits[:, -1]
        self.cache.set_lengths([length + chains.size for length in self.cache.host_lengths])
        return logits


class SingleRunner:
    """One row, over the model's own cache, which is put back after every round.

    Args:
        model: A model whose self-test chose chain mode.

    Attributes:
        device: Where the draft runs.
        positions: Longest text that it has positions for.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, input_device(model)
        self.positions = max_positions(model.config)
        self._kwargs: dict[str, Any] = {}
        self._cache: StateCache | None = None
        self._held = self._fed = 0  # ids in the state that is held, and in the present one
        self._first_positions: Tensor | None = None

    def catch_up(self, texts: Sequence[Sequence[int]], known: Sequence[int]) -> Tensor:
        """As `DraftRunner` says, for one row."""
        ids = torch.tensor([list(texts[0][known[0] :])], device=self.device)
        if self._cache is None:
            self._cache, logits = self._begin(ids)
        else:
            self._cache.put_back()
            self._fed = self._held
            logits = self._forward(ids)
        self._held = self._fed
        self._cache.hold()
        return logits

    def _begin(self, ids: Tensor) -> tuple[StateCache, Tensor]:
        """The cache after the prompt, and logits [1, V] there."""
        config, kwargs = prepared_call(self.model, ids, torch.ones_like(ids))
        name, cache = cache_argument(kwargs)
        own = StateCache(cache, [0])
        self._kwargs = {**kwargs, name: own.cache}
        self._first_positions = kwargs.get("position_ids")
        self._fed = ids.shape[1]
        output = prefill_as_plain(self.model, ids, config, self._kwargs)
        return own, output.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """As `DraftRunner` says."""
        return self._forward(tokens[:, None])

    def go_back(self, lengths: Sequence[int]) -> list[int]:
        """As `DraftRunner` says: the state stays where the round began."""
        return [self._held]

    def _forward(self, ids: Tensor) -> Tensor:
        new, positions = ids.shape[1], None
        if self._first_positions is not None:
            order = torch.arange(self._fed, self._fed + new, device=self.device)
            positions = self._first_positions[..., :1] + order
        kwargs = {**self._kwargs, "attention_mask": None, "position_ids": positions}
        inputs = step_inputs(self.model, ids, kwargs, heads=1)
        logits: Tensor = self.model(**inputs, return_dict=True).logits[:, -1]
        self._fed += new
        return logits
