"""The data doctor: its figures, its problems, and what it prints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import CHATML, byte_tokenizer, chat_row, write_rows, write_target
from transformers import AutoModelForCausalLM

from specdec.errors import ConfigError
from specdec_training.commands.data import run_doctor
from specdec_training.commands.data_report import painted, show_data
from specdec_training.data.doctor import examine, examine_with_target, pieces
from specdec_training.data.options import (
    DataDoctorOptions,
    DataPrepareOptions,
    DataRegenerateOptions,
)
from specdec_training.data.prepare import prepare
from specdec_training.data.prepared import Example, PreparedData
from specdec_training.data.regenerate import regenerate
from specdec_training.data.target import open_target

ROWS = [chat_row(f"question {n}", f"answer {n * n}") for n in range(150)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, target: Path
) -> Callable[..., tuple[Path, PreparedData]]:
    """Prepares rows; gives the folder and the data."""

    def call(rows: Any = ROWS, **options: Any) -> tuple[Path, PreparedData]:
        folder = tmp_path_factory.mktemp("data")
        path = write_rows(folder / "rows.jsonl", rows)
        chosen = DataPrepareOptions(
            input=(str(path),),
            target=str(target),
            output=folder / "out",
            cache_dir=folder / "cache",
            draft_vocab=64,
        )
        return folder / "out", prepare(replace(chosen, **options)).data

    return call


def texts(data: PreparedData) -> list[str]:
    return [f"{problem.level}: {problem.text}" for problem in examine(data).problems]


def test_the_figures(make: Callable[..., Any]) -> None:
    _, data = make()
    found = examine(data)
    examples = list(data.examples)
    assert found.lengths.tolist() == [len(example.token_ids) for example in examples]
    assert found.learnt.tolist() == [sum(example.loss_mask) for example in examples]
    assert found.coverage[64] == data.meta.draft_vocab_coverage
    assert found.problems == []
    assert found.errors == 0


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS[:20], {}, "warning: there are few examples (18)"),
        (ROWS, {"held_out": 0}, "no prompts are held out"),
        (ROWS, {"draft_vocab": 12}, "raise --draft-vocab"),
        (ROWS, {"max_length": 45}, "raise --max-length"),
        (
            [*ROWS, "{", "{", "{"],
            {"max_bad_fraction": 0.1},
            "3 of 153 rows were skipped, most of them as broken_json",
        ),
    ],
    ids=["few", "none held out", "coverage", "cut", "skipped"],
)
def test_warnings(rows: Any, options: dict[str, Any], message: str, make: Any) -> None:
    found = texts(make(rows, **options)[1])
    assert any(message in text for text in found), found
    assert all(text.startswith("warning") for text in found)


def test_texts_that_go_on_are_not_cut(make: Callable[..., Any]) -> None:
    _, data = make([{"text": f"{n} " * 100} for n in range(150)], max_length=45)
    assert len(data.examples) > 150
    assert not any("are cut" in text for text in texts(data))


def test_changed_examples_are_an_error(make: Callable[..., Any]) -> None:
    folder, data = make()
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(facts | {"data_hash": "0" * 64}))
    found = examine(PreparedData.load(folder))
    assert [problem.text for problem in found.problems] == [
        "the examples were changed after they were prepared"
    ]
    assert found.errors == 1
    whole = replace(data, examples=_Everything(data.examples))  # type: ignore[arg-type]
    assert any("users' words too" in text for text in texts(whole))


class _Everything:
    """Examples whose loss mask is all true."""

    def __init__(self, examples: Any) -> None:
        self._examples = examples

    def columns(self) -> Any:
        for lengths, ids, mask in self._examples.columns():
            yield lengths, ids, np.ones_like(mask)

    def hash(self) -> str:
        return str(self._examples.hash())


def test_share_of_the_targets_own_tokens(
    make: Callable[..., Any], target: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.jsonl"
    options = DataRegenerateOptions(
        input=(str(write_rows(tmp_path / "rows.jsonl", ROWS)),),
        target=str(target),
        output=answers,
        temperature=0.0,
        max_new_tokens=16,
        threads=1,
    )
    regenerate(options)
    _, own = make([json.loads(line) for line in answers.read_text().splitlines()])
    _, foreign = make()
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    shares = []
    for data in (own, foreign):
        found = examine(data)
        examine_with_target(data, open_target(str(target)), model, 10, found)
        assert found.on_policy is not None
        assert found.on_policy.tokens > 50
        shares.append(found.on_policy.agreement)
        if data is foreign:
            assert found.round_trip == 1.0
            assert any("specdec data regenerate" in problem.text for problem in found.problems)
    assert shares[0] > 0.99
    assert shares[1] < 0.2


def test_another_target_is_an_error(
    make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = make()
    assert run_doctor(DataDoctorOptions(data=str(folder), target="demo")) == 1
    said = capsys.readouterr().out
    assert "error: the data were prepared for another target: hidden_size: 32 and 192" in said


def test_the_command(
    make: Callable[..., Any], target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = make()
    options = DataDoctorOptions(data=str(folder), target=str(target), device="cpu")
    assert run_doctor(options) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "135 (135 chat)" in said
    assert "[[answer " in said
    assert "own choice" in said
    assert run_doctor(replace(options, target=None)) == 0
    assert "no problems found" in capsys.readouterr().out


def test_the_command_on_rows(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"messages": []}])
    options = DataDoctorOptions(data=str(path), target=str(target), device="cpu")
    assert run_doctor(options) == 0
    said = capsys.readouterr()
    assert "rows read   151, 1 skipped\n  bad_turn  1" in said.out
    assert "rows.jsonl:151" in said.err
    with pytest.raises(ConfigError, match="--target is missing"):
        run_doctor(replace(options, target=None))
    with pytest.raises(ConfigError, match="--data is missing"):
        run_doctor(replace(options, data=None))
    with pytest.raises(ConfigError, match="--sample must"):
        run_doctor(replace(options, sample=-1))
    unfinished = tmp_path / "unfinished"
    (unfinished / "examples").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no finished data"):
        run_doctor(replace(options, data=str(unfinished)))


def test_rows_of_which_none_is_left_are_listed_line_by_line(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": []}, {"text": " "}, chat_row("q", "a") | {"images": ["x"]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = DataDoctorOptions(data=str(path), target=str(target), device="cpu")
    with pytest.raises(ConfigError, match=r"^no example is left to train on; the reasons stand"):
        run_doctor(options)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 3
    assert "'images' of the row" in said
    assert run_doctor(replace(options, ignore_field=("images",))) == 0


def test_the_bins_of_lengths_do_not_overlap(
    make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, data = make([chat_row("q", "a" * n) for n in range(1, 60)], held_out=0)
    show_data(data, examine(data))
    bins = re.findall(r"^ +(\d+) to (\d+) +(\d+) ", capsys.readouterr().out, re.MULTILINE)
    borders = [(int(low), int(high)) for low, high, _ in bins]
    assert all(high + 1 == low for (_, high), (low, _) in pairwise(borders))
    lengths = [len(example.token_ids) for example in data.examples]
    for low, high, count in bins:
        assert int(count) == sum(int(low) <= length <= int(high) for length in lengths)


def test_colours_and_brackets() -> None:
    tokenizer = byte_tokenizer(CHATML)
    ids = tokenizer("ab\ncd", add_special_tokens=False)["input_ids"]
    example = Example(ids, [False, False, False, True, True])
    parts = pieces(example, tokenizer, 100)
    assert parts == [("ab\n", False), ("cd", True)]
    assert pieces(example, tokenizer, 4) == [("ab\n", False), ("c", True)]
    assert painted(parts, colour=False) == "ab\n[[cd]]"
    assert painted(parts, colour=True) == "\x1b[90mab\x1b[0m\n\x1b[32mcd\x1b[0m"


def test_data_cannot_steer_the_terminal() -> None:
    assert painted([("\x1b[2Jé\x07\u202e", True)], colour=False) == r"[[\x1b[2Jé\x07\u202e]]"
