"""What a call gives back besides ids: scores, logits, hidden states, streamed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.contracts import BatchState, RoundResult, TargetOutput
from specdec.round.pickers import Picker
from specdec.stats import RoundRecord


class WantedOutputs(NamedTuple):
    """Which optional outputs a call returns."""

    scores: bool = False
    logits: bool = False
    hidden_states: bool = False


class Recorder:
    """Collects scores, logits and hidden states of the emitted tokens.

    Rows that end early go on with what their padding produces, as plain `generate` reports it.

    Args:
        wanted: Which of them.
        state: The rows, at the start of the call.
        picker: Chooses the tokens.
        lay_out: Pads the prompt's hidden states as the batch is.
    """

    def __init__(
        self,
        wanted: WantedOutputs,
        state: BatchState,
        picker: Picker,
        lay_out: Callable[[Tensor], Tensor],
    ) -> None:
        self.wanted = wanted
        self._lay_out, self._picker = lay_out, picker
        rows = range(len(state.tokens))
        self._scores: list[list[Tensor]] = [[] for _ in rows]
        self._logits: list[list[Tensor]] = [[] for _ in rows]
        self._hidden: list[list[tuple[Tensor, ...]]] = [[] for _ in rows]
        self._prompt_hidden: tuple[Tensor, ...] = ()

    def scores_so_far(self, row: int) -> tuple[Tensor, ...] | None:
        """What criteria see as `scores`: this round's picks included."""
        if not self.wanted.scores:
            return None
        recent = self._picker.walked_scores(row)
        return tuple(score[None] for score in [*self._scores[row], *recent])

    def __call__(self, result: RoundResult, record: RoundRecord) -> None:
        """Keeps what the emitted tokens' nodes produced; copies, so that the round is let go."""
        if record.index == 0:
            self._prompt_hidden = result.output.hidden_states or ()
        for row, tokens in enumerate(result.host.tokens):
            for node in [0, *result.host.paths[row]][: len(tokens)]:
                if self.wanted.scores:
                    self._scores[row].append(result.picks.scores(row, node).clone())
                if self.wanted.logits:
                    self._logits[row].append(_copied_float(result.output.logits[row, node]))
                if self.wanted.hidden_states and record.index > 0:
                    self._add_hidden(row, node, result.output)

    def _add_hidden(self, row: int, node: int, output: TargetOutput) -> None:
        hidden = output.hidden_states or ()
        self._hidden[row].append(tuple(layer[row, node].clone() for layer in hidden))

    def add_padding(
        self, output: TargetOutput, first: Sequence[int], counts: Sequence[int], pad: int
    ) -> None:
        """Keeps what ended rows produce while they are run over their padding.

        Args:
            output: Of a forward whose first `counts[row]` nodes are tokens of the row.
            first: Step of each row whose scores its first node gives.
            counts: Nodes of each row; 0 for rows that are not run.
            pad: Padding id, which goes into the prefix that processors see.
        """
        for row, count in enumerate(counts):
            for node, step in enumerate(range(first[row], first[row] + count)):
                logits = output.logits[row, node]
                if self.wanted.scores and step == len(self._scores[row]):
                    self._scores[row].append(self._picker.padding_scores(row, step, logits, pad))
                if self.wanted.logits and step == len(self._logits[row]):
                    self._logits[row].append(_copied_float(logits))
                if self.wanted.hidden_states and step == len(self._hidden[row]) + 1:
                    self._add_hidden(row, node, output)

    def outputs(self, steps: int) -> dict[str, Any]:
        """The fields of the output object that were asked for, `steps` entries each."""
        found: dict[str, Any] = {}
        if self.wanted.scores:
            found["scores"] = _by_step(self._scores, steps)
        if self.wanted.logits:
            found["logits"] = _by_step(self._logits, steps)
        if self.wanted.hidden_states:
            found["hidden_states"] = self._hidden_by_step(steps)
        return found

    def _hidden_by_step(self, steps: int) -> tuple[tuple[Tensor, ...], ...]:
        prompt = [self._lay_out(layer) for layer in self._prompt_hidden]
        layers = [
            _by_step([[node[index] for node in row] for row in self._hidden], steps - 1)
            for index in range(len(prompt))
        ]
        later = [tuple(layer[step][:, None] for layer in layers) for step in range(steps - 1)]
        return (tuple(prompt), *later)


def _copied_float(logits: Tensor) -> Tensor:
    return logits.to(copy=True, dtype=torch.float32)


def _by_step(rows: list[list[Tensor]], steps: int) -> tuple[Tensor, ...]:
    """Per-row lists -> per-step [B, ...] tensors."""
    return tuple(torch.stack([row[step] for row in rows]) for step in range(steps))


class StreamObserver:
    """Feeds the streamer token by token, as plain `generate` does."""

    def __init__(self, streamer: Any, state: BatchState, pad_id: int | None) -> None:
        self._streamer, self._state, self._step = streamer, state, 0
        self._pad_id = 0 if pad_id is None else pad_id

    def __call__(self, result: RoundResult, record: RoundRecord) -> None:
        """Sends every step that all rows have reached; ended rows are padded."""
        state = self._state
        rows = range(len(state.tokens))
        unfinished = [state.emitted(row) for row in rows if state.active[row]]
        ready = min(unfinished) if unfinished else max(map(state.emitted, rows))
        for step in range(self._step, ready):
            self._streamer.put(torch.tensor([self._token(row, step) for row in rows]))
        self._step = ready

    def _token(self, row: int, step: int) -> int:
        if step >= self._state.emitted(row):
            return self._pad_id
        return self._state.tokens[row][self._state.prompt_lengths[row] + step]
