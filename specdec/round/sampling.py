"""Chooses the target's token at tree nodes, exactly as plain `generate` would choose it.

`torch.multinomial(p, 1)` draws exponential noise e and returns argmax(p / e). So the token that
plain sampling would emit as s-th is argmax(p / e_s), whatever the draft: with the noise of step s
kept on a tape, greedy decoding and sampling become the same pick, and the same seed gives the same
text. Knows nothing about drafts, caches or models; drafts that were sampled themselves go to
`rejection.py`, node by node like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.round import rejection
from specdec.round.tree import TreeBatch

Processor = Callable[[Tensor, Tensor], Tensor]
"""`LogitsProcessorList`: (ids [N, S], scores [N, V]) -> scores [N, V]."""


NOT_A_NUMBER = -2
"""Pick where the probabilities are not numbers; found out in the round's one host copy."""


def raise_unless_finite(token: int) -> None:
    """Raises what `torch.multinomial` raises for inf and NaN."""
    if token == NOT_A_NUMBER:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


def _generator(device: torch.device) -> Any:
    """What has the generator state of a device."""
    return torch.default_generator if device.type == "cpu" else _DeviceGenerator(device)


class _DeviceGenerator:
    """The default generator of an accelerator, with the two methods of `torch.Generator`."""

    def __init__(self, device: torch.device) -> None:
        self._module, self._device = torch.get_device_module(device), device

    def get_state(self) -> Tensor:
        return self._module.get_rng_state(self._device)  # type: ignore[no-any-return]

    def set_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state, self._device)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Puts torch's generators of the host and of `device` back where the block found them."""
    places = {device, torch.device("cpu")}
    before = [(generator := _generator(place), generator.get_state()) for place in places]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


class PrefixIds:
    """The ids that plain `generate` would show to processors and criteria, padding included.

    One row grows independently of the others; writing a token twice is harmless.
    """

    def __init__(self, input_ids: Tensor, max_new_tokens: int) -> None:
        batch, self.prompt_width = input_ids.shape
        self._capacity = self.prompt_width + max_new_tokens
        grown = min(self._capacity, self.prompt_width + 256)
        self._ids = input_ids.new_zeros(batch, grown)
        self._ids[:, : self.prompt_width] = input_ids
        self.device = input_ids.device

    def write(self, row: int, index: int, token: int) -> None:
        """Stores `token` as emitted token number `index` of `row`."""
        position = self.prompt_width + index
        if position >= self._ids.shape[1]:
            room = max(position + 1, 2 * self._ids.shape[1])
            extra = self._ids.new_zeros(self._ids.shape[0], room - self._ids.shape[1])
            self._ids = torch.cat([self._ids, extra], dim=1)
        self._ids[row, position] = token

    def row(self, row: int, emitted: int) -> Tensor:
        """[1, S] ids of `row` after `emitted` tokens."""
        return self._ids[row : row + 1, : self.prompt_width + emitted]


