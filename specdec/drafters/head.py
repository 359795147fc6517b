"""EAGLE-3 drafting (Li et al., arXiv 2503.01840): a small head reads the target's hidden states.

Each round the head takes in the verified tokens, then grows a dynamic tree (EAGLE-2, arXiv
2406.16858): every level continues the likeliest nodes of the level above, and of all candidates the
likeliest are verified. Candidates are not sampled, so the walk of every drafter verifies them, and
the text is that of plain decoding, greedy or sampled. Trees are built on the device for all rows at
once; nothing is read from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from specdec.artifacts.places import DRAFT_HEAD
from specdec.contracts import BatchState, Needs, RoundResult, Shape, TargetFacts
from specdec.errors import ConfigError
from specdec.heads.eagle3.head import Eagle3Head, HeadState
from specdec.heads.ready import ReadyHead, ready_head
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TreeBatch, bucket_size

_FIRST_ROOM = 4096  # new tokens that the head's cache is allocated for at once
_MOST_WAITING = 64  # rounds without a draft after which the head reads them all the same


@dataclass(frozen=True, eq=False)
class Eagle3DraftConfig(MethodOptions):
    """Options of `eagle3`."""

    draft: Any = None
    """The trained head: a folder, a hub id, or a loaded `Eagle3Head`."""
    depth: Annotated[int, Range(1, MAX_NODES, tries=(1, 2, 3, 4, 5, 6, 8, 10, 12))] = 5
    """Levels of the tree; one pass of the head each."""
    top_k: Annotated[int, Range(1, tries=(1, 2, 3, 4, 6, 8, 10))] = 8
    """Candidates below each continued node; 1 drafts a chain."""
    beam: Annotated[int | None, Range(1, tries=(1, 2, 10))] = None
    """Nodes continued at every level; None for `top_k` of them. With 1, a tree is a chain with its
    siblings, and costs little more to draft than a chain."""
    nodes: Annotated[
        int, Range(1, MAX_NODES - 1, tries=(1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63))
    ] = 48
    """Nodes that are verified: the likeliest of all candidates."""
    confidence_threshold: Annotated[
        float, Range(0, 1, tries=(0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3))
    ] = 0.0
    """Goes no deeper where the head thinks that no path of the draft is as likely as this to come.
    Only on a CPU: elsewhere it would have to wait for the numbers."""
    tokenizer: Any = None
    """The target's tokenizer, to compare with the one that the head was trained with."""

    def check(self) -> None:
        """There is a head."""
        if isinstance(self.draft, Path):
            object.__setattr__(self, "draft", str(self.draft))
        if not isinstance(self.draft, str | Eagle3Head) or not self.draft:
            raise ConfigError(
                "eagle3 needs draft=: the folder or hub id of a trained head, or an Eagle3Head, "
                f"got {self.draft!r:.80}"
            )


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _in_its_own_dtype(method: _Method) -> _Method:
    """The method, out of reach of an autocast around `generate`: that is the target's.

    The head would compute other states than in training, and its cache meet two dtypes.
    """

    @functools.wraps(method)
    def run(self: Eagle3, *args: Any) -> Any:
        kind = self._head.fc.weight.device.type
        if not torch.is_autocast_enabled(kind):
            return method(self, *args)
        with torch.autocast(kind, enabled=False):
            return method(self, *args)

    return cast(_Method, run)


