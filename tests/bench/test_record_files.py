"""Result files: strict to read, safe to append to, one writer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdec.errors import ConfigError, SpecdecError
from specdec_bench.results.files import RecordWriter, is_unfinished, read_results
from specdec_bench.results.records import (
    CheckRecord,
    Header,
    PassRecord,
    Setting,
    SkippedRecord,
    TimeRecord,
    UnitRecord,
)


def header(run_id: str = "r1", **config: Any) -> Header:
    facts = {"target_sha256": "t", "prompts_sha256": "p"}
    return Header(run_id, [Setting()], ["loop0", "loop0_again", "x"], "loop0", config, facts)


UNIT = UnitRecord(0, "u", "c", "code", 1, [3], 20, 0.25, "h")
SKIPPED = SkippedRecord(0, 2, 1, 0, 0)
PASS = PassRecord(
    0, "u", "x", {"1": 3, "4": 1}, 4, 9, True, {"prefill": 0.1}, 1.0, 0.1, [(1, 0.1), (4, 0.2)]
)
CHECK = CheckRecord(0, "u", "x", "h", "exact", {"exact": 20, "near_tie": 0, "wrong": 0})
RECORDS = (UNIT, SKIPPED, PASS, CHECK)


def time_of(arm: str, pair: int, **more: Any) -> TimeRecord:
    return TimeRecord(0, "u", arm, pair, 0, 0.5, 0.4, "h", **more)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished run."""
    path = tmp_path / "deep" / "run.jsonl"
    with RecordWriter(path, header()) as writer:
        writer.append(*RECORDS)
        for pair in range(2):
            writer.append(*(time_of(arm, pair) for arm in ("loop0", "loop0_again", "x")))
        writer.finish("pairs", 3.5)
    return path


def test_what_was_written_is_read(path: Path) -> None:
    found = read_results(path)
    assert found.header == header()
    assert found.units[0, "u"] == UNIT
    assert found.passes[0, "u", "x"] == PASS
    assert found.checks == [CHECK]
    assert found.skipped[0] == SKIPPED
    assert len(found.times) == 6
    assert found.end is not None
    assert (found.end.records, found.end.stopped_by, found.end.seconds) == (11, "pairs", 3.5)
    assert not is_unfinished(path)


@pytest.mark.parametrize("lines", range(12))
def test_without_its_last_lines_a_file_is_refused(path: Path, lines: int) -> None:
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:lines]))
    with pytest.raises(SpecdecError, match="truncated"):
        read_results(path)


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_torn_end_is_refused(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(SpecdecError, match="truncated"):
        read_results(path)


def _set(line: int, name: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(lines: list[dict[str, Any]]) -> None:
        lines[line][name] = value

    return change


def _drop(line: int, name: str) -> Callable[[list[dict[str, Any]]], None]:
    def change(lines: list[dict[str, Any]]) -> None:
        del lines[line][name]

    return change


def _copy(line: int) -> Callable[[list[dict[str, Any]]], None]:
    def change(lines: list[dict[str, Any]]) -> None:
        lines.insert(-1, dict(lines[line]))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set(0, "schema", 2), "line 1: field 'schema'"),
        (_set(0, "baseline", "none"), "field 'baseline'"),
        (_set(0, "settings", []), "field 'arms' or 'settings'"),
        (_set(0, "settings", [{"dtype": "float32"}]), r"line 1: field 'settings\[0\]\.batch'"),
        (_set(0, "arms", ["loop0", 1]), r"field 'arms\[1\]' must be text"),
        (_set(1, "kind", "unite"), "line 2: field 'kind': 'unite'"),
        (_set(1, "kind", ["unit"]), "line 2: field 'kind'"),
        (_set(1, "setting", 1), "line 2: field 'setting'"),
        (_set(1, "prompt_tokens", [3, "4"]), r"field 'prompt_tokens\[1\]' must be a whole number"),
        (_set(1, "looping", True), "field 'looping' must be a number"),
        (_set(1, "new_tokens", 2.0), "field 'new_tokens' must be a whole number"),
        (_set(1, "mood", "fine"), "line 2: field 'mood' is unknown"),
        (_set(1, "\ud800", 1), r"line 2: field '.ud800' is unknown"),
        (_set(4, "worst_ratio", 10**400), "line 5: field 'worst_ratio'"),
        (_set(3, "gaps", [[1]]), r"line 4: field 'gaps\[0\]' must be a list of 2"),
        (_set(3, "histogram", {"1": None}), r"field \"histogram\['1'\]\""),
        (_set(4, "verdict", "fine"), "line 5: field 'verdict' must be one of exact"),
        (_set(5, "arm", "y"), "line 6: field 'arm': 'y'"),
        (_set(5, "unit", "v"), "line 6: field 'unit'"),
        (_set(5, "wall", -1.0), "field 'wall': -1 is not from 0 to"),
        (_set(5, "wall", float("nan")), "line 6: not JSON"),
        (_drop(5, "cpu"), "line 6: field 'cpu' is missing"),
        (_set(11, "records", 10), "line 12: field 'records'"),
        (_copy(5), "a second 'time' record"),
        (_copy(3), "a second 'pass' record"),
        (_copy(0), "line 12: field 'run_id'"),
    ],
)
def test_a_bad_line_is_named(
    path: Path, change: Callable[[list[dict[str, Any]]], None], words: str
) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SpecdecError, match=words):
        read_results(path)


