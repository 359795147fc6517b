"""EAGLE-3 drafting (Li et al., arXiv 2503.01840): a small head reads the target's hidden states.

Each round the head takes in the verified tokens, then grows a dynamic tree (`growth`) on the device
for all rows at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from specdec.artifacts.places import DRAFT_HEAD
from specdec.contracts import BatchState, Needs, RoundResult, Shape, TargetFacts
from specdec.drafters.growth import Growth, grow
from specdec.errors import ConfigError
from specdec.heads.draft_head import DraftHead, DraftSteps
from specdec.heads.ready import ReadyHead, ready_head
from specdec.method_options import MethodOptions, Range
from specdec.round.tree import MAX_NODES, TreeBatch

_FIRST_ROOM = 4096  # new tokens that the head's cache is allocated for at once
_TREE = Growth(depth=5, top_k=8, nodes=48)
_CHAIN = Growth(depth=16, top_k=1, nodes=16, confidence_threshold=0.01)
_MOST_WAITING = 64  # rounds without a draft after which the head reads them all the same


@dataclass(frozen=True, eq=False)
class Eagle3DraftConfig(MethodOptions):
    """Options of `eagle3`.

    Without any of its sizes, a head drafts what suits the device. On a CPU every node costs, and
    the head can be asked how sure it is: a chain, as deep as it is sure (`depth=16, top_k=1,
    confidence_threshold=0.01`). Elsewhere a tree (`depth=5, top_k=8, nodes=48`), which is also
    where sizes that are not named come from when some are.
    """

    draft: Any = None
    """The trained head: a folder, a hub id, or a loaded `Eagle3Head`."""
    depth: Annotated[int | None, Range(1, MAX_NODES, tries=(1, 2, 3, 4, 5, 6, 8, 10, 12))] = None
    """Levels of the tree; one pass of the head each."""
    top_k: Annotated[int | None, Range(1, tries=(1, 2, 3, 4, 6, 8, 10))] = None
    """Candidates below each continued node; 1 drafts a chain."""
    beam: Annotated[int | None, Range(1, tries=(1, 2, 10))] = None
    """Nodes continued at every level; None for `top_k` of them. With 1, a tree is a chain with its
    siblings, and costs little more to draft than a chain."""
    nodes: Annotated[
        int | None, Range(1, MAX_NODES - 1, tries=(1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63))
    ] = None
    """Nodes that are verified: the likeliest of all candidates."""
    confidence_threshold: Annotated[
        float | None, Range(0, 1, tries=(0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3))
    ] = None
    """Goes no deeper where the head thinks that no path of the draft is as likely as this to come.
    Only on a CPU: elsewhere it would have to wait for the numbers."""
    tokenizer: Any = None
    """The target's tokenizer, to compare with the one that the head was trained with."""

    def check(self) -> None:
        """There is a head."""
        if isinstance(self.draft, Path):
            object.__setattr__(self, "draft", str(self.draft))
        if not isinstance(self.draft, str | DraftSteps) or not self.draft:
            raise ConfigError(
                "eagle3 needs draft=: the folder or hub id of a trained head, or an Eagle3Head, "
                f"got {self.draft!r:.80}"
            )

    def growth(self, on_cpu: bool) -> Growth:
        """The sizes that were named, and the device's own."""
        sizes = [size.name for size in fields(Growth)]
        named = {name: getattr(self, name) for name in sizes if getattr(self, name) is not None}
        return replace(_CHAIN if on_cpu and not named else _TREE, **named)

    @classmethod
    def device_defaults(cls, on_cpu: bool) -> Mapping[str, Any]:
        """The sizes of a chain or of a tree."""
        return asdict(_CHAIN if on_cpu else _TREE)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _in_its_own_dtype(method: _Method) -> _Method:
    """The method, out of reach of an autocast around `generate`: that is the target's.

    The head would compute other states than in training, and its cache meet two dtypes.
    """

    @functools.wraps(method)
    def run(self: Eagle3, *args: Any) -> Any:
        kind = self._head.step_weight.device.type
        if not torch.is_autocast_enabled(kind):
            return method(self, *args)
        with torch.autocast(kind, enabled=False):
            return method(self, *args)

    return cast(_Method, run)


class Eagle3:
    """Implements `Drafter` with a `DraftHead` and its own cache."""

    Config = Eagle3DraftConfig
    host_needs = False
    shape: Shape = "any"
    source_names = ("draft",)
    draft_kind = DRAFT_HEAD

    def __init__(self, config: Eagle3DraftConfig) -> None:
        self._config = config
        self.needs = Needs()
        self._settle(on_cpu=False)
        self._ready: ReadyHead
        self._head: DraftHead
        self._state: Any
        self._begun: list[bool] = []  # rows of which the head has read anything
        self._prompt: list[tuple[Sequence[int], Tensor, Tensor]] = []
        self._fresh: list[tuple[Tensor, Tensor, list[int]]] = []
        self._next: Tensor | None = None

    def meet(self, target: TargetFacts) -> None:
        """Loads the head, or finds it in the target's memory; then its taps are known.

        Raises:
            ConfigError: It cannot be loaded, or belongs to another target.
        """
        config = self._config
        self._settle(target.device.type == "cpu")
        self._ready = ready_head(config.draft, config.tokenizer, target)
        self._head = self._ready.head
        self.needs = Needs(taps=self._head.config.aux_output_layers)

    def _settle(self, on_cpu: bool) -> None:
        self._growth = growth = self._config.growth(on_cpu)
        self.max_nodes = min(growth.nodes, growth.depth) if growth.top_k == 1 else growth.nodes

    def start(self, state: BatchState) -> None:
        """Makes an empty draft state."""
        longest = max(map(len, state.tokens)) + min(state.max_new_tokens, _FIRST_ROOM)
        depth = min(self._growth.depth, state.max_new_tokens)
        width = min(self._growth.top_k, state.vocab_size)
        room = depth * min(self._growth.beam or width, width) + 1
        self._state = self._head.begin(len(state.tokens), longest + room)
        self._begun = [False] * len(state.tokens)
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
        growth = self._growth
        depth = min(growth.depth, state.deepest_room(), budget)
        if depth < 1 and len(self._fresh) < _MOST_WAITING:
            return TreeBatch.roots(state.pending)
        self._catch_up(state)
        if depth < 1:
            return TreeBatch.roots(state.pending)
        drafting = [on and begun for on, begun in zip(state.active, self._begun, strict=True)]
        if self._next is None or not any(drafting):
            return TreeBatch.roots(state.pending)
        top_k = 1 if state.shape == "chain" else growth.top_k
        growth = replace(growth, depth=depth, top_k=top_k, nodes=min(budget, growth.nodes))
        return grow(self._head, self._state, self._next, state.pending, growth, drafting)

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

    def _catch_up(self, state: BatchState) -> None:
        """Shows the head what was verified since it last looked."""
        if self._prompt:
            self._fresh.insert(0, self._prompt_slots(state))
            self._prompt = []
        for tokens, features, counts in self._fresh:
            self._next = self._head.commit(self._state, tokens, features, counts)
            self._begun = [begun or n > 0 for begun, n in zip(self._begun, counts, strict=True)]
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