class Eagle3:
    """Implements `Drafter` with an `Eagle3Head` and its own KV cache."""

    Config = Eagle3DraftConfig
    host_needs = False
    shape: Shape = "any"
    source_names = ("draft",)
    draft_kind = DRAFT_HEAD
    # The head can be asked how sure it is: it drafts chains, as deep as it is sure.
    cpu_sizes: ClassVar[Mapping[str, Any]] = {
        "depth": 16, "top_k": 1, "confidence_threshold": 0.01,
    }  # fmt: skip

    def __init__(self, config: Eagle3DraftConfig) -> None:
        self._config = config
        self.needs = Needs()
        self.max_nodes = min(config.nodes, config.depth) if config.top_k == 1 else config.nodes
        self._ready: ReadyHead
        self._head: Eagle3Head
        self._state: HeadState
        self._prompt: list[tuple[Sequence[int], Tensor, Tensor]] = []
        self._fresh: list[tuple[Tensor, Tensor, list[int]]] = []
        self._next: Tensor | None = None

    def meet(self, target: TargetFacts) -> None:
        """Loads the head, or finds it in the target's memory; then its taps are known.

        Raises:
            ConfigError: It cannot be loaded, or belongs to another target.
        """
        config = self._config
        self._ready = ready_head(config.draft, config.tokenizer, target)
        self._head = self._ready.head
        self.needs = Needs(taps=self._head.config.aux_output_layers)

    def start(self, state: BatchState) -> None:
        """Makes an empty draft state."""
        longest = max(map(len, state.tokens)) + min(state.max_new_tokens, _FIRST_ROOM)
        depth = min(self._config.depth, state.max_new_tokens)
        width = min(self._config.top_k, state.vocab_size)
        room = depth * min(self._config.beam or width, width) + 1
        self._state = self._head.begin(len(state.tokens), longest + room)
        self._prompt, self._fresh, self._next = [], [], None

    @_in_its_own_dtype
    @torch.no_grad()
    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        """Keeps the prompt's features until the token after its last one is known."""
        if features is not None:
            self._prompt.append((list(rows), token_ids, self._head.features(features)))

    @_in_its_own_dtype
    @torch.no_grad()
    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """The likeliest nodes of a dynamic tree for every row."""
        depth = self._depth(state, budget)
        if depth < 1 and len(self._fresh) < _MOST_WAITING:
            return TreeBatch.roots(state.pending)
        self._catch_up(state)
        if depth < 1:
            return TreeBatch.roots(state.pending)
        drafting = [on and n > 0 for on, n in zip(state.active, self._state.verified, strict=True)]
        if self._next is None or not any(drafting):
            return TreeBatch.roots(state.pending)
        if state.shape == "chain" or self._config.top_k == 1:
            return self._chain(state, self._next, depth, drafting)
        nodes = min(budget, self._config.nodes)
        levels = self._candidates(self._next, depth, drafting)
        return self._best(state, levels, nodes, drafting)

    @_in_its_own_dtype
    @torch.no_grad()
    def observe(self, round_result: RoundResult) -> None:
        """Keeps the accepted path's features; the head reads them when it drafts again."""
        host, features = round_result.host, round_result.output.features
        if features is None:
            return
        counts = [len(path) + 1 if on else 0
                  for path, on in zip(host.paths, round_result.rows, strict=True)]  # fmt: skip
        width = max(counts)
        path = round_result.verdict.path[:, : width - 1].long().clamp(min=0)
        nodes = pad(path, (1, 0))[:, :, None].expand(-1, -1, features.shape[-1])
        tokens = round_result.verdict.tokens[:, :width]
        self._fresh.append((tokens, self._head.features(features.gather(1, nodes)), counts))
        self._ready.promise.see(round_result)

    def end(self, state: BatchState) -> None:
        """Ends a call: the place to say that the head does not keep what it promises."""
        self._ready.warn_if_broken()

    def _depth(self, state: BatchState, budget: int) -> int:
        """Levels that some row can still use."""
        remaining = (state.max_new_tokens - state.emitted(row) - 1
                     for row, active in enumerate(state.active) if active)  # fmt: skip
        return min(self._config.depth, state.depth_limit, budget, max(remaining, default=0))

    def _catch_up(self, state: BatchState) -> None:
        """Shows the head what was verified since it last looked."""
        if self._prompt:
            self._fresh.insert(0, self._prompt_slots(state))
            self._prompt = []
        last = self._head.config.vocab_size - 1
        for tokens, features, counts in self._fresh:
            self._next = self._head.commit(self._state, tokens.clamp(0, last), features, counts)
        self._fresh = []

    def _prompt_slots(self, state: BatchState) -> tuple[Tensor, Tensor, list[int]]:
        """The prompts as verified slots: a token's feature, and the token after it."""
        ids: list[list[Tensor]] = [[] for _ in state.tokens]
        found: list[list[Tensor]] = [[] for _ in state.tokens]
        for rows, token_ids, features in self._prompt:
            for index, row in enumerate(rows):
                ids[row].append(token_ids[index])
                found[row].append(features[index])
        empty, nothing = state.pending[:0], features[0, :0]
        first = [
            row[length] for row, length in zip(state.tokens, state.prompt_lengths, strict=True)
        ]
        after = torch.tensor(first, device=state.pending.device)[:, None]
        tokens = [torch.cat([*own, after[row]])[1:] if own else empty
                  for row, own in enumerate(ids)]  # fmt: skip
        slots = [torch.cat(own) if own else nothing for own in found]
        counts = [len(row) for row in tokens]
        return pad_sequence(tokens, True), pad_sequence(slots, True), counts

    def _chain(
        self, state: BatchState, log_probs: Tensor, depth: int, drafting: Sequence[bool]
    ) -> TreeBatch:
        """The likeliest token of every level; `log_probs` [B, D] are those of the first."""
        head, own = self._head, self._state
        tokens, scores = [state.pending[:, None]], [log_probs.new_zeros(len(log_probs), 1)]
        first = torch.zeros_like(tokens[0])
        for level in range(depth):
            best, index = log_probs.max(-1, keepdim=True)
            tokens.append(head.target_ids(index))
            scores.append(scores[-1] + best)
            if level + 1 == depth or self._is_unlikely(scores[-1], drafting):
                break
            log_probs = head.expand(own, tokens[-1], first)[:, 0]
        head.rewind(own)
        return self._trees(TreeBatch.chains(torch.cat(tokens, 1)), torch.cat(scores, 1), drafting)

    def _is_unlikely(self, scores: Tensor, drafting: Sequence[bool]) -> bool:
        """Whether no path in `scores` [B, n] of a row that drafts is worth going on."""
        least = self._config.confidence_threshold
        if not least or scores.device.type != "cpu":
            return False
        if not all(drafting):
            scores = scores[torch.tensor(drafting)]
        return not bool((scores >= math.log(least)).any())  # nor is what is not a number

    def _candidates(
        self, log_probs: Tensor, depth: int, drafting: Sequence[bool]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Scores, target ids and parents [B, n] of every level's candidates.

        A parent is counted over all candidates so far; -1 is the root.

        Args:
            log_probs: [B, D] of what follows each row's pending token.
            depth: Levels to grow.
            drafting: Rows that get a tree.
        """
        head, own = self._head, self._state
        width = min(self._config.top_k, log_probs.shape[-1])
        beam = min(self._config.beam or width, width)
        every, index = log_probs.topk(width)
        ids = head.target_ids(index)
        levels = [(every, ids, torch.full_like(index, -1))]
        # The likeliest `beam` candidates of a level are continued; the first level is sorted.
        scores, tokens, parents = every[:, :beam], ids[:, :beam], torch.zeros_like(index[:, :beam])
        frontier, count = torch.arange(beam, device=index.device).expand_as(parents), width
        for level in range(1, depth):
            if self._is_unlikely(scores, drafting):
                break
            below, index = head.expand(own, tokens, parents).topk(width)
            every = (scores[:, :, None] + below).flatten(1)
            ids = head.target_ids(index).flatten(1)
            levels.append((every, ids, frontier[:, :, None].expand_as(index).flatten(1)))
            if level + 1 < depth:
                scores, best = every.topk(beam)
                tokens, parents, frontier = ids.gather(1, best), best // width, count + best
                count += every.shape[1]
        head.rewind(own)
        return levels

    def _best(
        self,
        state: BatchState,
        levels: Sequence[tuple[Tensor, Tensor, Tensor]],
        nodes: int,
        drafting: Sequence[bool],
    ) -> TreeBatch:
        """The likeliest candidates as trees; a stable order puts a parent before its children.

        No child is likelier than its parent, and candidates come level by level, so of equals the
        shallower one is first (EAGLE-2 reranks without such a rule, and ties can tear its trees).

        Args:
            state: Where the rows stand.
            levels: As `_candidates` grew them.
            nodes: Candidates to keep.
            drafting: Rows that get a tree.
        """
        scores, tokens, parents = (torch.cat(part, 1) for part in zip(*levels, strict=True))
        # A head that overflows must not change where a child stands: nothing below NaN is a number.
        scores = scores.nan_to_num(nan=float("-inf"))
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        nodes = min(nodes, order.shape[1])
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        kept = order[:, :nodes]
        above = parents.gather(1, kept)
        above = torch.where(above < 0, 0, rank.gather(1, above.clamp(min=0)) + 1)
        size = nodes + 1
        if scores.device.type != "cpu":  # shapes that kernels and graphs have seen before
            size = bucket_size(size)
        fill = (1, size - nodes - 1)
        trees = TreeBatch(
            tokens=pad(tokens.gather(1, kept), fill),
            parents=pad(above, fill).index_fill_(1, above.new_zeros(1), -1).to(torch.int32),
            sizes=torch.full_like(state.pending, nodes + 1, dtype=torch.int32),
            max_depth=len(levels),
        )
        return self._trees(trees, pad(scores[:, :nodes], fill), drafting)

    def _trees(self, trees: TreeBatch, scores: Tensor, drafting: Sequence[bool]) -> TreeBatch:
        """The trees with their scores; bare roots for rows that do not draft."""
        sizes = trees.sizes
        if not all(drafting):
            sizes = torch.where(torch.tensor(drafting, device=sizes.device), sizes, 1)
        return trees.with_tokens(trees.tokens, sizes=sizes, scores=scores)
