"""Chooses the target's token at tree nodes, exactly as plain `generate` would choose it.

One class a way to pick: the best logit, all nodes at once on the device, or along the path only.
Knows nothing about drafts, caches or models; drafts that were sampled themselves go to
`rejection.py`, node by node like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

import specdec_kernels
from specdec.round import rejection
from specdec.round.noise import NoiseTape
from specdec.round.prefix import PrefixIds
from specdec.round.tree import TreeBatch

Processor = Callable[[Tensor, Tensor], Tensor]
"""`LogitsProcessorList`: (ids [N, S], scores [N, V]) -> scores [N, V]."""

NOT_A_NUMBER = -2
"""Pick where the probabilities are not numbers; found out in the round's one host copy."""


def raise_unless_finite(token: int) -> None:
    """Raises what `torch.multinomial` raises for inf and NaN."""
    if token == NOT_A_NUMBER:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


@dataclass(slots=True)
class Picks:
    """The target's tokens in one round.

    Attributes:
        ids: [B, T] int64; -1 at nodes that a lazy walk did not visit.
        everywhere: [B, T, V] processed scores, where all nodes were picked at once: float32, or any
            float dtype where they are the logits themselves.
        walked: Scores [V] by (row, node) where a lazy walk went, in its order.
    """

    ids: Tensor
    everywhere: Tensor | None = None
    walked: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def scores(self, row: int, node: int) -> Tensor:
        """[V] float32 processed scores at a node, as `output_scores` reports them."""
        if self.everywhere is None:
            return self.walked[row, node]
        return self.everywhere[row, node].float()


class WalkContext(Protocol):
    """What picking along a path asks of its surroundings."""

    active: list[bool]

    def emitted(self, row: int) -> int:
        """Tokens emitted so far in `row`."""
        ...


class StopCheck(Protocol):
    """Says whether a row ends with the token it just emitted."""

    def is_final(self, row: int, index: int, token: int) -> bool:
        """Whether emitted token number `index` ends `row`; asked in order."""
        ...


class Picker(Protocol):
    """One way to pick.

    Attributes:
        are_argmax: Whether the picks are simply the best logits at every node.
    """

    are_argmax: bool

    def picks(
        self, trees: TreeBatch, logits: Tensor, state: WalkContext, stops: StopCheck
    ) -> Picks:
        """The target's tokens of a round.

        Args:
            trees: Sealed trees. With a `draft_law`, a call that samples picks by rejection: exact
                in distribution, outside the law of the seed.
            logits: [B, T, V] target logits, any float dtype.
            state: What the rows have emitted, which prefix-dependent processors see.
            stops: Consulted by a lazy walk, which must not pick beyond a row's last token.
        """
        ...

    def walked_scores(self, row: int) -> list[Tensor]:
        """Processed scores [V] along the row's lazy walk of the round so far, in order."""
        ...

    def padding_scores(self, row: int, index: int, logits: Tensor, pad: int) -> Tensor:
        """[V] processed scores of step `index` of a row that has ended, and goes on with `pad`."""
        ...

    def release(self, emitted: Sequence[int]) -> None:
        """Drops noise that every row has used."""
        ...

    def finish(self, steps: int) -> None:
        """Sets the generator where plain `generate` leaves it after `steps` steps."""
        ...


def picker_of(
    processors: Processor | None,
    prefix: PrefixIds,
    noise: NoiseTape | None,
    along_path: bool,
    needs_prefix: bool = True,
    row_processors: Sequence[Processor] | None = None,
) -> Picker:
    """The way in which a call's tokens are picked.

    Args:
        processors: The call's logits processors, or None when there are none.
        prefix: Ids shown to processors.
        noise: Tape of the call when it samples, None for greedy decoding.
        along_path: Pick lazily, node after node: needed when a processor depends on the prefix
            (I6: it then sees exactly the emitted prefixes, once each), and cheaper where a node
            costs more than a launch. Otherwise all nodes are picked at once on the device.
        needs_prefix: Whether the lazy walk is a must; when it only saves work, rounds without a
            draft are picked at once too.
        row_processors: The processors of each row, for the lazy walk; None when the same serve all.
    """
    if along_path:
        return PathPicker(processors, prefix, noise, needs_prefix, row_processors)
    if processors is None and noise is None:
        return ArgmaxPicker(prefix)
    return NodePicker(processors, prefix, noise, row_processors)


