"""`specdec bench tune`: tunes, and prints what it found."""

from __future__ import annotations

import sys

from specdec.artifacts.terminal import say_next
from specdec.cost.tuned_file import TunedChoice
from specdec.loading import sentence
from specdec_bench.summary.intervals import Ratio
from specdec_bench.tune.options import TuneOptions
from specdec_bench.tune.tuner import BatchResult, tune

_SHOWN = 12  # candidates besides those that were timed


def run_tune(options: TuneOptions) -> int:
    """Tunes and prints the table and the choice.

    Args:
        options: Target, methods and prompts.

    Returns:
        Exit code 0; "do not speculate" is an answer.

    Raises:
        SpecdecError: An option, the model, the prompts or the file is wrong.
    """
    _, results = tune(options, lambda line: print(line, file=sys.stderr, flush=True))
    for batch, result in results.items():
        _print(batch, result)
    print(f"\nwritten to {options.output}; use it as specdec.augment(model, tuned=...)")
    _say_next(options.target, results[min(results)].choice)
    return 0


def _say_next(target: str, choice: TunedChoice) -> None:
    if choice.method == "none":
        return
    sizes = [f"--option={name}={value}" for name, value in choice.options.items()
             if value is not None]  # fmt: skip
    say_next(
        "write with the choice, and compare with plain generate",
        *("generate", "--model", target, "--method", choice.method, *sizes),
        *("--prompt", "Once upon a time", "--compare"),
    )


def _print(batch: int, result: BatchResult) -> None:
    timed = [f for f in result.forecasts if f.candidate in result.gains]
    others = [f for f in result.forecasts if f.candidate not in result.gains][:_SHOWN]
    timed.sort(key=lambda forecast: -result.gains[forecast.candidate].value)
    print(f"\nbatch {batch}: speed-up over decoding without speculation\n")
    names = [str(forecast.candidate) for forecast in timed + others]
    width = max(map(len, names), default=10)
    print(f"{'candidate':{width}}  tokens/round  nodes  predicted  measured (95 % interval)")
    for name, forecast in zip(names, timed + others, strict=True):
        gain = result.gains.get(forecast.candidate)
        print(
            f"{name:{width}}  {forecast.tau:12.2f}  {forecast.nodes:5.1f}  "
            f"{forecast.speedup:9.2f}  {_measured(gain)}"
        )
    left = len(result.forecasts) - len(names)
    if left > 0:
        print(f"and {left} more in the file")
    for method, reason in result.skipped.items():
        print(f"{method} cannot run here: {sentence(ValueError(reason))}")
    choice = result.choice
    if choice.method == "none":
        print("\nchosen: do not speculate here (method none)")
    else:
        sizes = ", ".join(f"{name} {value}" for name, value in choice.options.items()
                          if name != "draft")  # fmt: skip
        print(f"\nchosen: {choice.method} ({sizes})")
    print(
        f"{result.passes:.0f} answers looked into, {result.timings} timed, {result.seconds:.0f} s"
    )


def _measured(gain: Ratio | None) -> str:
    if gain is None:
        return ""
    if gain.over == "nothing":
        return f"{gain.value:.2f}"
    return f"{gain.value:.2f} [{gain.low:.2f}, {gain.high:.2f}]"
