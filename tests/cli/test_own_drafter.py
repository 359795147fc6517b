"""A drafter of a few lines in a file of one's own: laws, command line and benchmark take it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import parrot
from helpers.laws import GREEDY, SAMPLED, Case, Ledger, Mode

Run = Callable[..., SimpleNamespace]
NAME = "helpers.parrot:Parrot"


def test_it_is_short() -> None:
    lines = [line for line in inspect.getsource(parrot).splitlines() if line]
    assert len(lines) <= 25, "its imports and options included"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_the_text_is_plains(family: str, mode: Mode, rows: int, ledger: Ledger) -> None:
    Case(family, mode, rows).check(ledger, NAME, ())
    ledger.settle()


def test_generate_takes_it(model_folder: Path, run: Run) -> None:
    call = ("generate", "--model", model_folder, "--prompt", "abab", "--max-new-tokens", 24)
    plain = run(*call, "--method", "none")
    drafted = run(*call, "--method", NAME, "--option", "length=2", "--stats")
    assert plain.code == drafted.code == 0
    assert drafted.out == plain.out
    assert NAME in drafted.err
    wrong = run(*call, "--method", NAME, "--option", "length=9")
    assert wrong.code == 2
    assert "length must be a whole number from 1 to 8" in wrong.err


def test_the_benchmark_takes_it(tmp_path: Path, run: Run) -> None:
    task, output = tmp_path / "one.jsonl", tmp_path / "out.jsonl"
    task.write_text(json.dumps({"id": "a", "prompt": "def main():\n    return main()\n"}) + "\n")
    done = run("bench", "run", "--arms", f"{NAME}:length=2", "--tasks", task, "--pairs", 1,
               "--max-new-tokens", 16, "--output", output)  # fmt: skip
    assert done.code == 0, done.err
    assert f"{NAME}:length=2" in done.out
    assert "WRONG" not in done.out
