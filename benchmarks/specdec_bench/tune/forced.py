"""Trees of drafters that read the target's states, at every position of plain's text.

Their draft depends on the text before it and on nothing else: not on which drafts were verified. So
one pass, in which the target reads the text a stretch at a time and the drafter grows the largest
tree at each token, tells what every smaller tree would have had accepted, wherever its rounds
start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.api import capability
from specdec.caches.tree_cache import TreeCache
from specdec.contracts import Drafter, RoundResult, TargetOutput
from specdec.generate.call import introduce
from specdec.registry import methods
from specdec.round.pickers import Picks
from specdec.round.tree import TokenTree, TreeBatch, bucket_size
from specdec.round.verify import Verdict
from specdec.targets.prompts import Prompt
from specdec.targets.self_test import evaluating
from specdec.targets.tree_target import HFTarget
from specdec_bench.contracts import Unit
from specdec_bench.tune.grid import Candidate
from specdec_bench.tune.measured import Rounds
from specdec_bench.tune.replayed import advance, emit, forced_state, roots

STATE_READERS: dict[str, dict[str, int]] = {
    "eagle3": {"depth": 12, "top_k": 10, "nodes": 10 + 11 * 100},
    "draft_model": {"num_draft_tokens": 10, "top_k": 4},
}
"""Methods that this serves, with the largest tree of their grids."""

_STRETCH = 32  # tokens that the target reads in one forward


@dataclass
class _Grown:
    """One tree without its root, as arrays over nodes in the drafter's order.

    Attributes:
        parents: Index of the parent's entry; -1 below the root.
        depths: From 1.
        ranks: Place among the siblings, from 0.
        scores: Log-probability of the path; falls from level to level where there is none.
        on_text: Whether the path is plain's text.
    """

    parents: NDArray[np.int64]
    depths: NDArray[np.int64]
    ranks: NDArray[np.int64]
    scores: NDArray[np.float64]
    on_text: NDArray[np.bool_]

    @classmethod
    def of(cls, tree: TokenTree, text: Sequence[int]) -> _Grown:
        """Compares a tree with what came: `text` begins with the token after the root."""
        depths, siblings = tree.depths(), [0] * len(tree)
        ranks, on_text = [0] * len(tree), [True] + [False] * (len(tree) - 1)
        taken: set[int] = set()
        for node in range(1, len(tree)):
            parent, depth = tree.parents[node], depths[node]
            ranks[node] = siblings[parent]
            siblings[parent] += 1
            right = on_text[parent] and depth < len(text) and tree.tokens[node] == text[depth - 1]
            if right and parent not in taken:
                on_text[node] = True
                taken.add(parent)
        scores = tree.scores if tree.scores is not None else [-float(d) for d in depths]
        return cls(
            np.array(tree.parents[1:], dtype=np.int64) - 1,
            np.array(depths[1:], dtype=np.int64),
            np.array(ranks[1:], dtype=np.int64),
            np.array(scores[1:], dtype=np.float64),
            np.array(on_text[1:], dtype=np.bool_),
        )

    def narrowed(self, width: int, beam: int) -> _Grown:
        """The tree that grows with `width` children a node and `beam` continued nodes a level."""
        kept = np.zeros(len(self.parents), dtype=np.bool_)
        frontier = np.zeros(len(self.parents) + 1, dtype=np.bool_)
        frontier[-1] = True  # entry -1 is the root
        for depth in range(1, int(self.depths.max(initial=0)) + 1):
            level = (self.depths == depth) & (self.ranks < width) & frontier[self.parents]
            kept |= level
            places = level.nonzero()[0]
            best = places[np.argsort(-self.scores[places], kind="stable")[:beam]]
            frontier[:] = False
            frontier[best] = True
        return _Grown(
            self.parents[kept], self.depths[kept], self.ranks[kept],
            self.scores[kept], self.on_text[kept],
        )  # fmt: skip


@dataclass
class ForcedTrees:
    """Trees of one method at every position of some units.

    Attributes:
        method: Whose.
        on_cpu: Trees are not padded there.
        grown: [unit][row][emitted tokens so far] the tree there.
    """

    method: str
    on_cpu: bool
    grown: list[list[list[_Grown]]] = field(default_factory=list)
    _narrow: dict[tuple[int, ...], _Grown] = field(default_factory=dict)

    def simulate(self, candidate: Candidate) -> tuple[Rounds, float]:
        """Rounds of the candidate on all units, and the levels that it drafts in a round."""
        found, levels = Rounds(), []
        for unit, rows in enumerate(self.grown):
            ends = [len(row) for row in rows]
            at = [1] * len(rows)
            while any(here < end for here, end in zip(at, ends, strict=True)):
                live = [row for row, end in enumerate(ends) if at[row] < end]
                grown = {row: self._narrowed((unit, row, at[row]), candidate) for row in live}
                depth = max(_levels(tree, candidate) for tree in grown.values())
                size = 1
                for row in live:
                    nodes, accepted = _verified(grown[row], candidate, depth)
                    accepted = min(accepted, ends[row] - at[row] - 1)
                    size = max(size, nodes + 1)
                    found.tokens.append(accepted + 1)
                    at[row] += accepted + 1
                found.sizes.append(size if self.on_cpu else bucket_size(size))
                levels.append(depth)
        return found, sum(levels) / max(len(levels), 1)

    def _narrowed(self, place: tuple[int, int, int], candidate: Candidate) -> _Grown:
        """What the candidate would grow at [unit][row][tokens], were it as deep as can be."""
        options = candidate.mapping
        width = options["top_k"]
        beam = min(options.get("beam") or width, width)
        key = (*place, width, beam)
        if key not in self._narrow:
            unit, row, at = place
            self._narrow[key] = self.grown[unit][row][at].narrowed(width, beam)
        return self._narrow[key]


def _levels(grown: _Grown, candidate: Candidate) -> int:
    """Levels that the candidate drafts where this is the only row."""
    options, deepest = candidate.mapping, int(grown.depths.max(initial=0))
    if "depth" not in options:
        return min(int(options["num_draft_tokens"]), deepest)
    levels, least = min(int(options["depth"]), deepest), options["confidence_threshold"]
    for level in range(1, levels if least else 1):
        if grown.scores[grown.depths == level].max() < math.log(least):
            return level
    return levels


def _verified(grown: _Grown, candidate: Candidate, depth: int) -> tuple[int, int]:
    """(nodes, accepted nodes) of a round that drafts `depth` levels."""
    places = (grown.depths <= depth).nonzero()[0]
    most = candidate.mapping.get("nodes", len(places))
    kept = places[np.argsort(-grown.scores[places], kind="stable")[:most]]
    accepted = int(grown.depths[kept[grown.on_text[kept]]].max(initial=0))
    return len(kept), accepted


@torch.no_grad()
def force(method: str, options: dict[str, Any], model: Any, units: Sequence[Unit]) -> ForcedTrees:
    """Grows the method's largest tree at every position of the units' texts.

    Args:
        method: One of `STATE_READERS`.
        options: Sizes, and the draft.
        model: The target, augmented, verified by trees.
        units: Prompts with plain's texts.
    """
    found = ForcedTrees(method, model.device.type == "cpu")
    memory: dict[str, Any] = {}
    with evaluating(model):
        for unit in units:
            drafter = methods.create(method, options)
            introduce(drafter, model, memory)
            found.grown.append(_force_unit(drafter, model, unit, memory))
    return found


def verifies_trees(model: Any) -> bool:
    """Whether the target takes trees, so that rounds can be simulated and their cost looked up."""
    return capability(model).mode == "tree"


def _force_unit(
    drafter: Drafter, model: Any, unit: Unit, memory: dict[str, Any]
) -> list[list[_Grown]]:
    config, texts = model.config.get_text_config(), [list(text) for text in unit.text_ids]
    state = forced_state(unit, config.vocab_size)
    # Room to draft as deep at the end of the text as anywhere: rounds are cut when simulated.
    state.max_new_tokens += 64
    state.memory, state.shape = memory, "any"
    prompts = [list(prompt) for prompt in unit.prompt_ids]
    counts, width = [len(prompt) for prompt in prompts], max(map(len, prompts))
    packed = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    device = unit.input_ids.device
    cache = TreeCache(len(prompts), device, width + unit.record.new_tokens + _STRETCH)
    target = HFTarget(
        model, Prompt(packed.to(device), None, counts), cache, taps=drafter.needs.taps
    )
    drafter.start(state)
    target.prefill(drafter.observe_prefill)
    advance(state, [[text[0]] for text in texts])
    nothing = np.empty(0, dtype=np.int64)
    empty = _Grown(nothing, nothing, nothing, np.empty(0), np.empty(0, dtype=np.bool_))
    grown: list[list[_Grown]] = [[empty] for _ in texts]
    for depth_limit, output in _read(target, torch.tensor(texts, device=device)[:, :-1]):
        state.depth_limit = depth_limit
        rows = drafter.propose(state, drafter.max_nodes).to_rows()
        for row, (tree, text) in enumerate(zip(rows, texts, strict=True)):
            # One entry more than the text: the token after its end is not known, and not needed.
            grown[row].append(_Grown.of(tree, [*text[state.emitted(row) :], -1]))
        one = roots(state)
        host = emit(state, texts, [[] for _ in texts])
        tokens = torch.tensor(host.tokens, device=device)
        empty_path = torch.empty(len(texts), 0, dtype=torch.int32, device=device)
        verdict = Verdict(empty_path, torch.zeros_like(tokens[:, 0]), tokens)
        advance(state, host.tokens)
        state.lengths = state.lengths + 1
        drafter.observe(RoundResult(one, output, Picks(tokens), verdict, host))
    return grown


def _read(target: HFTarget, texts: Tensor) -> Iterator[tuple[int, TargetOutput]]:
    """(levels that a draft may have, the target's output) at every token of rows of one length."""
    for stretch in texts.split(_STRETCH, 1):
        limit, size = target.depth_limit(), stretch.shape[1]
        output = target.forward_tree(TreeBatch.chains(stretch))
        path = torch.arange(1, size, dtype=torch.int32, device=texts.device)
        rows = len(texts)
        target.commit(path.expand(rows, -1), [list(range(1, size))] * rows, [True] * rows)
        for at in range(size):
            features = None if output.features is None else output.features[:, at : at + 1]
            yield limit - at, TargetOutput(output.logits[:, at : at + 1], features)
