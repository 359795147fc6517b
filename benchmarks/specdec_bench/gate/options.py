"""What `specdec bench gate` can be told; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

_Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


def _arg(metavar: str, default: str = "") -> Any:
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True)
class GateOptions:
    """Compare two runs; fail on shown slowdowns, wrong texts, lower acceptance, or more errors."""

    base: Annotated[tyro.conf.Positional[Path], _arg("BASE")]
    """Results of the run to compare with."""
    new: Annotated[tyro.conf.Positional[Path], _arg("NEW")]
    """Results of the run to judge: same target, prompts and settings."""
    max_slowdown: Annotated[float, tyro.conf.arg(metavar="X")] = 0.05
    """Share of speed that may be lost: fails when even the upper end of the interval lost more."""
    relative_to: Annotated[str | None, _arg("ARM", "hf, else the baseline")] = None
    """Arm that both runs timed beside the others, to cancel the machine's own drift. It cannot see
    what slows this arm and the others alike: hf runs no code of specdec's loop, loop0 does."""
    absolute: _Flag = False
    """Compare seconds, not ratios within a run: only for a machine that nobody else uses."""
    allow_missing: _Flag = False
    """Only warn when an arm of BASE is missing in NEW, or fails on more requests than it did."""
    clock: Literal["auto", "wall", "cpu"] = "auto"
    """auto looks at wall time, and at processor time where it means something: one thread, on a
    CPU. Processor time is steadier, and blind to waiting."""
