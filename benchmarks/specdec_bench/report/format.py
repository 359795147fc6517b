"""How figures are written: the same in the page, in Markdown and at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec_bench.summary.intervals import Ratio

NONE = "–"  # noqa: RUF001 - the dash of an empty cell
TIMES = "×"  # noqa: RUF001 - the sign of multiplication
_UNITS = ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "µs", 1e6))


def times(ratio: Ratio | None) -> str:
    """A speed-up with its interval."""
    return NONE if ratio is None else f"{plain_times(ratio.value)} {interval(ratio)}"


def interval(ratio: Ratio, decimals: int = 2) -> str:
    """As "[1.58, 1.66]"; a star marks one that holds for these prompts only."""
    if ratio.over == "nothing":
        return "[no interval]"
    star = "*" if ratio.over == "repeats" else ""
    return f"[{ratio.low:.{decimals}f}, {ratio.high:.{decimals}f}]{star}"


def fine(ratio: Ratio | None) -> str:
    """A ratio near 1 with three decimals."""
    return NONE if ratio is None else f"{ratio.value:.3f} {interval(ratio, 3)}"


def plain_times(value: float | None) -> str:
    """A speed-up without an interval."""
    return NONE if value is None else f"{value:.2f}{TIMES}"


def seconds(value: float | None) -> str:
    """Three digits and a unit."""
    if value is None:
        return NONE
    unit, scale = next((u, s) for least, u, s in _UNITS if abs(value) >= least)
    scaled = value * scale
    decimals = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
    return f"{scaled:.{decimals}f} {unit}"


def share(value: float | None, decimals: int = 0) -> str:
    """A share as percents."""
    return NONE if value is None else f"{100 * value:.{decimals}f} %"


def signed_share(value: float | None) -> str:
    """A share as percents, with its sign."""
    return NONE if value is None else f"{100 * value:+.1f} %"


def size(value: int | None) -> str:
    """Bytes in MiB."""
    if value is None:
        return NONE
    return f"{value / 2**20:.1f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"


def energy(value: float | None) -> str:
    """Joules in mJ or J."""
    if value is None:
        return NONE
    return f"{value * 1e3:.3g} mJ" if value < 1 else f"{value:.3g} J"


def count(value: int) -> str:
    """With thousands apart."""
    return f"{value:,}"


def counted(value: int, noun: str) -> str:
    """So many things, in the plural where they are not one."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of a nested mapping, one line each."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            found += facts(value, f"{name} ") or [(label, NONE)]
        elif isinstance(value, list | tuple):
            found.append((label, ", ".join(_brief(item) for item in value) or NONE))
        else:
            found.append((label, _brief(value)))
    return found


def _brief(value: Any) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
