"""What a call measured: one `RoundRecord` per target forward, summed up in `GenerationStats`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from specdec.round.tree import TokenTree
from specdec.round.verify import HostVerdict

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round of one call, as `on_round` callbacks and the JSONL trace see it.

    Attributes:
        index: Number of the round, from 1; the prefill is round 0 and emits one token a row.
        nodes: Tree size T of the forward, padding included.
        tokens: Emitted tokens of each row (empty for finished rows).
        paths: Accepted nodes of each row.
        trees: Proposed trees; only filled when somebody looks.
        seconds: Host seconds by stage (draft, forward, verify, commit, observe).
    """

    index: int
    nodes: int
    tokens: list[list[int]]
    paths: list[list[int]]
    seconds: dict[str, float]
    trees: list[TokenTree] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)


@dataclass(slots=True)
class GenerationStats:
    """Totals of one `generate` call.

    Attributes:
        method: Name of the drafter that ran, as registered.
        mode: "tree" or "chain", or "plain" when the call ran as plain `generate`.
        mode_reason: Why the model is verified in this mode, in words.
        options: Options of the method, as given or chosen.
        new_tokens: Emitted tokens over all rows, after the stop rules.
        rounds: Target forwards over trees, prefill not counted.
        prefill_forwards: Target forwards over the prompt.
        histogram: Emitted tokens of a row in a round -> how often, prefill not counted.
        tokens_by_source: How many emitted tokens each source of the drafter won; "target" counts
            the bonus and correction tokens that the target itself added.
        drafted_nodes: Nodes proposed below the root, over active rows.
        seconds: Host seconds by stage; on a GPU the device may still be busy when a stage ends.
    """

    method: str
    mode: str = "tree"
    mode_reason: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    new_tokens: int = 0
    rounds: int = 0
    prefill_forwards: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    tokens_by_source: Counter[str] = field(default_factory=Counter)
    drafted_nodes: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    device_to_host_copies: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tau: emitted tokens per row and round, bonus and correction included."""
        emitting = sum(self.histogram.values())
        return sum(n * times for n, times in self.histogram.items()) / max(emitting, 1)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over target forwards, prefill included: what a peer's step count gives."""
        return self.new_tokens / max(self.rounds + self.prefill_forwards, 1)

    def __str__(self) -> str:
        """A few readable lines."""
        options = ", ".join(f"{name} {_brief(value)}" for name, value in self.options.items())
        won = ", ".join(f"{name} {count}" for name, count in self.tokens_by_source.most_common())
        seconds = ", ".join(f"{stage} {value:.3f}" for stage, value in self.seconds.items())
        return (
            f"{self.method}{f' ({options})' if options else ''}: {self.mode}, {self.mode_reason}\n"
            f"{self.new_tokens} tokens in {self.rounds} rounds, acceptance length "
            f"{self.acceptance_length:.2f}\n"
            f"tokens won by: {won}\nseconds: {seconds}"
        )

    def add_prefill(self, verdict: HostVerdict, forwards: int) -> None:
        """Counts the prompt's forwards and the tokens that they gave."""
        self.prefill_forwards = forwards
        emitted = sum(map(len, verdict.tokens))
        self.new_tokens += emitted
        self.tokens_by_source["target"] += emitted

    def add_round(
        self, record: RoundRecord, verdict: HostVerdict, source_names: Sequence[str]
    ) -> None:
        """Counts one round, after the stop rules; names are those of the drafter's sources."""
        self.rounds += 1
        for row, tokens in enumerate(verdict.tokens):
            if not tokens:
                continue
            self.new_tokens += len(tokens)
            self.histogram[len(tokens)] += 1
            self.drafted_nodes += verdict.drafted[row]
            won = verdict.sources[row][: len(tokens)]
            for source in won:
                known = 0 <= source < len(source_names)
                self.tokens_by_source[source_names[source] if known else "unnamed"] += 1
            self.tokens_by_source["target"] += len(tokens) - len(won)
        self.seconds.update(record.seconds)


def timed(stage: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Adds a method's host seconds to its object's `seconds`, under the name of a stage."""

    def decorate(method: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(method)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            start, seconds = perf_counter(), args[0].seconds  # type: ignore[attr-defined]
            try:
                return method(*args, **kwargs)
            finally:
                seconds[stage] = seconds.get(stage, 0.0) + perf_counter() - start

        return run

    return decorate


def _brief(value: object) -> str:
    """The value, or the type of an object whose own text would fill a page, as a model's does."""
    text = str(value)
    return text if len(text) <= 80 and "\n" not in text else type(value).__name__
