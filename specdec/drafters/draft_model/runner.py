"""Drafts with a model behind a cache of its own, level by level, as `DraftSteps` says.

All of it stays on the draft's device: between the levels of a round nothing is read from it. A
draft that can hold rows of different length runs all rows at once, and what was stepped over and
then rejected lies beyond the verified lengths, so going back costs no copy. A draft that folds
tokens into a state, or whose attention needs aligned rows, runs one row and drafts chains: its
state is put back after every round and reads the accepted tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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


class _Draft:
    """What both kinds of draft share.

    Args:
        model: A model whose self-test chose the mode of the kind.
        vocab_size: Ids that may be drafted.

    Attributes:
        device: Where the draft runs.
        positions: Longest text that it has positions for.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model, self.device = model, input_device(model)
        self.positions = max_positions(model.config)
        self._vocab_size = vocab_size

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """The same ids."""
        return draft_ids

    def _log_probs(self, logits: Tensor) -> Tensor:
        """Of the ids that the target has, too; others are never proposed."""
        wide = torch.promote_types(torch.float32, logits.dtype)
        return logits[..., : self._vocab_size].log_softmax(-1, dtype=wide)


@dataclass
class RaggedState:
    """Where the drafting of a batch stands.

    Attributes:
        cache: Keys and values of each row's verified ids, then of the levels being drafted.
        target: The draft behind it.
        verified: Verified ids of each row.
        last: [B, 1] the last of them.
        levels: Tokens and parents [B, W] of the levels drafted since.
    """

    cache: TreeCache
    target: HFTarget
    verified: list[int]
    last: Tensor
    levels: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class RaggedDraft(_Draft):
    """All rows at once, over a `TreeCache`; for a model whose self-test chose tree mode."""

    keeps_drafts = True

    def begin(self, rows: int, capacity: int) -> RaggedState:
        """As `DraftSteps` says."""
        cache = TreeCache(rows, self.device, capacity)
        target = HFTarget(self.model, Prompt(None, None, []), cache)
        last = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        return RaggedState(cache, target, [0] * rows, last)

    def hold(self, state: RaggedState, lengths: Sequence[int]) -> None:
        """Says how many leading ids of each row the cache holds, those of a draft included."""
        state.verified = list(lengths)
        if state.verified != state.cache.host_lengths:
            state.cache.set_lengths(state.verified)

    def commit(
        self, state: RaggedState, tokens: Tensor, features: Tensor | None, counts: Sequence[int]
    ) -> Tensor:
        """As `DraftSteps` says; rows that stand still must not, but may begin anew (`hold`)."""
        width = tokens.shape[1]
        if width > _SHORT or min(counts) < width:
            prompt = Prompt(tokens, None, list(counts))
            target = HFTarget(self.model, prompt, state.cache, prefill_chunk=_PREFILL_CHUNK)
            logits = target.prefill().logits[:, 0]
            ends = torch.tensor(counts, device=tokens.device)[:, None] - 1
            state.last = tokens.gather(1, ends)
        else:
            logits, state.last = self._run(state, TreeBatch.chains(tokens)), tokens[:, -1:]
        state.verified = list(state.cache.host_lengths)
        return self._log_probs(logits)

    def expand(self, state: RaggedState, tokens: Tensor, parents: Tensor) -> Tensor:
        """As `DraftSteps` says; below several nodes, all levels are run again."""
        state.levels.append((tokens, parents))
        if all(level.shape[1] == 1 for level, _ in state.levels):
            return self._log_probs(self._run(state, TreeBatch.roots(tokens[:, 0])))[:, None]
        state.cache.set_lengths([length - 1 for length in state.verified])
        logits = state.target.forward_tree(_drafted(state)).logits
        return self._log_probs(logits[:, -tokens.shape[1] :])

    def rewind(self, state: RaggedState) -> None:
        """As `DraftSteps` says; the slots beyond are overwritten by the next round."""
        state.levels = []
        state.cache.set_lengths(state.verified)

    def _run(self, state: RaggedState, chains: TreeBatch) -> Tensor:
        """Logits [B, V] after tokens that every row goes on with."""
        logits = state.target.forward_tree(chains).logits[:, -1]
        state.cache.set_lengths([length + chains.size for length in state.cache.host_lengths])
        return logits


def _drafted(state: RaggedState) -> TreeBatch:
    """All levels as trees below the last verified id."""
    tokens, parents = [state.last], [torch.full_like(state.last, -1)]
    above = 0  # where the level above begins
    for level, below in state.levels:
        parents.append(below + above)
        above = sum(part.shape[1] for part in tokens)
        tokens.append(level)
    nodes = torch.cat(tokens, 1)
    sizes = torch.full_like(nodes[:, 0], nodes.shape[1], dtype=torch.int32)
    return TreeBatch(nodes, torch.cat(parents, 1).to(torch.int32), sizes, len(state.levels))


@dataclass
class SingleState:
    """Where the drafting of one row stands.

    Attributes:
        cache: The model's own, holding the verified ids; None before the first of them.
        kwargs: What the model is called with.
        held: Verified ids.
        fed: Ids in the cache as it is now.
        first_positions: Position ids of the first forward, where the model takes them.
    """

    cache: StateCache | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    held: int = 0
    fed: int = 0
    first_positions: Tensor | None = None


class SingleDraft(_Draft):
    """One row in chains, over the model's own cache; for a model that self-tested as a chain."""

    keeps_drafts = False

    def begin(self, rows: int, capacity: int) -> SingleState:
        """As `DraftSteps` says; the cache comes with the first ids."""
        return SingleState()

    def hold(self, state: SingleState, lengths: Sequence[int]) -> None:
        """Nothing: the state holds the verified ids and no others."""

    def commit(
        self, state: SingleState, tokens: Tensor, features: Tensor | None, counts: Sequence[int]
    ) -> Tensor:
        """As `DraftSteps` says."""
        logits = self._begin(state, tokens) if state.cache is None else self._run(state, tokens)
        state.held = state.fed
        if state.cache is not None:
            state.cache.hold()
        return self._log_probs(logits)

    def expand(self, state: SingleState, tokens: Tensor, parents: Tensor) -> Tensor:
        """As `DraftSteps` says, for levels of one node."""
        return self._log_probs(self._run(state, tokens))[:, None]

    def rewind(self, state: SingleState) -> None:
        """As `DraftSteps` says."""
        if state.cache is not None:
            state.cache.put_back()
        state.fed = state.held

    def _begin(self, state: SingleState, ids: Tensor) -> Tensor:
        """Makes the cache; logits [1, V] after the prompt."""
        config, kwargs = prepared_call(self.model, ids, torch.ones_like(ids))
        name, cache = cache_argument(kwargs)
        state.cache = StateCache(cache, [0])
        state.kwargs = {**kwargs, name: state.cache.cache}
        state.first_positions = kwargs.get("position_ids")
        state.fed = ids.shape[1]
        output = prefill_as_plain(self.model, ids, config, state.kwargs)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _run(self, state: SingleState, ids: Tensor) -> Tensor:
        """Logits [1, V] after ids [1, n] that come next."""
        new, positions = ids.shape[1], None
        if state.first_positions is not None:
            order = torch.arange(state.fed, state.fed + new, device=self.device)
            positions = state.first_positions[..., :1] + order
        kwargs = {**state.kwargs, "attention_mask": None, "position_ids": positions}
        inputs = step_inputs(self.model, ids, kwargs, heads=1)
        logits: Tensor = self.model(**inputs, return_dict=True).logits[:, -1]
        state.fed += new
        return logits
