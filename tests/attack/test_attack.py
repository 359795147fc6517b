"""A sample of the attack, and the judge that says what got through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attack.attacks import Attack
from attack.forks import Outcome
from attack.judge import fault

ROOT = Path(__file__).parents[2]
EVERY = 60


def outcome(code: int | None = 2, err: str = "", out: str = "") -> Outcome:
    return Outcome(code, 1.0, out, err)


USAGE = Attack("usage", ("nope",))
GOOD = "specdec: error: unknown command 'nope'; choose one of demo, generate\n"


@pytest.mark.parametrize(
    ("attack", "found", "said"),
    [
        (USAGE, outcome(err=GOOD), None),
        (USAGE, outcome(err=f"specdec: warning: so\n{GOOD}"), None),
        (Attack("usage", (), (0,)), outcome(0, out="text"), None),
        (Attack("usage", (), (0,), silent=True), outcome(0), None),
        (USAGE, outcome(None), "no end"),
        (USAGE, outcome(0, out="text"), "exit code 0"),
        (USAGE, outcome(1, err=GOOD), "exit code 1"),
        (USAGE, outcome(-9), "exit code -9"),
        (USAGE, outcome(err="Traceback (most recent call last):\n" + GOOD), "Traceback"),
        (
            USAGE,
            outcome(1, err="specdec: error: unexpected X (this is a bug, ...)"),
            "this is a bug",
        ),
        (USAGE, outcome(err="Retrying in 1s [Retry 1/5].\n" + GOOD), "Retrying in"),
        (USAGE, outcome(err="specdec: error: out of memory\n"), "memory"),
        (USAGE, outcome(err=GOOD + GOOD), "2 error sentences"),
        (USAGE, outcome(err=GOOD + "and more\n"), "1 error sentences"),
        (USAGE, outcome(err="x\n" * 50 + GOOD), "too long"),
        (USAGE, outcome(err="specdec: error: it does not work\n"), "unexpected message"),
        (Attack("stdin", ()), outcome(err=GOOD.replace("nope", "x")), "unexpected message"),
        (Attack("usage", (), (0,)), outcome(0), "empty"),
        (Attack("usage", (), (0,)), outcome(0, err=GOOD, out="x"), "an error with exit code 0"),
    ],
    ids=str,
)
def test_what_gets_through(attack: Attack, found: Outcome, said: str | None) -> None:
    judged = fault(attack, found)
    assert judged is None if said is None else judged is not None and judged.startswith(said)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_a_sample_of_the_attack() -> None:
    """One in sixty; `make attack` makes all."""
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "attack.run", "--every", str(EVERY), "--jobs", "1"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert ", 0 got through" in done.stdout
