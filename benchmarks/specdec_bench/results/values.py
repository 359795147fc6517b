"""Which values a record may hold: what no run can have measured is refused when a file is read.

A time of 0 or of 1e308 seconds, a histogram with a text for a key or an end that counts backwards
would otherwise become a figure, or end the reader somewhere else without a line number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from specdec_bench.results.records import (
    CheckRecord,
    CurveRecord,
    PassRecord,
    SamplingRecord,
    Setting,
    SkippedRecord,
    TimeRecord,
    UnitRecord,
    Verdict,
)

_MOST_SECONDS = 1e9  # thirty years
_LEAST_SECONDS = 1e-9  # of something that was timed; clocks count nanoseconds
_MOST = 10**15  # of anything that is counted; exact as a float
_NO_SECONDS = ("wall", "cpu", "seconds", "first_token", "joules")
_COUNTS = (
    "rounds", "drafted", "peak_bytes", "new_tokens", "pair", "order", "asked", "short", "ungrouped",
    "shortened", "samples", "tokens", "same_text", "records", "batch", "seed",
    "first_tokens", "prefix",
)  # fmt: skip


def wrong_value(record: Any) -> str:
    """What is wrong with the values of a record, naming the field; empty when nothing is.

    Args:
        record: Any record or setting whose fields have their types.
    """
    for name in _NO_SECONDS:
        value = getattr(record, name, None)
        if isinstance(value, float) and not 0 <= value <= _MOST_SECONDS:
            return f"field {name!r}: {value:g} is not from 0 to {_MOST_SECONDS:g}"
    for name in _COUNTS:
        value = getattr(record, name, None)
        if isinstance(value, int) and not 0 <= value <= _MOST:
            return f"field {name!r}: {value!r:.40} is not from 0 to {_MOST:g}"
    own = _OWN.get(type(record))
    return "" if own is None else own(record)


def _setting(setting: Setting) -> str:
    if setting.batch < 1 or (setting.prompt_tokens is not None and setting.prompt_tokens < 1):
        return "field 'batch' or 'prompt_tokens' of a setting is below 1"
    if not 0 <= setting.temperature <= 100:
        return f"field 'temperature': {setting.temperature:g} is not from 0 to 100"
    return ""


def _unit(unit: UnitRecord) -> str:
    if not unit.prompt_tokens or not all(0 < n <= _MOST for n in unit.prompt_tokens):
        return f"field 'prompt_tokens': {unit.prompt_tokens!r:.40} must be the rows' lengths"
    if unit.new_tokens < 1:
        return f"field 'new_tokens': {unit.new_tokens} is below 1"
    if not 0 <= unit.looping <= 1:
        return f"field 'looping': {unit.looping:g} is not from 0 to 1"
    return ""


def _skipped(skipped: SkippedRecord) -> str:
    if skipped.short + skipped.ungrouped > skipped.asked:
        return f"field 'asked': {skipped.asked} is fewer than were left out"
    return ""


def _time(time: TimeRecord) -> str:
    if time.error:
        return ""
    if time.wall < _LEAST_SECONDS:
        return f"field 'wall': {time.wall:g} s of an answer without an error"
    if time.cpu is not None and 0 < time.cpu < _LEAST_SECONDS:
        return f"field 'cpu': {time.cpu:g} s is less than a clock can tell"
    return ""


def _pass(found: PassRecord) -> str:
    for name, counts in (("histogram", found.histogram), ("sizes", found.sizes)):
        for key, count in counts.items():
            if not _is_count(key) or not 0 < count <= _MOST:
                return f"field {name!r}: {key!r:.40} -> {count!r:.40} is no number of tokens"
    return _seconds("stages", found.stages, 0.0) or next(
        (
            f"field 'gaps': {(tokens, seconds)!r:.80} is no burst of tokens and its seconds"
            for tokens, seconds in found.gaps
            if not 0 <= tokens <= _MOST or not 0 <= seconds <= _MOST_SECONDS
        ),
        "",
    )


def _check(check: CheckRecord) -> str:
    verdicts = get_args(Verdict)
    for verdict, count in check.tokens.items():
        if verdict not in verdicts or not 0 <= count <= _MOST:
            return f"field 'tokens': {verdict!r:.40} -> {count!r:.40}"
    place = check.first_difference
    if place is not None and (len(place) != 2 or min(place) < 0):
        return f"field 'first_difference': {place!r:.40} is no row and position"
    if check.verdict == "exact" and place is not None:
        return "field 'first_difference': an exact text has none"
    if check.verdict != "wrong" and check.tokens.get("wrong"):
        return f"field 'verdict': {check.verdict!r}, with {check.tokens['wrong']} wrong tokens"
    return ""


def _curve(curve: CurveRecord) -> str:
    odd = next((key for key in curve.seconds if not _is_count(key)), None)
    if odd is not None:
        return f"field 'seconds': {odd!r:.40} is no number of tokens"
    return _seconds("seconds", curve.seconds, _LEAST_SECONDS)


def _sampling(test: SamplingRecord) -> str:
    for name in ("p_value", "limit", "total_variation", "expected_variation"):
        value = getattr(test, name)
        if not 0 <= value <= 1:
            return f"field {name!r}: {value:g} is not from 0 to 1"
    if test.passed and test.p_value < test.limit:
        return f"field 'passed': true, with p = {test.p_value:g} below {test.limit:g}"
    return ""


def _seconds(name: str, found: Mapping[str, float], least: float) -> str:
    for key, value in found.items():
        if not least <= value <= _MOST_SECONDS:
            return f"field {name!r}: {key!r:.40} took {value:g} s"
    return ""


def _is_count(key: str) -> bool:
    """Whether a key of an object is a whole number above 0, as our writer puts it."""
    return key.isascii() and key.isdigit() and len(key) < 16 and key[0] != "0"


_OWN: Mapping[type[Any], Callable[[Any], str]] = {
    Setting: _setting,
    UnitRecord: _unit,
    SkippedRecord: _skipped,
    TimeRecord: _time,
    PassRecord: _pass,
    CheckRecord: _check,
    CurveRecord: _curve,
    SamplingRecord: _sampling,
}
