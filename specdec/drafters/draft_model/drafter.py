"""Draft model: a small model of the target's family writes ahead, the target verifies.

Leviathan et al. (arXiv 2211.17192), Chen et al. (arXiv 2302.01318). By default the draft proposes
its best tokens, a chain or, with `top_k` above 1, a trunk with siblings (after SpecInfer, arXiv
2305.09781); the text is then that of the same seed without a draft. With `draft_sampling` it
samples, and rejection keeps the target's law instead. The draft runs for all rows at once and stays
on its device: a round costs `num_draft_tokens` forwards of it and no copy to the host.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.artifacts.places import DRAFT_MODEL
from specdec.contracts import BatchState, Needs, RoundResult, Shape
from specdec.drafters.draft_model.loading import ReadyDraft, check_draft, ready_draft
from specdec.drafters.draft_model.runner import DraftRunner, RaggedRunner, SingleRunner
from specdec.errors import ConfigError, DraftWarning
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TokenTree, TreeBatch
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
    """Candidates at every level: the best one is continued, the others are its siblings."""
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
        if self.nodes > MAX_NODES:
            raise ConfigError(
                f"draft_model drafts at most {MAX_NODES} nodes, num_draft_tokens * top_k, got "
                f"num_draft_tokens={self.num_draft_tokens}, top_k={self.top_k}"
            )
        if self.draft_sampling and self.top_k > 1:
            raise ConfigError(
                f"draft_sampling proposes a chain, got top_k={self.top_k}; leave top_k at 1"
            )

    @property
    def nodes(self) -> int:
        """Nodes of a full tree below its root."""
        return self.num_draft_tokens * self.top_k


class DraftModel:
    """Implements `Drafter` with a causal language model of its own cache.

    A tree has one level for every draft token. Each level holds the trunk, then its siblings; only
    the trunk goes on.
    """

    Config = DraftModelConfig
    needs = Needs()
    host_needs = False
    shape: Shape = "any"
    source_names = ("draft", "draft sibling")
    sampling_option = "draft_sampling"
    draft_kind = DRAFT_MODEL

    def __init__(self, config: DraftModelConfig) -> None:
        self._config = config
        self.max_nodes = config.nodes
        self._draft: ReadyDraft
        self._runner: DraftRunner
        self._was_training = False
        self._generator: torch.Generator | None = None
        self._known: list[int] = []  # ids of each row that the draft's cache holds
        self._checked: list[int] = []  # ids of each row that the draft is known to have
        self._gone: set[int] = set()
        self._warned: set[str] = set()
        self._stepped: int | None = None  # draft tokens of this round in the draft's cache
        self._width = 1  # candidates at a level
        self._shapes: dict[int, TreeBatch] = {}

    def start(self, state: BatchState) -> None:
        """Finds and checks the draft, and makes its cache.

        Raises:
            ConfigError: The draft cannot be loaded, or cannot draft.
            VocabularyMismatchError: Its token ids do not mean what the target's mean.
        """
        config, device = self._config, state.pending.device
        tokenizers = (config.tokenizer, config.draft_tokenizer)
        self._draft = ready_draft(config.draft, tokenizers, state.vocab_size, device, state.memory)
        if config.top_k > min(self._draft.vocab_size, state.vocab_size):
            raise ConfigError(
                f"top_k must be at most the {self._draft.vocab_size} tokens of the draft, got "
                f"{config.top_k}"
            )
        model, rows = self._draft.model, len(state.tokens)
        longest = max(map(len, state.tokens)) + min(state.max_new_tokens, _FIRST_ROOM)
        if self._draft.runs_ragged:
            self._runner = RaggedRunner(model, rows, longest + config.num_draft_tokens + 1)
        elif rows == 1:
            self._runner = SingleRunner(model)
        else:
            raise ConfigError(
                f"draft {type(model).__name__} drafts for one row at a time, got {rows} rows: "
                f"{self._draft.reason}; generate row by row, or choose a draft with plain attention"
            )
        self._was_training = any(module.training for module in model.modules())
        self._known, self._checked = [0] * rows, [0] * rows
        self._width = 1 if state.shape == "chain" else config.top_k
        if config.draft_sampling:
            self._generator = torch.Generator(self._runner.device)
            self._generator.manual_seed(_seed_of_generators(device, self._runner.device))

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        """Nothing: the draft reads the whole text in the first round."""

    @torch.no_grad()
    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """What the draft would write next in every row, one forward of it a level."""
        self._stepped = None
        levels = self._levels(state, budget)
        depth = max(levels, default=0)
        if depth == 0:
            return TreeBatch.roots(state.pending)
        live = min(1 + depth * self._width, 1 + budget)
        sizes = [min(1 + n * self._width, live) for n in levels]
        trees = self._shape_of(live, state)
        texts = [tokens if n else [] for tokens, n in zip(state.tokens, levels, strict=True)]
        with evaluating(self._draft.model) if self._was_training else nullcontext():
            drafted, laws = self._write_ahead(texts, depth, state.vocab_size)
        self._known = [len(text) for text in texts]
        self._stepped = depth - 1
        nodes = torch.cat([state.pending[:, None], drafted.to(state.pending.device)], 1)[:, :live]
        tokens = pad(nodes, (0, trees.size - live))
        if laws is not None:
            laws = pad(laws.to(state.pending.device), (0, 0, 1, trees.size - 1 - depth))
        counts = torch.tensor(sizes, dtype=torch.int32, device=state.pending.device)
        return trees.with_tokens(tokens, sizes=counts, draft_law=laws)

    def observe(self, round_result: RoundResult) -> None:
        """Keeps what the draft's cache holds of the accepted path; the rest is forgotten."""
        if self._stepped is None:
            return
        width, deepest = self._width, self._stepped
        for row, path in enumerate(round_result.host.paths):
            trunk = sum((node - 1) % width == 0 and (node - 1) // width < deepest for node in path)
            self._known[row] += trunk
        self._known = self._runner.go_back(self._known)

    def _levels(self, state: BatchState, budget: int) -> list[int]:
        """Draft tokens for every row; rows that get none now get none in this call."""
        deepest = min(
            self._config.num_draft_tokens,
            -(-budget // self._width),
            state.depth_limit,
            self._runner.positions,
        )
        if deepest < 1:
            return [0] * len(state.tokens)
        levels = []
        for row, tokens in enumerate(state.tokens):
            remaining = state.max_new_tokens - state.emitted(row) - 1
            count = min(deepest, remaining) if state.active[row] and row not in self._gone else 0
            if count > 0 and not self._can_follow(row, tokens, deepest):
                self._gone.add(row)
                count = 0
            levels.append(max(count, 0))
        return levels

    def _can_follow(self, row: int, tokens: list[int], deepest: int) -> bool:
        """Whether the draft knows all ids of a row and has positions for what it would write."""
        size, positions = self._draft.vocab_size, self._runner.positions
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

    def _write_ahead(
        self, texts: Sequence[Sequence[int]], depth: int, vocab_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens [B, depth * width], laws [B, depth, V] when sampled), on the draft's device."""
        levels, laws = [], []
        logits = self._runner.catch_up(texts, self._known)
        for level in range(depth):
            logits = logits[:, :vocab_size]  # ids that the target lacks are never proposed
            if self._generator is None:
                levels.append(logits.topk(self._width, -1).indices)
            else:
                law = (logits.float() / self._config.temperature).softmax(-1)
                noise = torch.empty_like(law).exponential_(1, generator=self._generator)
                levels.append((law / noise).argmax(-1, keepdim=True))
                laws.append(law)
            if level + 1 < depth:
                logits = self._runner.step(levels[-1][:, 0])
        return torch.cat(levels, 1), torch.stack(laws, 1) if laws else None

    def _shape_of(self, live: int, state: BatchState) -> TreeBatch:
        """The tree of `live` nodes for every row, without its tokens; uploaded once a call."""
        found = self._shapes.get(live)
        if found is None:
            width, device = self._width, state.pending.device
            trunk = [1 + level * width for level in range(-(-(live - 1) // width))]
            below = [parent for parent in [0, *trunk[:-1]] for _ in range(width)]
            sources = [0, *(int(node % width > 0) for node in range(live - 1))]
            tree = TokenTree(
                [0] * live, [-1, *below[: live - 1]], sources=sources if width > 1 else None
            )
            on_cpu = device.type == "cpu"  # no kernels or graphs to keep shapes for
            found = TreeBatch.from_rows([tree] * len(state.tokens), device, bucket=not on_cpu)
            self._shapes[live] = found
        return found


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
