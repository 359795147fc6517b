"""Predicts the speed-up of every size that is worth looking at, without timing any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.errors import SpecdecError
from specdec_bench.arm_names import ArmSpec
from specdec_bench.contracts import Unit
from specdec_bench.tune.forced import STATE_READERS, ForcedTrees, force, verifies_trees
from specdec_bench.tune.grid import Candidate, Grid, climb, grid_of
from specdec_bench.tune.measured import Bench, Rounds, beginning
from specdec_bench.tune.replayed import TEXT_ONLY, replay

_MOST_LOOKED_AT = {"lookahead": 12, "recycling": 8, "jacobi": 8, "prompt_lookup": 40,
                   "suffix": 40, "draft_model": 21, "eagle3": 160}  # fmt: skip
_PROBED = 32  # tokens of an answer that shows what a round costs
_ALIKE = 1.02
_IN_SIGHT = 0.8  # of the highest prediction


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of a candidate.

    Attributes:
        candidate: Method and sizes.
        speedup: Over decoding without speculation.
        tau: Tokens a row and round.
        nodes: Drafted nodes of a mean forward.
    """

    candidate: Candidate
    speedup: float
    tau: float
    nodes: float


@dataclass
class Search:
    """Forecasts of one method.

    Attributes:
        bench: Model, units and costs.
        method: Which.
        skipped: Why the method cannot run here; empty when it can.
    """

    bench: Bench
    method: str
    skipped: str = ""
    _found: dict[Candidate, Forecast] = field(default_factory=dict)
    _stages: dict[Candidate, Mapping[str, float]] = field(default_factory=dict)
    _forced: ForcedTrees | None = None

    def run(self) -> list[Forecast]:
        """Forecasts on the way to the best sizes, best first."""
        grid = grid_of(self.method, not self.bench.on_device)
        try:
            look = self._way()
            climb(grid, lambda candidate: look(candidate, grid), _MOST_LOOKED_AT[self.method])
        except SpecdecError as problem:
            self.skipped = str(problem)
        return sorted(self._found.values(), key=lambda forecast: -forecast.speedup)

    def _way(self) -> Callable[[Candidate, Grid], float | None]:
        if not verifies_trees(self.bench.workbench.model):
            return self._by_passes  # what chains cost there, only real answers show
        if self.method in TEXT_ONLY:
            return self._by_replay
        if self.method in STATE_READERS:
            return self._by_forced_trees
        return self._by_passes

    def _keep(
        self,
        candidate: Candidate,
        rounds: Rounds,
        units: Sequence[Unit],
        stages: Mapping[str, float],
    ) -> float | None:
        speedup = self.bench.predict(rounds, units, stages)
        if speedup is not None:
            self._found[candidate] = Forecast(candidate, speedup, rounds.tau, rounds.nodes)
        return speedup

    def _by_replay(self, candidate: Candidate, grid: Grid) -> float | None:
        """Rounds from the text alone; what the loop adds comes from one real answer."""
        model, rounds = self.bench.workbench.model, Rounds()
        vocab_size = model.config.get_text_config().vocab_size
        for unit in self.bench.units:
            rounds.add(replay(candidate, unit, vocab_size))
        return self._keep(candidate, rounds, self.bench.units, self._loop_costs(grid, rounds))

    def _loop_costs(self, grid: Grid, rounds: Rounds) -> dict[str, float]:
        """Seconds a round of verify and commit of the method's first start; its own drafting."""
        start = grid.at(tuple(grid.starts[0]))
        if start not in self._stages:
            real = self.bench.run(start, [beginning(self.bench.units[0], _PROBED)])
            self._stages[start] = self.bench.paced(real)
        own = {stage: rounds.typical(stage) for stage in ("draft", "observe")}
        return {**self._stages[start], **own}

    def _by_forced_trees(self, candidate: Candidate, grid: Grid) -> float | None:
        """Rounds from the largest trees at every position of some prompts; draft costs by the
        number of levels."""
        bench, units = self.bench, self.bench.part(0)
        if self._forced is None:
            options: dict[str, Any] = dict(STATE_READERS[self.method])
            options["draft"] = bench.workbench.draft(ArmSpec(self.method, self.method))
            self._forced = force(self.method, options, bench.workbench.model, units)
            bench.passes += len(units)
        rounds, levels = self._forced.simulate(candidate)
        return self._keep(candidate, rounds, units, self._draft_costs(candidate, grid, levels))

    def _draft_costs(self, candidate: Candidate, grid: Grid, levels: float) -> dict[str, float]:
        """Seconds a round by stage: linear in the levels and in the width between real answers.

        Width is how many nodes a pass of the draft reads. A chain is drafted in a way of its own,
        and so is a tree that continues one node. One level continues none, however wide it is.
        """
        widths, long = grid.axes["top_k"], 4
        top_k = candidate.mapping["top_k"]
        width = min(candidate.mapping.get("beam", top_k), top_k)
        first = self._probe(grid, 1, widths[0])
        if width == 1:
            ends, share = [self._probe(grid, long, min(top_k, widths[1]), 1)] * 2, 0.0
        else:
            ends = [self._probe(grid, long, end) for end in (widths[1], widths[-1])]
            share = (width - widths[1]) / (widths[-1] - widths[1])
        deep = ends[0]["draft"] + share * (ends[1]["draft"] - ends[0]["draft"])
        draft = first["draft"] + (max(levels, 1.0) - 1) / (long - 1) * (deep - first["draft"])
        return {**ends[0], "draft": max(draft, 0.0)}

    def _probe(
        self, grid: Grid, depth: int, top_k: int, beam: int | None = None
    ) -> Mapping[str, float]:
        """Seconds a round by stage of one size, from the beginning of a real answer."""
        sizes: dict[str, Any] = {"top_k": top_k}
        if self.method == "eagle3":
            all_of_them = grid.axes["beam"][-1]
            sizes["beam"] = all_of_them if beam is None or top_k == 1 else beam
            sizes |= {"depth": depth, "confidence_threshold": 0.0, "nodes": 63 if top_k == 1 else 7}
        else:
            sizes["num_draft_tokens"] = depth
        probe = Candidate(self.method, tuple((name, sizes[name]) for name in grid.axes))
        if probe not in self._stages:
            real = self.bench.run(probe, [beginning(self.bench.units[0], _PROBED)])
            self._stages[probe] = self.bench.paced(real)
        return self._stages[probe]

    def _by_passes(self, candidate: Candidate, grid: Grid) -> float | None:
        """Rounds of real answers to some of the prompts: what such a method learns depends on what
        was verified."""
        units = self.bench.part(0)
        rounds = self.bench.run(candidate, units)
        return self._keep(candidate, rounds, units, self.bench.paced(rounds))


