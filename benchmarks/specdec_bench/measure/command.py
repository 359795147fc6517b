"""`specdec bench run`: measures, prints the table, and says whether a text was wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from specdec.artifacts.terminal import say, say_next, wrapped
from specdec_bench.measure.options import RunOptions
from specdec_bench.measure.profile_of_run import write_run_profile
from specdec_bench.measure.runner import run
from specdec_bench.measure.terminal_table import print_results
from specdec_bench.output_files import check_replaceable
from specdec_bench.results.files import is_unfinished


def run_run(options: RunOptions) -> int:
    """Measures.

    Args:
        options: What to measure.

    Returns:
        Exit code: 0, or 1 when a text was wrong or an arm samples from another distribution.

    Raises:
        SpecdecError: An option, the model, the prompts or the file is wrong.
    """
    path = options.output_path
    if options.profile is not None:
        inputs = [path, *map(Path, options.tasks)]
        check_replaceable(options.profile, "--profile", b'"schema_version"', inputs)
    bars: list[Any] = []
    try:
        results = run(options, on_start=_progress(bars))
    except KeyboardInterrupt:
        if is_unfinished(path):
            say(f"\nstopped; go on with the same options and --resume ({path})", sys.stderr)
        raise
    finally:
        for bar in bars:
            bar.close()
    summary = print_results(results, options.no_colour)
    say(wrapped(f"results: {path}"))
    if options.profile is not None:
        say(wrapped(f"profile of {write_run_profile(options.profile, results)}: {options.profile}"))
    say_next("make a page of it", "bench", "report", path)
    failed = [test.arm for test in results.sampling if not test.passed]
    return 1 if summary.wrong or failed else 0


def _progress(bars: list[Any]) -> Callable[[int, str], Any]:
    """Makes a bar for every step of the run, on standard error; the one before is closed."""

    def start(total: int, title: str) -> Any:
        for bar in bars:
            bar.close()
        bars[:] = [
            tqdm(
                total=total,
                desc=title,
                unit="answer",
                leave=False,
                mininterval=0.5,
                disable=not sys.stderr.isatty(),
            )
        ]
        return bars[0]

    return start
