"""Draft model: a small model of the target's family writes ahead, the target verifies.

Leviathan et al. (arXiv 2211.17192), Chen et al. (arXiv 2302.01318). By default the draft proposes
its likeliest tokens, a chain or, with `top_k` above 1, a dynamic tree (`growth`); the text is then
that of the same seed without a draft. With `draft_sampling` it samples, and rejection keeps the
target's law instead. The draft runs for all rows at once and stays on its device: a round costs
`num_draft_tokens` forwards of it and no copy to the host.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from specdec.artifacts.places import DRAFT_MODEL
from specdec.contracts import BatchState, Needs, RoundResult, Shape
from specdec.drafters.draft_model.loading import ReadyDraft, check_draft, ready_draft
from specdec.drafters.draft_model.runner import RaggedDraft, SingleDraft
from specdec.drafters.growth import Growth, grow
from specdec.errors import ConfigError, DraftWarning
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TreeBatch
from specdec.targets.self_test import evaluating

_FIRST_ROOM = 4096  # new tokens that the draft's cache is allocated for at once


@dataclass(frozen=True, eq=False)
class DraftModelConfig(MethodOptions):
    """Options of `draft_model`."""

    draft: Any = None
    """The draft: a loaded causal language model, a folder or a hub id."""
    num_draft_tokens: Annotated[int, Range(1, MAX_NODES, tries=(1, 2, 3, 4, 5, 7, 10))] = 5
    """Tokens that the draft writes ahead in a round; one forward of the draft each."""
    top_k: Annotated[int, Range(1, MAX_NODES, tries=(1, 2, 4))] = 1
    """Candidates below each continued node; 1 drafts a chain."""
    beam: Annotated[int, Range(1, MAX_NODES)] = 1
    """Nodes continued at every level; above 1, a level runs those above it again."""
    nodes: Annotated[int | None, Range(1, MAX_NODES)] = None
    """Nodes that are verified: the likeliest of all candidates; None for all."""
    confidence_threshold: Annotated[float, Range(0, 1)] = 0.0
    """Goes no deeper where the draft thinks that no path is as likely as this to come. Only on a
    CPU: elsewhere it would have to wait for the numbers."""
    draft_sampling: bool = False
    """Sample the draft, and verify by rejection: exact in distribution, not seed by seed."""
    temperature: Annotated[float, Range(1e-6)] = 1.0
    """Temperature of a sampled draft; near that of the call, more is accepted."""
    tokenizer: Any = None
    """The target's tokenizer, to compare with the draft's."""
    draft_tokenizer: Any = None
    """The draft's tokenizer; looked for beside the draft when that is a folder or a hub id."""

    def check(self) -> None:
        """There is a draft, and its tree is no larger than a round may be."""
        if self.draft is None:
            raise ConfigError(
                "draft_model needs draft=: a loaded causal language model, a folder or a hub id"
            )
        if isinstance(self.draft, Path):
            object.__setattr__(self, "draft", str(self.draft))
        check_draft(self.draft)
        if self.most_nodes > MAX_NODES:
            raise ConfigError(
                f"draft_model drafts at most {MAX_NODES} nodes, top_k for each of num_draft_tokens "
                f"levels and beam nodes, got num_draft_tokens={self.num_draft_tokens}, "
                f"top_k={self.top_k}, beam={self.beam}; set nodes="
            )
        if self.draft_sampling and self.top_k > 1:
            raise ConfigError(
                f"draft_sampling proposes a chain, got top_k={self.top_k}; leave top_k at 1"
            )

    @property
    def most_nodes(self) -> int:
        """Nodes of a full tree below its root."""
        beam = min(self.beam, self.top_k)
        candidates = self.top_k * (1 + beam * (self.num_draft_tokens - 1))
        return candidates if self.nodes is None else min(self.nodes, candidates)


