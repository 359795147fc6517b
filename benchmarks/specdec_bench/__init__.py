"""Measurement of speed-up: harness, replay, tuner, report and gate.

from specdec_bench import RunOptions, run

results = run(RunOptions(arms=("hf", "prompt_lookup"), output=Path("run.jsonl")))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec_bench.measure.options import RunOptions
    from specdec_bench.measure.runner import run
    from specdec_bench.results.reading import read_results

__all__ = ["RunOptions", "read_results", "run"]

_PLACES = {  # imported when asked for: help texts need no torch
    "RunOptions": "measure.options",
    "read_results": "results.reading",
    "run": "measure.runner",
}


def __getattr__(name: str) -> Any:
    """The public names."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
