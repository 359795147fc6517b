"""Hostile input: edited result files, mistyped outputs, arms and prompts that misbehave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from specdec.errors import ConfigError, SpecdecError
from specdec_bench import RunOptions, read_results, run
from specdec_bench.arm_names import parse_arm
from specdec_bench.contracts import Unit
from specdec_bench.measure.command import run_run
from specdec_bench.output_files import check_replaceable
from specdec_bench.printable import printable
from specdec_bench.replay.options import ReplayOptions, check_replay_options
from specdec_bench.results.files import RecordWriter, check_output
from specdec_bench.results.records import PassRecord
from specdec_bench.summary.summarize import summarize
from specdec_bench.tasks import load_tasks
from specdec_bench.tune.options import TuneOptions
from tests.bench.fake_results import Fake, with_arm, write

CODE = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n"
HUGE = 10**400  # JSON holds it, no float does


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": "a", "turns": [CODE, "    def peek(self):\n"]}, {"id": "a.2", "prompt": CODE}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        ("time", "wall", 0, "field 'wall': 0 s of an answer without an error"),
        ("time", "wall", 1e308, "field 'wall': 1e.308 is not from 0"),
        ("time", "wall", HUGE, "field 'wall' must be a number"),
        ("time", "cpu", 5e-324, "field 'cpu'"),
        ("time", "pair", -1, "field 'pair': -1 is not from 0"),
        ("unit", "new_tokens", HUGE, "field 'new_tokens'"),
        ("unit", "new_tokens", 0, "field 'new_tokens': 0 is not from 1 to"),
        ("unit", "prompt_tokens", [], "field 'prompt_tokens'"),
        ("unit", "prompt_tokens", [3, 4], "2 rows in a setting of 1"),
        ("unit", "looping", 1.5, "field 'looping': 1.5 is not from 0 to 1"),
        ("pass", "histogram", {"a": 1}, "field 'histogram': 'a' -> 1"),
        ("pass", "histogram", {"-3": 1}, "field 'histogram'"),
        ("pass", "histogram", {"1": 0}, "field 'histogram'"),
        ("pass", "sizes", {"0": 1}, "field 'sizes'"),
        ("pass", "stages", {"draft": -1.0}, "field 'stages': 'draft' -> -1 is not from 0 to"),
        ("pass", "gaps", [[1, -1.0]], r"field 'gaps\[0\]\[1\]': -1 is not from 0 to"),
        ("pass", "drafted", -1, "field 'drafted'"),
        ("pass", "peak_bytes", HUGE, "field 'peak_bytes'"),
        ("check", "tokens", {"fine": 1}, "field 'tokens': 'fine'"),
        ("check", "tokens", {"wrong": 1}, "field 'verdict': 'exact', with 1 wrong tokens"),
        ("check", "first_difference", [1], "field 'first_difference'"),
        ("check", "first_difference", [0, 0], "an exact text has none"),
        ("check", "text_sha256", "another", "'exact', and the hash"),
        ("curve", "seconds", {"a": 1.0}, "field 'seconds': 'a'"),
        ("curve", "seconds", {"1": 0.0}, "field 'seconds': '1' -> 0 is not from 1e-09 to"),
        ("end", "seconds", -1.0, "field 'seconds'"),
    ],
)
def test_what_no_run_measures_is_refused_by_line(
    tmp_path: Path, kind: str, name: str, value: Any, words: str
) -> None:
    path = write(Fake(prompts=3, pairs=2).results(), tmp_path / "run.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(n for n, line in enumerate(lines) if line["kind"] == kind and line.get("wall", 1))
    lines[number][name] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SpecdecError, match=f"line {number + 1}: .*{words}"):
        read_results(path)


def test_a_run_that_fails_before_it_measures_keeps_the_old_results(tmp_path: Path) -> None:
    results = Fake(prompts=3, pairs=2).results()
    path = write(results, tmp_path / "run.jsonl")
    lines = path.read_text().splitlines()  # with the names in the order of our writer
    header = json.loads(lines[0])
    path.write_text("\n".join([json.dumps(header, separators=(",", ":")), *lines[1:]]) + "\n")
    before = path.read_bytes()
    with (
        pytest.raises(ZeroDivisionError),
        RecordWriter(path, results.header, overwrite=True),
    ):
        _ = 1 / 0
    assert path.read_bytes() == before
    with pytest.raises(ZeroDivisionError), RecordWriter(tmp_path / "new.jsonl", results.header):
        _ = 1 / 0
    check_output(tmp_path / "new.jsonl", resume=False, overwrite=False)


def test_outputs_that_are_no_files_are_named(tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "there.jsonl")
    for path, words in (
        (link, "is a symbolic link"),
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "is a device"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_output(path, resume=False, overwrite=True)


def test_no_command_replaces_a_file_of_another_kind(tmp_path: Path, tasks: Path) -> None:
    before = tasks.read_bytes()
    options = RunOptions(tasks=(str(tasks),), output=tmp_path / "run.jsonl", overwrite=True)
    for profile in (tasks, tmp_path / "run.jsonl", tmp_path / "." / "run.jsonl"):
        with pytest.raises(ConfigError, match="--profile"):
            run_run(RunOptions(tasks=options.tasks, output=options.output, profile=profile))
    with pytest.raises(ConfigError, match="--output"):
        TuneOptions(output=tasks, overwrite=True).check()
    for output in (tasks, tmp_path / "." / "prompts.jsonl"):
        with pytest.raises(ConfigError, match="--output"):
            check_replay_options(ReplayOptions((tasks,), output=output, overwrite=True))
    assert tasks.read_bytes() == before
    good = tmp_path / "profile.json"
    good.write_text('{"schema_version": "1.0"}')
    check_replaceable(good, "--profile", b'"schema_version"', [tasks])
    check_replaceable(tmp_path / "none.json", "--profile", b'"schema_version"', [tasks])


@pytest.mark.parametrize("budget", ["²", "٣", "-1", "65537", "9" * 5000])
def test_budgets_are_plain_numbers(budget: str) -> None:
    with pytest.raises(ConfigError, match="budget must be a whole number up to"):
        parse_arm(f"prompt_lookup:budget={budget}")
    with pytest.raises(ConfigError, match="takes num_tokens=N"):
        parse_arm("hf_prompt_lookup:num_tokens=²")


def test_half_a_character_is_no_id(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "\\ud800", "prompt": "x"}\n')
    with pytest.raises(ConfigError, match="field 'id': is no Unicode text"):
        load_tasks([str(path)], None, None, 0)


def test_terminals_get_no_orders() -> None:
    assert printable("a\x1b[31mb\u202ec\nd é 文") == "a\ufffd[31mb\ufffdc\nd é 文"


@pytest.mark.parametrize(
    "options",
    [
        RunOptions(arms=("eagle3",), head="/no/such/head"),
        RunOptions(arms=("draft_model",), draft="/no/such/model"),
    ],
)
def test_a_missing_draft_is_said_before_anything_runs(options: RunOptions, tmp_path: Path) -> None:
    with pytest.raises(SpecdecError, match="no folder '/no/such"):
        run(RunOptions(**{**vars_of(options), "output": tmp_path / "run.jsonl"}))
    assert not (tmp_path / "run.jsonl").exists()


def vars_of(options: RunOptions) -> dict[str, Any]:
    return {"arms": options.arms, "head": options.head, "draft": options.draft}


class Odd:
    """Gives whatever it was made with."""

    counts_rounds, in_process = False, True

    def __init__(self, name: str, give: Callable[[Unit], Any], seconds: float | None = None):
        self.name, self.give, self.seconds = name, give, seconds

    def run(self, unit: Unit) -> Any:
        return self.give(unit)


class Liar(Odd):
    """Says how another arm answered."""

    def instrumented(self, unit: Unit) -> PassRecord:
        return PassRecord(0, unit.record.unit, "loop0", {"9": 1}, 1, 8, True, {}, 1.0, 0.1, [])


def text(unit: Unit) -> list[list[int]]:
    return [list(row) for row in unit.text_ids]


def changed(unit: Unit) -> list[list[int]]:
    with pytest.raises(TypeError):
        unit.text_ids[0][-1] = 7  # type: ignore[index]
    return [[*row[:-1], row[-1] + 1] for row in text(unit)]


def test_odd_arms_get_an_error_or_a_verdict_and_leave_no_trace(tmp_path: Path, tasks: Path) -> None:
    odd = {
        "none": Odd("none", lambda unit: None),
        "no_rows": Odd("no_rows", lambda unit: []),
        "words": Odd("words", lambda unit: [[str(t) for t in row] for row in text(unit)]),
        "tensor": Odd("tensor", lambda unit: torch.tensor(text(unit))),
        "backwards": Odd("backwards", text, -1.0),
        "at_once": Odd("at_once", text, 1e-12),
        "liar": Liar("liar", text),
        "changed": Odd("changed", changed),
        "right": Odd("right", text),
    }
    torch.manual_seed(3)
    before, verbosity = torch.get_rng_state(), logging.get_verbosity()
    options = RunOptions(
        tasks=(str(tasks),), arms=("hf",), output=tmp_path / "run.jsonl",
        max_new_tokens=16, pairs=1, temperatures=(1.0,),
    )  # fmt: skip
    found = run(options, {name: lambda bench, arm=arm: arm for name, arm in odd.items()})
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.get_verbosity() == verbosity
    names = {unit for _, unit in found.units}
    assert names >= {"prompts/a.2", "prompts/a.2#2"}, "turn 2 of a, and the prompt a.2"
    arms = {arm.name: arm for arm in summarize(found).settings[0].arms}
    for name in ("none", "no_rows", "words", "tensor", "backwards", "at_once", "liar"):
        assert arms[name].errors == arms[name].timings > 0, name
        assert arms[name].gain is None, name
    assert arms["changed"].wrong
    assert arms["changed"].gain is None
    assert not arms["right"].wrong
    assert not arms["right"].errors
    with pytest.raises(ConfigError, match="calls itself 'right'"):
        run(RunOptions(output=tmp_path / "b.jsonl"), {"left": lambda bench: odd["right"]})


def test_the_planted_wrong_arm_has_no_speed_up_in_a_fake_run() -> None:
    summary = summarize(with_arm(Fake(), "prompt_lookup", wrong=(2,)).results())
    (arm,) = [a for a in summary.settings[0].arms if a.name == "prompt_lookup"]
    assert arm.wrong
    assert arm.gain is None
    assert arm.over_hf is None
    assert all(category.gain is None for category in arm.categories)
