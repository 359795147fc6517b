"""Types of the values in a record: what no run can have measured is refused when a file is read.

A time of 1e308 seconds, a histogram with a text for a key or a count below 0 would otherwise become
a figure, or end the reader somewhere else without a line number. None of the types turns a value
into another: "3" is no number, 2.0 is no whole one and true is neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, AllowInfNan, Field, Strict

LEAST_SECONDS = 1e-9
"""Of something that was timed; clocks count nanoseconds."""
_MOST_SECONDS = 1e9  # thirty years
_MOST = 10**15  # of anything that is counted; exact as a float

Verdict = Literal["exact", "near_tie", "wrong"]


def _shown(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value!r:.40}"


def _within(low: float, high: float) -> AfterValidator:
    """A number from `low` to `high`."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"{_shown(value)} is not from {low:g} to {high:g}")
        return value

    return AfterValidator(check)


def _each(low: float, high: float, is_key: Callable[[str], bool] = bool) -> AfterValidator:
    """An object whose numbers go from `low` to `high`."""

    def check(found: Mapping[str, float]) -> Mapping[str, float]:
        for key, value in found.items():
            if not is_key(key):
                raise ValueError(f"{key!r:.40} -> {_shown(value)} has a name that means nothing")
            if not low <= value <= high:
                raise ValueError(f"{key!r:.40} -> {_shown(value)} is not from {low:g} to {high:g}")
        return found

    return AfterValidator(check)


def _is_size(key: str) -> bool:
    """Whether a name is a whole number above 0, as our writer puts it."""
    return key.isascii() and key.isdigit() and len(key) < 16 and key[0] != "0"


Whole = Annotated[int, Strict()]
Count = Annotated[Whole, _within(0, _MOST)]
Positive = Annotated[Whole, _within(1, _MOST)]
Number = Annotated[float, Strict(), AllowInfNan(False)]
Seconds = Annotated[Number, _within(0, _MOST_SECONDS)]
Share = Annotated[Number, _within(0, 1)]
Temperature = Annotated[Number, _within(0, 100)]
Flag = Annotated[bool, Strict()]

Lengths = Annotated[Sequence[Positive], Field(min_length=1)]
Place = Annotated[Sequence[Count], Field(min_length=2, max_length=2)]
Sizes = Annotated[Mapping[str, Whole], _each(1, _MOST, _is_size)]
SecondsBySize = Annotated[Mapping[str, Number], _each(LEAST_SECONDS, _MOST_SECONDS, _is_size)]
SecondsByStage = Annotated[Mapping[str, Number], _each(0, _MOST_SECONDS)]
TokensByVerdict = Annotated[Mapping[str, Whole], _each(0, _MOST, get_args(Verdict).__contains__)]
