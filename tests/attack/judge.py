"""Whether an answer to hostile input is fine: one sentence that is expected, or a result."""

from __future__ import annotations

import re

from attack.attacks import Attack
from attack.forks import Outcome
from attack.messages import EXPECTED

_ERROR = "specdec: error: "
_ADDED = re.compile(r"specdec: warning: |skipped |assumed: |prepar|answer|probing |\s|\Z")
_MOST_LINES, _LONGEST = 40, 600
_OUT_OF_MEMORY = ("out of memory", "MemoryError")
_BUG = ("Traceback (most recent call last)", "this is a bug", "Exception ignored", "Retrying in")


def fault(attack: Attack, outcome: Outcome) -> str | None:
    """What is wrong with the answer, beginning with the kind of fault; None when nothing is."""
    said = outcome.out + outcome.err
    if outcome.code is None:
        return f"no end: {outcome.seconds:.0f} s"
    for words in _BUG:
        if words in said:
            return f"{words}: {_shown(outcome.err)}"
    if any(words in said for words in _OUT_OF_MEMORY):
        return f"memory: {_shown(outcome.err)}"
    if outcome.code not in (2, *(attack.codes)):
        return f"exit code {outcome.code}: {_shown(outcome.out + outcome.err)}"
    if outcome.code == 2:
        return _refusal_fault(attack, outcome)
    if outcome.code == 0 and not attack.silent and not outcome.out.strip():
        return f"empty: nothing on standard output; {_shown(outcome.err)}"
    if _ERROR in outcome.err and outcome.code == 0:
        return f"an error with exit code 0: {_shown(outcome.err)}"
    return None


def _refusal_fault(attack: Attack, outcome: Outcome) -> str | None:
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith(_ERROR)]
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"{len(errors)} error sentences: {_shown(outcome.err)}"
    if len(lines) > _MOST_LINES or len(errors[0]) > _LONGEST:
        return f"too long: {len(lines)} lines, {len(errors[0])} characters: {_shown(outcome.err)}"
    message = errors[0].removeprefix(_ERROR)
    if not any(re.search(pattern, message) for pattern in EXPECTED[attack.kind]):
        return f"unexpected message: {message}"
    return None


def _shown(text: str) -> str:
    return " / ".join(text.strip().splitlines())[-400:]