class ArgmaxPicker:
    """Greedy, without processors: the best logit at every node, on the device of the logits."""

    are_argmax = True

    def __init__(self, prefix: PrefixIds) -> None:
        self._prefix = prefix

    def picks(
        self, trees: TreeBatch, logits: Tensor, state: WalkContext, stops: StopCheck
    ) -> Picks:
        """The best tokens of all nodes."""
        if logits.device.type == "cuda":  # [B, T, V] in float32 would cost more than the picks
            ids = specdec_kernels.row_argmax(logits)
            return Picks(ids.to(trees.tokens.device), logits)
        scores = logits.float()
        return Picks(scores.argmax(-1).to(trees.tokens.device), scores)

    def walked_scores(self, row: int) -> list[Tensor]:
        """None: nothing walks."""
        return []

    def padding_scores(self, row: int, index: int, logits: Tensor, pad: int) -> Tensor:
        """[V] the logits."""
        self._prefix.write(row, index, pad)
        return logits.to(self._prefix.device, dtype=torch.float32, copy=True)

    def release(self, emitted: Sequence[int]) -> None:
        """Nothing: there is no noise."""

    def finish(self, steps: int) -> None:
        """Nothing: there is no noise."""


class NodePicker:
    """All nodes at once, on the device where `generate` picks: that of its input ids."""

    are_argmax = False

    def __init__(
        self,
        processors: Processor | None,
        prefix: PrefixIds,
        noise: NoiseTape | None,
        row_processors: Sequence[Processor] | None = None,
    ) -> None:
        self._processors, self._prefix, self._noise = processors, prefix, noise
        self._row_processors = row_processors
        self._chosen = 0  # steps that were drawn for sure, those of a failed round included

    def picks(
        self, trees: TreeBatch, logits: Tensor, state: WalkContext, stops: StopCheck
    ) -> Picks:
        """The tokens of all nodes."""
        # 1. Scores [B, T, V], warped for every node.
        scores = logits.to(self._prefix.device).float()
        if self._processors is not None:
            batch, size, vocab = scores.shape
            no_ids = torch.empty(batch * size, 0, dtype=torch.long, device=scores.device)
            flat = self._processors(no_ids, scores.reshape(batch * size, vocab))
            scores = flat.view(batch, size, vocab)
        # 2. Ids [B, T]: the best scores, a race with the noise of each node's step, or rejection.
        drafted = self._sampled_children(trees)
        if self._noise is None:
            ids = scores.argmax(-1)
        elif drafted is not None:
            law = rejection.law_of(scores)
            ids = rejection.draw(law, drafted[1], drafted[0])
            ids = torch.where(law.sum(-1) > 0, ids, NOT_A_NUMBER)
        else:
            ids = self._raced(trees, scores, self._noise, state)
        return Picks(ids.to(trees.tokens.device), scores)

    def _raced(
        self, trees: TreeBatch, scores: Tensor, noise: NoiseTape, state: WalkContext
    ) -> Tensor:
        """[B, T] what plain sampling would emit at each node."""
        if trees.size == 1:  # drawn for certain; of a tree's levels only those that are accepted
            steps = (state.emitted(row) + 1 for row, active in enumerate(state.active) if active)
            self._chosen = max(self._chosen, *steps, 0)
        # A row that has ended draws nothing: it is given the noise of one that has not.
        going = [state.emitted(row) for row, active in enumerate(state.active) if active]
        starts = [
            state.emitted(row) if active else going[0] for row, active in enumerate(state.active)
        ]
        tape = noise.levels(starts, trees.max_depth + 1, scores.shape[-1])  # [B, levels, V]
        index = trees.depths()[:, :, None].expand_as(scores).to(scores.device)
        probabilities = scores.softmax(-1)
        ids = (probabilities / tape.gather(1, index)).argmax(-1)
        return torch.where(probabilities.sum(-1) > 0, ids, NOT_A_NUMBER)

    def _sampled_children(self, trees: TreeBatch) -> tuple[Tensor, Tensor] | None:
        """(tokens [B, T], laws [B, T, V]) where this round is decided by rejection, else None."""
        if self._noise is None or trees.draft_law is None or trees.size == 1:
            return None
        self._noise.leave()
        drafted, laws = rejection.children(trees)
        return drafted.to(self._prefix.device), laws.to(self._prefix.device)

    def walked_scores(self, row: int) -> list[Tensor]:
        """None: nothing walks."""
        return []

    def padding_scores(self, row: int, index: int, logits: Tensor, pad: int) -> Tensor:
        """[V] processed scores of step `index` of a row that has ended, and goes on with `pad`."""
        scores = self._processed(row, index, logits.to(self._prefix.device))
        self._prefix.write(row, index, pad)
        return scores[0]

    def _processed(self, row: int, index: int, logits: Tensor) -> Tensor:
        """[1, V] scores after the row's processors have seen its first `index` tokens."""
        scores = logits[None].to(copy=True, dtype=torch.float32)
        process = self._row_processors[row] if self._row_processors else self._processors
        return scores if process is None else process(self._prefix.row(row, index), scores)

    def release(self, emitted: Sequence[int]) -> None:
        """Drops noise that every row has used."""
        if self._noise is not None and emitted:
            self._noise.release(min(emitted))

    def finish(self, steps: int) -> None:
        """Sets the generator where plain `generate` leaves it after `steps` steps.

        When a processor or a criterion raised in the walk, plain's would have raised after as many
        draws as the walk has made.
        """
        if self._noise is not None:
            self._noise.finish(max(steps, self._chosen))


