"""What `tune` costs beside an exhaustive grid, and how good its choice is.

Tunes, then times every point of a grid beside plain decoding on the same prompts, and compares the
processor seconds of the two. The grid holds points of all methods that `tune` may choose from, so
many in all and evenly spread over the sizes of each; it is charged for its timed answers alone,
`tune` for all that it does. It tunes before and after, because a busy machine stretches processor
time, too. Last, what it chose meets the fastest of the grid again, in new and more repeats, because
the fastest of many by one measurement looks faster than it is. Run:

    python benchmarks/tune_cost.py --data FOLDER --dtype float32
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import specdec
from specdec.artifacts.places import DRAFT_HEAD, head_path
from specdec.cost.tuned_file import TunedChoice
from specdec.loading import TOY, load_model, load_tokenizer
from specdec_bench.contracts import Workbench
from specdec_bench.measure.loaded import clear_generation_config, end_ids
from specdec_bench.measure.units import Maker
from specdec_bench.results.records import CurveRecord, Setting
from specdec_bench.summary.intervals import Ratio, time_ratio
from specdec_bench.tasks import load_tasks
from specdec_bench.tune.grid import Candidate, grid_of
from specdec_bench.tune.measured import PLAIN, Bench
from specdec_bench.tune.options import TuneOptions
from specdec_bench.tune.timing import Race
from specdec_bench.tune.tuner import tune


@dataclass(frozen=True)
class Options:
    """What to measure; the target is the bundled one."""

    data: Path | None = None
    """Folder of the named tasks."""
    tasks: tuple[str, ...] = ("humaneval",)
    """Prompts, as of `specdec bench tune`."""
    limit: int = 12
    """Prompts in all."""
    max_new_tokens: int = 96
    """New tokens of a prompt, at most."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the target."""
    points: int = 148
    """Points of the grid."""
    pairs: int = 2
    """Repeats of the grid."""
    best: int = 5
    """Points of the grid that the choice meets again."""
    best_pairs: int = 8
    """Repeats of that."""


def spread(found: Sequence[Candidate], count: int) -> list[Candidate]:
    """So many of them, evenly over their order."""
    step = len(found) / count
    return [found[int((number + 0.5) * step)] for number in range(count)]


def grid_points(methods: Sequence[str], count: int) -> list[Candidate]:
    """Points of all methods, as many of each as it has and as the others leave."""
    sizes = sorted((grid_of(method, on_cpu=True).candidates() for method in methods), key=len)
    points: list[Candidate] = []
    for done, found in enumerate(sizes):
        share = (count - len(points)) // (len(sizes) - done)
        points += spread(found, min(share, len(found)))
    return points


def say(line: str) -> None:
    """What goes on, beside the tables."""
    print(line, file=sys.stderr, flush=True)


def make_bench(options: Options) -> Bench:
    """The model and the units that `tune` had."""
    model, tokenizer = load_model(TOY, options.dtype, "cpu"), load_tokenizer(TOY)
    ends, setting = frozenset(end_ids(model)), Setting(options.dtype)
    clear_generation_config(model)
    specdec.augment(model, "none")
    workbench = Workbench(model, tokenizer, setting, {DRAFT_HEAD: lambda: str(head_path())})
    maker = Maker(
        model, tokenizer, setting, workbench.sampling(), options.max_new_tokens, ends,
        only_counted=True,
    )  # fmt: skip
    units, _ = maker.make(0, load_tasks(options.tasks, options.data, options.limit))
    return Bench(workbench, units, CurveRecord(options.dtype, 1, {}))


def cost(race: Race) -> float:
    """Seconds of all timed answers of a race, plain's among them, without warming up."""
    found = list(race.seconds.values())
    plain = sum(plain for repeats in found[0].values() for plain, _ in repeats)
    return plain + sum(
        own for by_unit in found for repeats in by_unit.values() for _, own in repeats
    )


