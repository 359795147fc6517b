"""What `specdec bench run` can be told: one frozen dataclass.

Field docstrings are the help texts. Imports nothing heavy, so that the help answers at once.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from specdec.artifacts.arguments import Flag, N, arg, check_numbers, check_repeats, each
from specdec.errors import ConfigError

NOT_CONFIG = frozenset(
    {"output", "resume", "overwrite", "no_colour", "profile", "pairs", "time_budget", "until_ci"}
)
"""Options that a resumed run may change: they do not touch what is measured."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
_MOST_PAIRS_UNTIL_CI = 200


@dataclass(frozen=True)
class RunOptions:
    """Measure speed-ups: arms interleaved in one process, every text checked."""

    target: Annotated[str, arg("NAME", "the bundled toy")] = "demo"
    """Folder or hub id of the target; demo is the bundled toy."""
    arms: Annotated[tuple[str, ...], *each("ARM", "hf and a few methods")] = ()
    """What to measure: hf, hf_prompt_lookup, hf_assisted, a method with options as in
    eagle3:depth=3,top_k=1, suffix+store, or server:URL. hf, plain generate, is always there, and
    so is loop0, our loop without speculation, twice: that row shows the machine's noise."""
    head: Annotated[str | None, arg("HEAD", "the bundled one, for demo")] = None
    """Draft head of the eagle3 arms: a folder, a hub id, or demo: the bundled one."""
    draft: Annotated[str | None, arg("NAME", "the toy's first layer, for demo")] = None
    """Draft model of hf_assisted and draft_model: a folder, a hub id, or demo: the bundled toy."""

    tasks: Annotated[tuple[str, ...], *each("TASK", "smoke")] = ()
    """Prompts: smoke, spec_bench, mt_bench, humaneval, gsm8k, a JSONL file, or a folder."""
    data: Annotated[Path | None, arg("FOLDER")] = None
    """Where the named files lie."""
    limit: Annotated[int | None, arg("N", "all")] = None
    """Prompts in all, balanced over categories."""

    dtypes: Annotated[
        tuple[Literal["float32", "bfloat16", "float16", "float64"], ...],
        *each("DTYPE", "float32 for demo, else the checkpoint's"),
    ] = ()
    """Arithmetic of the target. The sweeps are combined with one another."""
    batches: Annotated[tuple[int, ...], *each("N", "1")] = ()
    """Prompts decoded together."""
    temperatures: Annotated[tuple[float, ...], *each("X", "0")] = ()
    """0 is greedy; else every arm samples with the same seed."""
    prompt_tokens: Annotated[tuple[int, ...], *each("N", "whole prompts")] = ()
    """Longest prompt; longer ones keep their end."""
    max_new_tokens: Annotated[int | None, arg("N", "24 for smoke alone, else 160")] = None
    """New tokens of a prompt, at most; less where plain's text ends or begins to loop."""

    pairs: Annotated[
        int | None, arg("N", "2 for smoke alone, else 4; 200 with --until-ci or --time-budget")
    ] = None
    """Timed repeats of every unit and arm, at most."""
    time_budget: Annotated[float, arg("SECONDS", "none")] = 0.0
    """Stop after about this long, preparation included; every arm is timed at least once."""
    until_ci: Annotated[float, arg("X", "off")] = 0.0
    """Stop when no interval over repeats is wider than this to each side, as 0.03 for 3 %: what
    the machine's noise leaves open for these prompts. How far prompts lie apart is in the printed
    interval as well; that part needs more prompts."""
    seed: Annotated[int, N] = 0
    """Of sampling and of the choice of prompts."""
    no_text_check: Flag = False
    """Do not compare texts with plain's; the table then says that nobody looked."""
    check_sampling: Flag = False
    """Also test that each arm samples from the target's distribution."""

    output: Annotated[Path | None, arg("FILE", "runs/bench/TARGET-TASKS.jsonl")] = None
    """Result file."""
    resume: Flag = False
    """Go on with a run that was stopped; nothing is measured twice."""
    overwrite: Flag = False
    """Replace the result file."""
    profile: Annotated[Path | None, arg("FILE", "none")] = None
    """Also write the acceptance of the first arm that speculates at batch 1, as
    speculation_profile.json."""
    device: str = "auto"
    """Torch device; auto takes a CUDA device where there is one."""
    threads: Annotated[int | None, arg("N", "1 on a CPU")] = None
    """Torch threads; processor time means little with more than one."""
    no_colour: Flag = False
    """Never colour the table. Also when NO_COLOR is set or the output is no terminal."""

    def check(self) -> None:
        """Raises `ConfigError` as `check_run_options`."""
        check_run_options(self)

    def to_json(self) -> dict[str, Any]:
        """What a result file keeps: plain values, as JSON reads them back."""
        return {
            name: str(value) if isinstance(value, Path) else _plain(value)
            for name, value in asdict(self).items()
            if name not in NOT_CONFIG
        }

    @property
    def task_list(self) -> tuple[str, ...]:
        """What was asked for, or the smoke set."""
        return self.tasks or ("smoke",)

    @property
    def is_smoke(self) -> bool:
        """Only the bundled prompts: a short run."""
        return self.task_list == ("smoke",)

    @property
    def new_tokens(self) -> int:
        """Limit of new tokens."""
        return self.max_new_tokens or (24 if self.is_smoke else 160)

    @property
    def most_pairs(self) -> int:
        """Timed repeats at most."""
        if self.pairs is not None:
            return self.pairs
        if self.until_ci or self.time_budget:
            return _MOST_PAIRS_UNTIL_CI
        return 2 if self.is_smoke else 4

    @property
    def output_path(self) -> Path:
        """Where the results go."""
        if self.output is not None:
            return self.output.expanduser()
        words = [Path(self.target).name, *(Path(task).stem for task in self.task_list)]
        name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", word) for word in words)
        return Path("runs") / "bench" / f"{name[:100]}.jsonl"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_LEAST = {
    "limit": 1, "max_new_tokens": 16, "pairs": 1, "seed": 0, "threads": 1, "batches": 1,
    "prompt_tokens": 1,
}  # fmt: skip


def check_run_options(options: RunOptions) -> None:
    """Refuses what can be seen to be wrong without loading anything.

    Raises:
        ConfigError: Names the option, its value, and what it may be.
    """
    check_numbers(options, _LEAST, {"threads": 1024})
    for value in options.temperatures:
        if not 0 <= value <= 100:
            raise ConfigError(f"--temperatures must be from 0 to 100, got {value}")
    if not 0 <= options.time_budget < float("inf"):
        raise ConfigError(f"--time-budget must be at least 0, got {options.time_budget}")
    if not 0 <= options.until_ci < 1:
        raise ConfigError(f"--until-ci must be from 0 to below 1, got {options.until_ci}")
    for dtype in options.dtypes:
        if dtype not in DTYPES:
            raise ConfigError(f"--dtypes takes {', '.join(DTYPES)}, got {dtype!r}")
    if options.profile is not None and 1 not in (options.batches or (1,)):
        raise ConfigError(
            "--profile counts single requests, and --batches has no 1; add --batches 1, or leave "
            "out --profile"
        )
    if options.resume and options.overwrite:
        raise ConfigError("give --resume or --overwrite, not both")
    check_repeats(options)