class DraftModel:
    """Implements `Drafter` with a causal language model of its own cache."""

    Config = DraftModelConfig
    needs = Needs()
    host_needs = False
    shape: Shape = "any"
    source_names = ("draft",)
    sampling_option = "draft_sampling"
    draft_kind = DRAFT_MODEL

    def __init__(self, config: DraftModelConfig) -> None:
        self._config = config
        self.max_nodes = config.most_nodes
        self._ready: ReadyDraft
        self._draft: RaggedDraft | SingleDraft
        self._state: Any
        self._growth = Growth(config.num_draft_tokens)
        self._was_training = False
        self._generator: torch.Generator | None = None
        self._known: list[int] = []  # ids of each row that the draft's cache holds
        self._checked: list[int] = []  # ids of each row that the draft is known to have
        self._gone: set[int] = set()
        self._warned: set[str] = set()
        self._stepped: int | None = None  # nodes of this round's chain in the draft's cache

    def start(self, state: BatchState) -> None:
        """Finds and checks the draft, and makes its cache.

        Raises:
            ConfigError: The draft cannot be loaded, or cannot draft.
            VocabularyMismatchError: Its token ids do not mean what the target's mean.
        """
        config, device, rows = self._config, state.pending.device, len(state.tokens)
        tokenizers = (config.tokenizer, config.draft_tokenizer)
        self._ready = ready_draft(config.draft, tokenizers, state.vocab_size, device, state.memory)
        model, ragged = self._ready.model, self._ready.runs_ragged
        if config.top_k > min(self._ready.vocab_size, state.vocab_size):
            raise ConfigError(
                f"top_k must be at most the {self._ready.vocab_size} tokens of the draft, got "
                f"{config.top_k}"
            )
        if rows > 1 and not ragged:
            raise ConfigError(
                f"draft {type(model).__name__} drafts for one row at a time, got {rows} rows: "
                f"{self._ready.reason}; generate row by row, or choose a draft with plain attention"
            )
        self._draft = (RaggedDraft if ragged else SingleDraft)(model, state.vocab_size)
        # A state goes one way: a draft without branches continues the likeliest node alone.
        top_k = 1 if state.shape == "chain" else config.top_k
        beam = config.beam if ragged else 1
        self._growth = Growth(
            config.num_draft_tokens, top_k, beam, config.most_nodes, config.confidence_threshold
        )
        longest = max(map(len, state.tokens)) + min(state.max_new_tokens, _FIRST_ROOM)
        room = config.num_draft_tokens * min(beam, top_k) + 1
        self._state = self._draft.begin(rows, longest + room)
        self._was_training = any(module.training for module in model.modules())
        self._known, self._checked = [0] * rows, [0] * rows
        if config.draft_sampling:
            self._generator = torch.Generator(self._draft.device)
            self._generator.manual_seed(_seed_of_generators(device, self._draft.device))

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        """Nothing: the draft reads the whole text in the first round."""

    @torch.no_grad()
    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """What the draft would write next in every row, one forward of it a level."""
        self._stepped = None
        rooms = self._rooms(state, budget)
        depth = max(rooms)
        if depth == 0:
            return TreeBatch.roots(state.pending)
        drafting = [room > 0 for room in rooms]
        growth = replace(self._growth, depth=depth, nodes=min(budget, self._growth.nodes))
        pending = state.pending.to(self._draft.device)
        with evaluating(self._ready.model) if self._was_training else nullcontext():
            first = self._catch_up(state.tokens, drafting)
            if self._generator is None:
                trees = grow(self._draft, self._state, first, pending, growth, drafting)
            else:
                trees = self._sampled(first, pending, depth, self._generator)
        if growth.top_k == 1:
            self._stepped = trees.max_depth - 1
            sizes = trees.sizes.new_tensor([min(room + 1, trees.size) for room in rooms])
            trees = trees.with_tokens(trees.tokens, sizes=sizes, scores=trees.scores,
                                      draft_law=trees.draft_law)  # fmt: skip
        return _moved(trees, state.pending.device)

    def observe(self, round_result: RoundResult) -> None:
        """Keeps what the draft's cache holds of an accepted chain; the rest is forgotten."""
        if self._stepped is None or not self._draft.keeps_drafts:
            return
        for row, path in enumerate(round_result.host.paths):
            self._known[row] += min(len(path), self._stepped)

    def _catch_up(self, texts: Sequence[Sequence[int]], drafting: Sequence[bool]) -> Tensor:
        """Log-probabilities [B, V] after every text.

        Every row reads as many ids, the newest ones: rewriting a slot with its own token is
        harmless, and rows that advance alike need no upload of their lengths. Rows that do not
        draft begin anew with nothing.
        """
        texts = [text if on else [] for text, on in zip(texts, drafting, strict=True)]
        width = max(len(text) - n for text, n in zip(texts, self._known, strict=True) if text)
        kept = [max(len(text) - width, 0) for text in texts]
        new = [list(text[n:]) or [0] * width for text, n in zip(texts, kept, strict=True)]
        padded = [ids + [0] * (width - len(ids)) for ids in new]
        self._draft.hold(self._state, kept)
        self._known = [len(text) for text in texts]
        ids = torch.tensor(padded, device=self._draft.device)
        return self._draft.commit(self._state, ids, None, [len(one) for one in new])

    def _sampled(
        self, first: Tensor, pending: Tensor, depth: int, generator: torch.Generator
    ) -> TreeBatch:
        """A chain that was drawn, with the law [B, T, V] that each token was drawn from."""
        tokens, laws, below = [pending[:, None]], [torch.zeros_like(first)], first
        root = torch.zeros_like(tokens[0])
        for level in range(depth):
            law = (below.float() / self._config.temperature).softmax(-1)
            noise = torch.empty_like(law).exponential_(1, generator=generator)
            tokens.append((law / noise).argmax(-1, keepdim=True))
            laws.append(law)
            if level + 1 < depth:
                below = self._draft.expand(self._state, tokens[-1], root)[:, 0]
        self._draft.rewind(self._state)
        chains = TreeBatch.chains(torch.cat(tokens, 1))
        return chains.with_tokens(chains.tokens, draft_law=torch.stack(laws, 1))

    def _rooms(self, state: BatchState, budget: int) -> list[int]:
        """Levels for every row; rows that the draft cannot follow get none from now on."""
        deepest = min(self._growth.depth, budget, state.depth_limit, self._draft.positions)
        rooms = []
        for row, tokens in enumerate(state.tokens):
            room = 0 if row in self._gone else max(min(deepest, state.room(row)), 0)
            if room > 0 and not self._can_follow(row, tokens, deepest):
                self._gone.add(row)
                room = 0
            rooms.append(room)
        return rooms

    def _can_follow(self, row: int, tokens: list[int], deepest: int) -> bool:
        """Whether the draft knows all ids of a row and has positions for what it would write."""
        size, positions = self._ready.vocab_size, self._draft.positions
        unknown = max(tokens[self._checked[row] :], default=0)
        self._checked[row] = len(tokens)
        if unknown >= size:
            self._warn(f"the draft has {size} token ids, and a text holds id {unknown}")
            return False
        if len(tokens) + deepest - 1 > positions:
            self._warn(f"the draft's context of {positions} tokens is full")
            return False
        return True

    def _warn(self, reason: str) -> None:
        """One warning a call for every reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"specdec: draft_model stops drafting for a row, because {reason}; the text is not "
                "affected.",
                DraftWarning,
                stacklevel=2,
            )


def _moved(trees: TreeBatch, device: torch.device) -> TreeBatch:
    """The trees on the target's device, where the draft has another."""
    if trees.tokens.device == device:
        return trees
    scores, law = (None if x is None else x.to(device) for x in (trees.scores, trees.draft_law))
    tokens, parents, sizes = (x.to(device) for x in (trees.tokens, trees.parents, trees.sizes))
    return TreeBatch(tokens, parents, sizes, trees.max_depth, scores, draft_law=law)


def _seed_of_generators(*devices: torch.device) -> int:
    """A seed that depends on where torch's generators stand, and leaves them there.

    Drafts must be drawn anew in every call, or they would bias the text; a call that does not
    sample must not move the generators.
    """
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8)
    for device in devices:
        if device.type != "cpu":
            state = torch.get_device_module(device).get_rng_state(device)
            digest.update(state.cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1
