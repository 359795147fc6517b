"""`tune`: from a target and prompts to the method and sizes that pay here, or to none.

First everything is predicted: what a round of any size would accept is derived from a few passes
(see `tune.search`), and what it costs from the measured curve t(q). Then only the best few are
timed, interleaved with plain decoding, fewer in every round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.api import augment, capability
from specdec.artifacts.atomic_files import make_folder
from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL, Kind, locate
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.cost.curve import measure_cost
from specdec.cost.tuned_file import TunedChoice, TunedFile, conditions, write_tuned
from specdec.errors import ConfigError, SpecdecError
from specdec.loading import TOY, check_model, load_model, load_tokenizer
from specdec_bench.contracts import Workbench
from specdec_bench.measure.loaded import clear_generation_config, end_ids, is_on_cpu, torch_threads
from specdec_bench.measure.units import Maker
from specdec_bench.results.provenance import provenance
from specdec_bench.results.records import CurveRecord, Setting
from specdec_bench.summary.intervals import Ratio
from specdec_bench.tasks import Prompt, load_tasks
from specdec_bench.tune.forced import verifies_trees
from specdec_bench.tune.grid import Candidate, grid_of
from specdec_bench.tune.measured import Bench
from specdec_bench.tune.options import TuneOptions, check_tune_options
from specdec_bench.tune.search import Forecast, Search, as_json, best_of, text_rounds
from specdec_bench.tune.timing import Race

_CURVE_SECONDS = 1.0
_SHARE_OF_METHOD = 2  # one method has at most one in so many of the timed candidates

Say = Callable[[str], object]


@dataclass(frozen=True)
class BatchResult:
    """What was found for one batch size.

    Attributes:
        choice: What to do.
        forecasts: All candidates that were looked at, best prediction first.
        gains: Measured speed-up of those that were timed.
        skipped: Method -> why it could not run here.
        curve: q -> seconds.
        passes: Instrumented answers.
        timings: Timed answers.
        seconds: Wall seconds.
    """

    choice: TunedChoice
    forecasts: Sequence[Forecast]
    gains: Mapping[Candidate, Ratio]
    skipped: Mapping[str, str]
    curve: Mapping[str, float]
    passes: float
    timings: int
    seconds: float


def tune(
    options: TuneOptions, say: Say = lambda _: None
) -> tuple[TunedFile, dict[int, BatchResult]]:
    """Tunes, and writes the file.

    Args:
        options: Target, methods, prompts and where to.
        say: Told what goes on, a line at a time.

    Returns:
        What was written, and how it was found, by batch size.

    Raises:
        SpecdecError: An option, the model, the prompts or the file is wrong.
    """
    check_tune_options(options)
    on_cpu = is_on_cpu(options.device)
    for method in options.method_list:
        grid_of(method, on_cpu)
    check_model(options.target)
    _make_room(options.output)
    prompts = load_tasks(options.tasks or ("smoke",), options.data, options.limit, options.seed)
    with torch_threads(options.device, options.threads):
        model, tokenizer = _load(options), load_tokenizer(options.target)
        ends = frozenset(end_ids(model))
        clear_generation_config(model)
        augment(model, "none")
        if capability(model).mode == "plain":
            raise SpecdecError(
                f"{options.target} cannot be sped up: {capability(model).reason}; nothing to tune"
            )
        drafts = _drafts(options, model)
        dtype, results = str(model.dtype).removeprefix("torch."), {}
        for batch in options.batches or (1,):
            setting = Setting(dtype, batch)
            workbench = Workbench(model, tokenizer, setting, drafts)
            maker = Maker(
                model, tokenizer, setting, workbench.sampling(), options.max_new_tokens, ends,
                only_counted=True,
            )  # fmt: skip
            results[batch] = _tune_batch(workbench, maker, prompts, options, say)
        found = TunedFile(
            target=TargetFingerprint.of(model.config, tokenizer),
            choices={batch: result.choice for batch, result in results.items()},
            details=_details(model, prompts, options, results),
            **conditions(model),
        )
    if options.output is not None:
        write_tuned(options.output.expanduser(), found)
    return found, results


def _tune_batch(
    workbench: Workbench,
    maker: Maker,
    prompts: Sequence[Prompt],
    options: TuneOptions,
    say: Say,
) -> BatchResult:
    start, setting = time.perf_counter(), workbench.setting
    say(f"{setting}: plain's texts")
    units, skipped_units = maker.make(0, prompts)
    if len(units) < 2:
        raise ConfigError(
            f"tuning for batch {setting.batch} needs two batches of prompts with texts of 16 "
            f"tokens, and has {len(units)} ({skipped_units.short} texts were too short); take "
            "other prompts, a larger --limit or --max-new-tokens"
        )
    say(f"{setting}: what a forward costs")
    curve = _curve(workbench.model, setting)
    bench = Bench(workbench, units, curve)
    bench.measure_plain()
    bench.text_rounds = text_rounds(bench)
    forecasts, skipped = {}, {}
    for method in options.method_list:
        say(f"{setting}: predicting {method}")
        search = Search(bench, method)
        forecasts[method] = search.run()
        if search.skipped:
            skipped[method] = search.skipped
    each = max(1, options.candidates // _SHARE_OF_METHOD)
    promising = best_of(forecasts, options.candidates, each)
    race = Race(bench, _by_cpu(workbench.model))
    if promising:
        say(f"{setting}: timing the best {len(promising)}")
        race.run(promising)
    gains = {c: race.gain(c) for c in race.seconds if race.seconds[c] and c not in race.failed}
    every = sorted((f for found in forecasts.values() for f in found), key=lambda f: -f.speedup)
    choice = _choose(race, every, options)
    return BatchResult(
        choice, every, gains, skipped, curve.seconds, bench.passes, race.timings,
        time.perf_counter() - start,
    )  # fmt: skip


def _curve(model: Any, setting: Setting) -> CurveRecord:
    """t(q); flat where no tree can be timed, so that real answers alone decide."""
    if not verifies_trees(model):
        return CurveRecord(setting.dtype, setting.batch, {})
    found = measure_cost(model, _CURVE_SECONDS, setting.batch).seconds
    return CurveRecord(setting.dtype, setting.batch, {str(q): s for q, s in found.items()})


def _choose(race: Race, every: Sequence[Forecast], options: TuneOptions) -> TunedChoice:
    """The fastest that is shown to gain, by the last round alone.

    The rounds before it chose the finalists: the best of several by the same figures that chose it
    looks faster than it is.
    """
    paying = [c for c in race.finalists if race.final_gain(c).low > 1]
    if not paying:
        return TunedChoice("none")
    winner = paying[0]
    gain = race.final_gain(winner)
    predicted = next(f.speedup for f in every if f.candidate == winner)
    chosen = winner.mapping
    if winner.method == "eagle3":
        chosen["draft"] = located(options.head or TOY, DRAFT_HEAD)
    if winner.method == "draft_model" and options.draft is not None:
        chosen["draft"] = located(options.draft, DRAFT_MODEL)
    high = min(gain.high, 1e9)  # without an interval it is infinite, which JSON is not
    return TunedChoice(winner.method, chosen, predicted, (gain.value, gain.low, high))


def located(name: str, kind: Kind) -> str:
    """A folder by its whole path, so that the file can be used from elsewhere; hub ids stay."""
    place = locate(name, kind)
    return str(Path(place.name).resolve()) if place.is_folder else place.name


def _details(
    model: Any,
    prompts: Sequence[Prompt],
    options: TuneOptions,
    results: Mapping[int, BatchResult],
) -> dict[str, Any]:
    batches = {}
    for batch, result in results.items():
        rows = []
        for forecast in result.forecasts:
            gain = result.gains.get(forecast.candidate)
            measured = None if gain is None else [gain.value, gain.low, min(gain.high, 1e9)]
            rows.append({**as_json(forecast), "measured": measured})
        batches[str(batch)] = {
            "curve": dict(result.curve),
            "candidates": rows,
            "skipped": dict(result.skipped),
            "passes": result.passes,
            "timings": result.timings,
            "seconds": result.seconds,
        }
    facts = provenance(
        model,
        prompts,
        target=options.target,
        tasks=list(options.tasks or ("smoke",)),
        max_new_tokens=options.max_new_tokens,
    )
    return {"provenance": facts, "methods": list(options.method_list), "batches": batches}


def _make_room(output: Path | None) -> None:
    """Makes the file's folder: what cannot be written is better known before than after."""
    if output is None:
        return
    try:
        make_folder(output.expanduser().parent)
    except OSError as problem:
        raise ConfigError(f"cannot write --output {output}: {problem.strerror}") from problem


def _by_cpu(model: Any) -> bool:
    """Whether processor time is the whole story: others on the machine do not disturb it."""
    return bool(model.device.type == "cpu") and torch.get_num_threads() == 1


def _load(options: TuneOptions) -> Any:
    return load_model(options.target, options.dtype, options.device)


def _drafts(options: TuneOptions, model: Any) -> dict[Kind, Callable[[], Any]]:
    """Method -> its head or draft model, made when first asked for."""
    found: dict[Kind, Callable[[], Any]] = {}
    if options.head is not None or options.target == TOY:
        found[DRAFT_HEAD] = lambda: options.head or TOY
    if options.draft is not None:
        made: list[Any] = []

        def draft() -> Any:
            if not made:
                dtype = str(model.dtype).removeprefix("torch.")
                made.append(load_model(options.draft, dtype, str(model.device)))
                clear_generation_config(made[0])
            return made[0]

        found[DRAFT_MODEL] = draft
    return found