class NoiseTape:
    """The exponential noise of plain sampling, step by step, kept until every row has used it.

    Step s holds the [B, V] float32 draw that plain `generate` makes for emitted token s.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self._batch, self._device = batch, device
        self._generator = _generator(device)
        self._draws: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}  # generator state before each draw
        self._drawn = 0
        self._left = False

    def step(self, step: int, vocab_size: int) -> Tensor:
        """[B, V] noise of emitted token `step`; draws as far as needed."""
        while not self._left and self._drawn <= step:
            self._states[self._drawn] = self._generator.get_state()
            self._draws[self._drawn] = self._draw(vocab_size)
            self._drawn += 1
        if self._left and step not in self._draws:  # off the tape: drawn when it is asked for
            self._draws[step] = self._draw(vocab_size)
        return self._draws[step]

    def _draw(self, vocab_size: int) -> Tensor:
        draw = torch.empty(self._batch, vocab_size, dtype=torch.float32, device=self._device)
        return draw.exponential_(1)

    def leave(self) -> None:
        """Gives up the law of the seed: others draw from the generator too, in their own order.

        Steps are still drawn once each, but the generator stays where the call left it.
        """
        self._left = True
        self._states.clear()

    def release(self, below: int) -> None:
        """Forgets the draws before step `below`."""
        for step in [s for s in self._draws if s < below]:
            del self._draws[step]
            self._states.pop(step, None)

    def finish(self, steps: int) -> None:
        """Leaves the generator where `steps` draws of plain `generate` would leave it."""
        if steps < self._drawn and not self._left:
            self._generator.set_state(self._states[steps])


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


class TokenPicker:
    """Picks the target's token at every node, or along the path only.

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

    def __init__(
        self,
        processors: Processor | None,
        prefix: PrefixIds,
        noise: NoiseTape | None,
        along_path: bool,
        needs_prefix: bool = True,
        row_processors: Sequence[Processor] | None = None,
    ) -> None:
        self._processors, self._prefix, self._noise = processors, prefix, noise
        self._row_processors = row_processors
        self._along_path, self._needs_prefix = along_path, needs_prefix
        self._everywhere: Tensor | None = None  # scores at all nodes of the last round, or
        self._walked: dict[tuple[int, int], Tensor] = {}  # at those that the lazy walk visited
        self._drafted: tuple[Tensor, Tensor] | None = None  # sampled child of each node, its law
        self._chosen = 0  # steps that were drawn for sure, those of a failed round included

    def picks(
        self, trees: TreeBatch, logits: Tensor, state: WalkContext, stops: StopCheck
    ) -> Tensor:
        """[B, T] int64 picks; -1 at nodes that a lazy walk did not visit.

        Args:
            trees: Sealed trees. With a `draft_law`, a call that samples picks by rejection: exact
                in distribution, outside the law of the seed.
            logits: [B, T, V] target logits, any float dtype.
            state: The rows' progress.
            stops: Consulted by the lazy walk, which must not pick beyond a row's last token.
        """
        if self.picks_are_argmax:
            self._everywhere = logits.float()
            return self._everywhere.argmax(-1).to(trees.tokens.device)
        # `generate` picks where its input ids live, with that device's generator.
        logits = logits.to(self._prefix.device)
        self._drafted = self._sampled_children(trees)
        if self._along_path and (self._needs_prefix or trees.size > 1):
            picks = self._pick_along_paths(trees, logits, state, stops)
        else:
            picks = self._pick_everywhere(trees, logits, state)
        return picks.to(trees.tokens.device)

    def _sampled_children(self, trees: TreeBatch) -> tuple[Tensor, Tensor] | None:
        """(tokens [B, T], laws [B, T, V]) where this round is decided by rejection, else None."""
        if self._noise is None or trees.draft_law is None or trees.size == 1:
            return None
        self._noise.leave()
        drafted, laws = rejection.children(trees)
        return drafted.to(self._prefix.device), laws.to(self._prefix.device)

    @property
    def picks_are_argmax(self) -> bool:
        """Whether the picks are simply the best logits at every node."""
        return not self._along_path and self._processors is None and self._noise is None

    def scores(self, row: int, node: int) -> Tensor:
        """[V] processed scores at a node of the last round, as `output_scores` reports them."""
        return self._walked[row, node] if self._everywhere is None else self._everywhere[row, node]

    def walked_scores(self, row: int) -> list[Tensor]:
        """Processed scores [V] along the row's lazy walk of the last round, in order."""
        return [scores for (walked, _), scores in self._walked.items() if walked == row]

    def _pick_everywhere(self, trees: TreeBatch, logits: Tensor, state: WalkContext) -> Tensor:
        scores = logits.float()
        if self._processors is not None:
            batch, size, vocab = scores.shape
            no_ids = torch.empty(batch * size, 0, dtype=torch.long, device=scores.device)
            flat = self._processors(no_ids, scores.reshape(batch * size, vocab))
            scores = flat.view(batch, size, vocab)
        self._everywhere = scores
        if self._noise is None:
            return scores.argmax(-1)
        if self._drafted is not None:
            drafted, draft_law = self._drafted
            law = rejection.law_of(scores)
            picks = rejection.draw(law, draft_law, drafted)
            return torch.where(law.sum(-1) > 0, picks, NOT_A_NUMBER)
        levels = trees.max_depth + 1
        if trees.size == 1:  # drawn for certain; of a tree's levels only those that are accepted
            steps = (state.emitted(row) + 1 for row, active in enumerate(state.active) if active)
            self._chosen = max(self._chosen, *steps, 0)
        noise = [  # each row stands at its own step
            [self._noise.step(state.emitted(row) + level, scores.shape[-1])[row]
             for level in range(levels)] if state.active[row]
            else [torch.ones_like(scores[row, 0])] * levels
            for row in range(len(scores))
        ]  # fmt: skip
        tape = torch.stack([torch.stack(levels) for levels in noise])
        index = trees.depths()[:, :, None].expand_as(scores).to(scores.device)
        probabilities = scores.softmax(-1)
        picks = (probabilities / tape.gather(1, index)).argmax(-1)
        return torch.where(probabilities.sum(-1) > 0, picks, NOT_A_NUMBER)

    def _pick_along_paths(
        self, trees: TreeBatch, logits: Tensor, state: WalkContext, stops: StopCheck
    ) -> Tensor:
        picks = [[-1] * trees.size for _ in state.active]
        self._walked, self._everywhere = {}, None
        rows = trees.to_rows() if trees.size > 1 else None
        for row, active in enumerate(state.active):
            node: int | None = 0
            index = state.emitted(row)
            while active and node is not None:
                token = self._pick(row, index, node, logits[row, node])
                picks[row][node] = token
                if stops.is_final(row, index, token):
                    break
                node = rows[row].child(node, token) if rows is not None else None
                index += 1
        return torch.tensor(picks, device=logits.device)

    def _pick(self, row: int, index: int, node: int, logits: Tensor) -> int:
        scores = self._processed(row, index, logits)
        self._walked[row, node] = scores[0]
        token = self._choose(row, index, node, scores[0])
        self._prefix.write(row, index, token)
        return token

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