def over(race: Race, candidate: Candidate, other: Candidate, these: bool = True) -> Ratio:
    """How many times as fast the candidate is; either may be plain.

    Args:
        race: Has timed both.
        candidate: Whose speed.
        other: Relative to whose.
        these: The interval holds for these prompts, from repeat to repeat; else for others like
            them.
    """
    units = sorted(next(iter(race.seconds.values())))

    def seconds(one: Candidate) -> list[list[float]]:
        if one == PLAIN:
            beside = next(iter(race.seconds.values()))
            return [[plain for plain, _ in beside[unit]] for unit in units]
        return [[own for _, own in race.seconds[one][unit]] for unit in units]

    clusters = [0 if these else unit for unit in units]
    return time_ratio(seconds(other), seconds(candidate), clusters, [""] * len(units))


def candidate_of(choice: TunedChoice) -> Candidate:
    """The choice as a point; its draft is what the bench has."""
    sizes = tuple((name, value) for name, value in choice.options.items() if name != "draft")
    return Candidate(choice.method, sizes)


def tuned(options: Options) -> tuple[Candidate, list[str], float]:
    """What `tune` chooses, the methods that it chose from, and its processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TuneOptions(
            tasks=options.tasks, data=options.data, limit=options.limit, dtype=options.dtype,
            max_new_tokens=options.max_new_tokens, device="cpu", output=Path(folder) / "tuned.json",
        )  # fmt: skip
        start = time.process_time()
        _, results = tune(settings, say)
        seconds = time.process_time() - start
    say(f"{results[1].choice.method}, {seconds:.1f} s")
    return candidate_of(results[1].choice), list(settings.method_list), seconds


def print_results(
    grid: Race, again: Race, choices: Sequence[Candidate], seconds: Sequence[float]
) -> None:
    """The tables: what it cost, and how the choices do beside the best of the grid."""
    of_grid, points = cost(grid), len(grid.seconds)
    print(f"grid of {points} points: {of_grid:.1f} s of processor time")
    for when, choice, taken in zip(("before", "after"), choices, seconds, strict=True):
        print(f"tune {when} it: {taken:.1f} s, {taken / of_grid:.1%} of that; chose {choice}")
    print(f"mean of the two: {statistics.mean(seconds) / of_grid:.1%}\n")
    print("| point | over plain, in the grid | again |")
    print("|---|---|---|")
    for point in again.seconds:
        first = f"{grid.gain(point)}" if point in grid.seconds else ""
        print(f"| {point} | {first} | {again.gain(point)} |")
    met = [point for point in again.seconds if point in grid.seconds]
    fastest = max(met, key=lambda point: again.gain(point).value)
    for choice in dict.fromkeys(choices):
        print(f"\n{choice} over {fastest}, the fastest point of the grid:")
        print(f"{over(again, choice, fastest)} on these prompts,")
        print(f"{over(again, choice, fastest, these=False)} on prompts like them")


def main() -> None:
    """Measures and prints the tables last."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    first, methods, before = tuned(options)
    bench = make_bench(options)
    points = grid_points(methods, options.points)
    say(f"timing {len(points)} points on {len(bench.units)} prompts")
    grid = Race(bench, by_cpu=True)
    grid.time(points, bench.units, options.pairs)
    second, _, after = tuned(options)
    ranked = sorted(grid.seconds, key=lambda point: -grid.gain(point).value)[: options.best]
    choices = [choice for choice in dict.fromkeys((first, second)) if choice != PLAIN]
    say("timing the best of them and the choices again")
    again = Race(bench, by_cpu=True)
    again.time(list(dict.fromkeys([*ranked, *choices])), bench.units, options.best_pairs)
    tokens = sum(unit.record.new_tokens for unit in bench.units)
    print(f"\n{options.dtype}, {len(bench.units)} prompts with {tokens} tokens, one thread\n")
    print_results(grid, again, (first, second), (before, after))


if __name__ == "__main__":
    main()