def test_joined_files_are_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    with RecordWriter(other, header("r2")) as writer:
        writer.finish("pairs", 1.0)
    path.write_bytes(path.read_bytes() + other.read_bytes())
    with pytest.raises(SpecdecError, match="more after the end mark"):
        read_results(path)


@pytest.mark.parametrize("text", ["", "\n", "[1]\n", "{}\n", "\x00\n", '{"kind": "unit"}\n'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(SpecdecError):
        read_results(path)
    with pytest.raises(SpecdecError, match="cannot read"):
        read_results(tmp_path / "none")


def unfinished(path: Path, tail: bytes = b"") -> None:
    with RecordWriter(path, header(pairs=2)) as writer:
        writer.append(UNIT, time_of("x", 0))
    path.write_bytes(path.read_bytes() + tail)


@pytest.mark.parametrize("tail", [b"", b'{"setting":0,"unit":"u","arm"', b"{"])
def test_a_stopped_run_goes_on_and_its_torn_line_is_cut(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "run.jsonl"
    unfinished(path, tail)
    assert is_unfinished(path)
    with RecordWriter(path, header("new name", pairs=2), resume=True) as writer:
        assert writer.header.run_id == "r1"
        assert writer.before is not None
        assert [time.arm for time in writer.before.times] == ["x"]
        writer.append(time_of("x", 1))
        writer.finish("pairs", 1.0)
    found = read_results(path)
    assert [time.pair for time in found.times] == [0, 1]
    assert found.header.run_id == "r1"


def test_a_run_killed_in_its_header_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"run_id":"abc","sett')
    with RecordWriter(path, header(), resume=True) as writer:
        assert writer.before is None
        writer.finish("pairs", 1.0)
    assert read_results(path).header.run_id == "r1"


def test_resuming_needs_the_same_run(tmp_path: Path, path: Path) -> None:
    own = tmp_path / "run.jsonl"
    unfinished(own)
    before = own.read_bytes()
    with pytest.raises(ConfigError, match="--resume"), RecordWriter(own, header(pairs=2)):
        pass
    with (
        pytest.raises(ConfigError, match="--pairs: 2 before, 3 now"),
        RecordWriter(own, header(pairs=3), resume=True),
    ):
        pass
    with pytest.raises(ConfigError, match="finished"), RecordWriter(path, header(), resume=True):
        pass
    assert own.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("device_name", "fast CPU", "slow CPU"),
        ("threads", 1, 2),
        ("revision", "abc", "abd"),
        ("packages", {"torch": "2.7"}, {"torch": "2.8"}),
        ("head_sha256", "a", "b"),
        ("draft_sha256", None, "b"),
    ],
)
def test_times_of_two_machines_or_versions_are_not_joined(
    tmp_path: Path, name: str, old: Any, new: Any
) -> None:
    path = tmp_path / "run.jsonl"
    first, other = (
        replace(header(), provenance={**header().provenance, name: value}) for value in (old, new)
    )
    with RecordWriter(path, first) as writer:
        writer.append(UNIT)
    with pytest.raises(ConfigError, match=name), RecordWriter(path, other, resume=True):
        pass
    with RecordWriter(path, first, resume=True) as writer:
        assert writer.before is not None


def test_files_from_before_a_field_was_added_are_read(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[3]["first_tokens"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_results(path).passes[0, "u", "x"].first_tokens == 1


def test_overwriting_takes_result_files_only(tmp_path: Path, path: Path) -> None:
    with RecordWriter(path, header("r3"), overwrite=True) as writer:
        writer.finish("pairs", 1.0)
    assert read_results(path).header.run_id == "r3"
    diary = tmp_path / "diary.txt"
    diary.write_text("dear diary")
    with pytest.raises(ConfigError, match="no result file"):
        RecordWriter(diary, header(), overwrite=True).__enter__()
    assert diary.read_text() == "dear diary"
    with pytest.raises(SpecdecError, match="cannot write"):
        RecordWriter(tmp_path, header()).__enter__()


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, header()) as first:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(SpecdecError, match="another run writes"):
                RecordWriter(path, header(), **options).__enter__()
        first.append(UNIT)
        first.finish("pairs", 1.0)
    assert len(read_results(path).units) == 1


def test_numbers_that_json_lacks_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, header()) as writer:
        with pytest.raises(SpecdecError, match="cannot be written"):
            writer.append(UNIT, TimeRecord(0, "u", "x", 0, 0, float("nan"), None, ""))
        assert path.read_bytes() == b"", "all of a group or nothing"
    with pytest.raises(SpecdecError, match="closed"):
        writer.append(UNIT)