class PathPicker(NodePicker):
    """Node after node along the accepted path, on the prefixes that plain `generate` would show."""

    def __init__(
        self,
        processors: Processor | None,
        prefix: PrefixIds,
        noise: NoiseTape | None,
        needs_prefix: bool = True,
        row_processors: Sequence[Processor] | None = None,
    ) -> None:
        super().__init__(processors, prefix, noise, row_processors)
        self._needs_prefix = needs_prefix
        self._walked: dict[tuple[int, int], Tensor] = {}  # scores of this round, for criteria
        self._drafted: tuple[Tensor, Tensor] | None = None  # sampled child of each node, its law

    def picks(
        self, trees: TreeBatch, logits: Tensor, state: WalkContext, stops: StopCheck
    ) -> Picks:
        """The tokens along each path; of a round without a draft, all at once where that may be."""
        self._walked = {}
        if not self._needs_prefix and trees.size == 1:
            return super().picks(trees, logits, state, stops)
        logits = logits.to(self._prefix.device)
        self._drafted = self._sampled_children(trees)
        ids = [[-1] * trees.size for _ in state.active]
        rows = trees.to_rows() if trees.size > 1 else None
        for row, active in enumerate(state.active):
            node: int | None = 0
            index = state.emitted(row)
            while active and node is not None:
                # 1. The token after this node, and 2. whether it is the row's last.
                token = self._pick(row, index, node, logits[row, node])
                ids[row][node] = token
                if stops.is_final(row, index, token):
                    break
                # 3. On to the child that carries it, if there is one.
                node = rows[row].child(node, token) if rows is not None else None
                index += 1
        return Picks(torch.tensor(ids, device=trees.tokens.device), walked=self._walked)

    def walked_scores(self, row: int) -> list[Tensor]:
        """Processed scores [V] along the row's walk of the round so far, in order."""
        return [scores for (walked, _), scores in self._walked.items() if walked == row]

    def _pick(self, row: int, index: int, node: int, logits: Tensor) -> int:
        scores = self._processed(row, index, logits)
        self._walked[row, node] = scores[0]
        token = self._choose(row, index, node, scores[0])
        self._prefix.write(row, index, token)
        return token

    def _choose(self, row: int, index: int, node: int, scores: Tensor) -> int:
        """The token that processed scores [V] give at a node."""
        if self._noise is None:
            return int(scores.argmax(-1))
        probabilities = scores.softmax(-1)
        raise_unless_finite(0 if probabilities.sum() > 0 else NOT_A_NUMBER)
        if self._drafted is not None:
            drafted, draft_law = (each[row, node] for each in self._drafted)
            return int(rejection.draw(rejection.law_of(scores), draft_law, drafted))
        noise = self._noise.step(index, scores.shape[-1])[row]
        self._chosen = max(self._chosen, index + 1)
        return int((probabilities / noise).argmax(-1))
