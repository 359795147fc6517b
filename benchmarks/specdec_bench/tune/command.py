"""`specdec bench tune`: tunes, and prints what it found."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from specdec.artifacts.terminal import say_next
from specdec.cost.tuned_file import TunedChoice
from specdec.loading import sentence
from specdec_bench.tune.options import TuneOptions
from specdec_bench.tune.search import Search
from specdec_bench.tune.tuner import tune

_SHOWN = 20  # candidates


def run_tune(options: TuneOptions) -> int:
    """Tunes and prints the table and the choice.

    Args:
        options: Target, methods and prompts.

    Returns:
        Exit code 0; "do not speculate" is an answer.

    Raises:
        SpecdecError: An option, the model, the prompts or the file is wrong.
    """
    found = tune(options, lambda line: print(line, file=sys.stderr, flush=True))
    for batch, search in found.items():
        _print(batch, search)
    print(f"\nwritten to {options.output}; use it as specdec.augment(model, tuned=...)")
    _say_next(options.target, found[min(found)].choice)
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


def _print(batch: int, search: Search) -> None:
    print(f"\nbatch {batch}: speed-up over decoding without speculation\n")
    rows = list(search.table().items())
    width = max((len(name) for name, _ in rows[:_SHOWN]), default=10)
    print(f"{'candidate':{width}}  tokens/round  nodes  prompts  measured (95 % interval)")
    for name, row in rows[:_SHOWN]:
        print(
            f"{name:{width}}  {row['tau']:12.2f}  {row['nodes']:5.1f}  {row['prompts']:7}  "
            f"{_measured(row['measured'])}"
        )
    if len(rows) > _SHOWN:
        print(f"and {len(rows) - _SHOWN} more in the file")
    for method, reason in search.skipped.items():
        print(f"{method} cannot run here: {sentence(ValueError(reason))}")
    choice = search.choice
    sizes = [f"{name} {value}" for name, value in choice.options.items() if name != "draft"]
    what = f"{choice.method} ({', '.join(sizes)})" if sizes else "do not speculate here (none)"
    print(f"\nchosen: {what}; {search.seconds:.0f} s")


def _measured(gain: Sequence[float]) -> str:
    value, *ends = (f"{number:.2f}" for number in gain)
    return f"{value} [{', '.join(ends)}]" if ends else value