def text_rounds(bench: Bench) -> list[list[int]]:
    """By unit, the rounds of drafts from the text alone: bold ones and careful ones."""
    vocab_size = bench.workbench.model.config.get_text_config().vocab_size
    starts = [
        grid.at(tuple(start))
        for grid in (grid_of(method, on_cpu=True) for method in TEXT_ONLY)
        for start in grid.starts
    ]
    return [
        [len(replay(start, unit, vocab_size).sizes) for start in starts] for unit in bench.units
    ]


def best_of(forecasts: Mapping[str, list[Forecast]], most: int, each: int) -> list[Candidate]:
    """The candidates to time: the best of every method, and the best of all.

    Args:
        forecasts: By method, best first.
        most: Candidates in all.
        each: Candidates of a method at most.
    """
    kept: list[tuple[int, Forecast]] = []
    for found in forecasts.values():
        own: list[Forecast] = []
        for forecast in found:
            if len(own) < each and not any(_alike(forecast, other) for other in own):
                own.append(forecast)
        kept += enumerate(own)
    highest = max((forecast.speedup for _, forecast in kept), default=0.0)
    # Predictions err by method: the first of each counts for more, unless it is far behind.
    kept.sort(
        key=lambda item: (item[0] > 0 or item[1].speedup < _IN_SIGHT * highest, -item[1].speedup)
    )
    return [forecast.candidate for _, forecast in kept[:most]]


def _alike(one: Forecast, other: Forecast) -> bool:
    """Whether two candidates of a method draft the same, nearly: timing both would tell nothing."""
    taus = max(one.tau, other.tau) / min(one.tau, other.tau)
    nodes = abs(one.nodes - other.nodes) / max(one.nodes, other.nodes, 1.0)
    return taus < _ALIKE and nodes < 2 * (_ALIKE - 1)


def as_json(forecast: Forecast) -> dict[str, Any]:
    """For the table in the tuned file."""
    return {
        "method": forecast.candidate.method,
        "options": forecast.candidate.mapping,
        "tau": forecast.tau,
        "nodes": forecast.nodes,
        "predicted": forecast.speedup,
    }
