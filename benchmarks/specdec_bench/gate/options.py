"""What `specdec bench gate` can be told; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from specdec.artifacts.arguments import Flag, X, arg


@dataclass(frozen=True)
class GateOptions:
    """Compare two runs; fail on shown slowdowns, wrong texts, lower acceptance, or more errors."""

    base: Annotated[tyro.conf.Positional[Path], arg("BASE")]
    """Results of the run to compare with."""
    new: Annotated[tyro.conf.Positional[Path], arg("NEW")]
    """Results of the run to judge: same target, prompts and settings."""
    max_slowdown: Annotated[float, X] = 0.05
    """Share of speed that may be lost: fails when even the upper end of the interval lost more."""
    relative_to: Annotated[str | None, arg("ARM", "hf, else the baseline")] = None
    """Arm that both runs timed beside the others, to cancel the machine's own drift. It cannot see
    what slows this arm and the others alike: hf runs no code of specdec's loop, loop0 does."""
    absolute: Flag = False
    """Compare seconds, not ratios within a run: only for a machine that nobody else uses."""
    allow_missing: Flag = False
    """Only warn when an arm of BASE is missing in NEW, or fails on more requests than it did."""
    clock: Literal["auto", "wall", "cpu"] = "auto"
    """auto looks at wall time, and at processor time where it means something: one thread, on a
    CPU. Processor time is steadier, and blind to waiting."""
