"""Commands name the next one, as a line that can be pasted, and only to people."""

from __future__ import annotations

import io
import shlex
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path

import pytest

from specdec.artifacts.terminal import say_next
from specdec.cli.main import main
from specdec.cost.tuned_file import TunedChoice
from specdec_bench.tune import command as tune_command


class Terminal(io.StringIO):
    """Standard error that somebody reads."""

    def isatty(self) -> bool:
        return True

    def named(self) -> list[str]:
        """The words of every command that was named."""
        lines = self.getvalue().splitlines()
        pairs = pairwise(lines)
        found = [shlex.split(line) for before, line in pairs if before.startswith("next, ")]
        assert all(words.pop(0) == "specdec" for words in found)
        return found


def next_after(*words: object) -> list[str]:
    """What a command that succeeds says to run next."""
    with redirect_stderr(Terminal()) as terminal:
        assert main(list(map(str, words))) == 0, terminal.getvalue()
    (found,) = terminal.named()
    return found


def test_a_name_with_spaces_stays_one_word() -> None:
    with redirect_stderr(Terminal()) as terminal:
        say_next("look", "inspect", Path("my heads/it's"))
    assert terminal.named() == [["inspect", "my heads/it's"]]


def test_nothing_is_said_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    say_next("look", "inspect", "head")
    assert capsys.readouterr() == ("", "")


def test_convert(tmp_path: Path) -> None:
    words = next_after("convert", "demo", tmp_path / "head", "--target", "demo")
    assert words == ["inspect", str(tmp_path / "head"), "--target", "demo"]
    assert main(words) == 0


def test_from_data_to_text(tmp_path: Path) -> None:
    """Each step to a head is the one that the last one named, made shorter."""
    answers = tmp_path / "answers.jsonl"
    words = next_after(
        *("data", "regenerate", "--input", "demo", "--limit", 12, "--max-lines", 6),
        *("--max-new-tokens", 24, "--output", answers),
    )
    assert words[:2] == ["data", "prepare"]
    words = next_after(*words, "--draft-vocab", 512, "--held-out", 1)
    assert words[0] == "train"
    words = next_after(
        *(*words, "--steps", 1, "--eval-every", 0, "--batch-rows", 1, "--threads", 1)
    )
    assert words[0] == "generate"
    with redirect_stderr(Terminal()) as terminal:
        assert main([*words, "--max-new-tokens", "8"]) == 0, terminal.getvalue()
    assert "text   identical" in terminal.getvalue()


def test_from_a_run_to_its_report_to_the_tuner(tmp_path: Path) -> None:
    run = tmp_path / "run.jsonl"
    words = next_after(
        *("bench", "run", "--arms", "prompt_lookup", "--limit", 1, "--max-new-tokens", 16),
        *("--pairs", 1, "--output", run),
    )
    assert words == ["bench", "report", str(run)]
    tuned = str(tmp_path / "tuned.json")
    assert next_after(*words) == ["bench", "tune", "--target", "demo", "--output", tuned]


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (
            TunedChoice("suffix", {"max_depth": 8, "store": None}),
            ["--method", "suffix", "--option=max_depth=8"],
        ),
        (TunedChoice("none"), None),  # there is nothing to try
    ],
)
def test_the_tuners_choice(choice: TunedChoice, wanted: list[str] | None) -> None:
    with redirect_stderr(Terminal()) as terminal:
        tune_command._say_next("demo", choice)
    if wanted is None:
        assert terminal.getvalue() == ""
    else:
        (words,) = terminal.named()
        assert words[:6] == ["generate", "--model", "demo", *wanted]
