"""Rows of every format and every file, and what becomes of the bad ones."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_helpers import CHATML, chat_format, chat_row, write_rows

from specdec.artifacts import json_lines
from specdec.errors import ConfigError
from specdec_training.data import row_files
from specdec_training.data.bad_rows import REASONS, BadRow, Tally
from specdec_training.data.conversations import Row, parse_row
from specdec_training.data.encoding import Encoder
from specdec_training.data.options import DataPrepareOptions, ReadOptions
from specdec_training.data.prepare import prepare
from specdec_training.data.row_files import Inputs
from specdec_training.data.turns import Turn

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
Reader = Callable[..., list[Row]]


def read(*names: Path | str, **options: Any) -> list[row_files.ReadRow]:
    return list(Inputs(ReadOptions(input=tuple(map(str, names)), **options)).rows())


BAD_ROWS: list[tuple[Any, str]] = [
    ('{"text": "abc', "broken_json"),
    ("nonsense", "broken_json"),
    ("[" * 100_000, "broken_json"),
    (b'{"text": "\xff"}', "not_utf8"),
    ('{"text": "\\ud800"}', "not_utf8"),
    ("[1, 2]", "not_an_object"),
    ("3", "not_an_object"),
    ({"title": "x"}, "missing_keys"),
    ({}, "missing_keys"),
    ({"messages": None}, "missing_keys"),
    ({"text": "x", "messages": [USER, ANSWER]}, "two_formats"),
    ({"prompt": "x", "text": "y"}, "two_formats"),
    ({"messages": "hello"}, "bad_turn"),
    ({"messages": []}, "bad_turn"),
    ({"messages": [USER, ANSWER] * 201}, "bad_turn"),
    ({"messages": ["hello"]}, "bad_turn"),
    ({"messages": [{"role": "user"}]}, "bad_turn"),
    ({"conversations": [{"from": "human", "content": "x"}]}, "bad_turn"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown_role"),
    ({"messages": [{"role": 3, "content": "x"}]}, "unknown_role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "null_content"),
    ({"messages": [USER, {"role": "assistant", "content": 7}]}, "content_not_text"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
     "content_not_text"),
    ({"text": 7}, "content_not_text"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty_assistant_turn"),
    ({"question": "x", "answer": ""}, "empty_assistant_turn"),
    ({"text": " "}, "empty_text"),
    ({"prompt": "x", "completion": ""}, "empty_text"),
    ({"messages": [USER]}, "no_assistant_turn"),
    ({"prompt": "only"}, "no_completion"),
    ({"prompt_ids": [], "completion_ids": [1]}, "bad_token_ids"),
    ({"prompt_ids": [1.5], "completion_ids": [1]}, "bad_token_ids"),
    ({"prompt_ids": [True], "completion_ids": [1]}, "bad_token_ids"),
    ({"prompt_ids": [10**30], "completion_ids": [1]}, "bad_token_ids"),
    ({"prompt_ids": [9], "completion_ids": [10**6]}, "token_out_of_vocabulary"),
    ({"text": "go <|im_end|> on"}, "special_token_in_text"),
    ({"text": "x" * 30, "id": "first"}, "duplicate_id"),
    ({"text": "good"}, "duplicate_content"),
    ({"messages": [USER, ANSWER] * 40 + [{"role": "assistant", "content": "<think>"}]}, ""),
    ({"messages": [{"role": "user", "content": "q" * 100}, ANSWER]}, "nothing_to_learn"),
]  # fmt: skip


def test_every_kind_of_bad_row_is_counted_by_its_reason(tmp_path: Path) -> None:
    good = [{"text": "good", "id": "first"}, chat_row("q", "a")]
    path = write_rows(tmp_path / "rows.jsonl", [*good, *(row for row, _ in BAD_ROWS)])
    encoder = Encoder(chat_format(CHATML), 300, 60)
    tally, expected = Tally(), Tally()
    for found in read(path):
        reason = found.problem.reason if found.problem else ""
        if found.row is not None:
            try:
                encoder.examples(found.row)
            except BadRow as problem:
                reason = problem.reason
        tally.add(reason, found.where, "")
    for number, reason in enumerate(["", "", *(reason for _, reason in BAD_ROWS)], 1):
        expected.add(reason, f"rows.jsonl:{number}", "")
    assert (tally.rows, tally.counts) == (expected.rows, expected.counts)
    assert tally.first == expected.first
    assert len(tally.counts) >= 18
    assert tally.bad == tally.rows - 3 - tally.counts["duplicate_content"]


def test_no_line_about_a_bad_row_says_a_thing_twice(tmp_path: Path) -> None:
    """Neither a word after itself, nor what the reason says again as what was found."""
    encoder, problems = Encoder(chat_format(CHATML), 300, 60), []
    for found in read(write_rows(tmp_path / "rows.jsonl", [row for row, _ in BAD_ROWS])):
        try:
            if found.problem is not None:
                raise found.problem
            encoder.examples(found.row or Row("text"))
        except BadRow as problem:
            problems.append(problem)
    assert len({problem.reason for problem in problems}) >= 17
    for problem in problems:
        meaning = " ".join(re.findall(r"[\w'-]+", REASONS[problem.reason]))
        for pair in pairwise(re.findall(r"[\w'-]+", problem.detail)):
            assert f" {' '.join(pair)} " not in f" {meaning} ", problem
        tally = Tally()
        tally.add(problem.reason, "rows.jsonl:1", problem.detail)
        assert not re.search(r"\b([a-z]{2,})\W+\1\b", tally.lines()[0]), problem


def test_too_many_bad_rows_stop_with_counts_and_first_examples() -> None:
    tally = Tally()
    for _ in range(97):
        tally.add("", "a:1", "")
    tally.add("broken_json", "a:2", "at column 3")
    for number in range(2):
        tally.add("unknown_role", f"a:{3 + number}", "wizard")
    tally.check(0.03)
    for _ in range(50):  # say nothing about the others
        tally.add("duplicate_content", "a:9", "")
    tally.check(0.03)
    with pytest.raises(ConfigError) as refused:
        tally.check(0.029)
    message = str(refused.value)
    assert "3.0 % (3 of 100)" in message
    assert f"2 x unknown_role ({REASONS['unknown_role']}), first a:3: wizard" in message
    assert "1 x broken_json" in message
    assert "at column 3" in message


def test_an_input_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows"):
        Tally().check(1.0)


@pytest.mark.parametrize("text", ["", "\n \n", "[]"], ids=repr)
def test_files_without_rows_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"rows\.json has no rows"):
        list(Inputs(DataPrepareOptions(input=(str(path),))).rows())
    options = DataPrepareOptions(
        input=(str(path),), output=tmp_path / "data", cache_dir=tmp_path / "cache"
    )
    for _ in range(2):  # what `datasets` caches of nothing must not change the answer
        with pytest.raises(ConfigError, match=r"rows\.json has no rows"):
            prepare(options)


def test_formats_that_mean_the_same_are_the_same() -> None:
    turns = tuple(
        Turn(role, text)
        for role, text in (("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "t"))
    )
    openai = {"messages": [{"role": r, "content": c} for r, c, *_ in turns]}
    parts = {
        "messages": [
            {"role": r, "content": [{"type": "text", "text": c}], "name": None}
            for r, c, *_ in turns
        ],
        "text": None,
    }
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
    sharegpt = {"conversations": [{"from": names[r], "value": c} for r, c, *_ in turns]}
    assert parse_row(openai) == parse_row(parts) == parse_row(sharegpt) == Row("chat", turns)
    assert parse_row({"question": "q", "answer": "a"}) == parse_row(chat_row("q", "a"))


def test_a_row_survives_its_column() -> None:
    for row in (
        parse_row(chat_row("q é\n", "a")),
        parse_row({"prompt_ids": [1], "completion_ids": [2], "group": "g", "id": 5}),
        parse_row({"prompt": "p", "completion": "c"}),
    ):
        assert Row.from_json(row.to_json()) == row


def test_answers_to_one_prompt_belong_together() -> None:
    one, other = parse_row(chat_row("q", "a")), parse_row(chat_row("q", "b"))
    assert one.belongs_to() == other.belongs_to() != parse_row(chat_row("r", "a")).belongs_to()
    assert one.key() != other.key()
    named = {"prompt_ids": [1], "completion_ids": [2], "group": "g"}
    assert parse_row(named).belongs_to() == "g"


def test_prompts_as_conversations() -> None:
    pair = parse_row({"prompt": "q", "completion": "a"})
    assert pair.as_chat() == parse_row(chat_row("q", "a"))
    assert parse_row({"prompt": "q"}).as_chat().messages == (Turn("user", "q"),)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("\n\n" + text)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in (
        "a.jsonl", "windows.jsonl", "b.jsonl.gz", "list.json", "lines.json", "c.parquet", "saved",
    ):  # fmt: skip
        found = read(tmp_path / name)
        assert [one.row.prompt for one in found if one.row] == [row["text"] for row in rows], name


def test_a_folder_and_several_inputs(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_rows(tmp_path / "deep" / "b.jsonl", [{"text": "b", "id": 1}])
    write_rows(tmp_path / "a.jsonl", [{"text": "a", "id": 1}])
    write_rows(tmp_path / ".hidden.jsonl", [{"text": "hidden"}])
    other = write_rows(tmp_path.parent / f"{tmp_path.name}.jsonl", [{"text": "a"}, {"text": "c"}])
    found = read(tmp_path, other)
    assert [one.row.prompt if one.row else one.problem.reason for one in found] == [
        "a", "b", "duplicate_content", "c",
    ]  # fmt: skip
    assert len(read(tmp_path, other, limit=2)) == 2


def test_a_line_that_is_too_long_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MOST_LINE_BYTES", 50)
    rows = [{"text": "a"}, {"text": "b" * 200}, {"text": "c"}, {"text": "d" * 90}]
    found = read(write_rows(tmp_path / "a.jsonl", rows))
    assert [one.row is not None for one in found] == [True, False, True, False]
    assert found[1].problem is not None
    assert found[1].problem.reason == "line_too_long"


def test_the_hash_follows_the_bytes(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])

    def hash_now(**options: Any) -> str:
        return Inputs(ReadOptions(input=(str(path),), **options)).hash()

    first = hash_now()
    assert hash_now() == first != hash_now(limit=1)
    write_rows(path, [{"text": "b"}])
    assert hash_now() != first


def test_the_bundled_corpus_is_cut_by_whole_lines() -> None:
    options = {"limit": 30, "min_lines": 3, "max_lines": 5}
    found = [one.row for one in read("demo", **options)]
    assert found == [one.row for one in read("demo", **options)]
    assert found != [one.row for one in read("demo", **options, seed=1)]
    for row in found:
        assert row is not None
        assert row.kind == "text"
        assert 3 <= row.prompt.count("\n") <= 5
        assert row.prompt.endswith("\n")
    with pytest.raises(ConfigError, match="--min-lines"):
        read("demo", min_lines=5, max_lines=4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "there is no file"),
        ("./missing", "there is no file"),
        ("", "an input is empty"),
        ("a/b/c", "there is no file"),
        ("x\0y", "there is no file"),
        ("a b", "there is no file"),
        ("x" * 97, "there is no file"),
        ("~nosuchuser/x", "cannot look for"),
    ],
)
def test_inputs_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(name)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('[{"text": "a"}')
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-12])
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"abc" * 99)[:12] + b"\xff" * 40)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "done" / "examples").mkdir(parents=True)
    (tmp_path / "done" / "meta.json").write_text("{}")
    for name, message in (
        ("a.csv", "is none of"), ("empty", "holds no"), ("bad.json", "no JSON list"),
        ("bad.parquet", "cannot read"), ("bad.jsonl.gz", "cannot read"), ("done", "prepared"),
        ("torn.jsonl.gz", "cannot read"), ("a.parquet.gz", "is none of"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / name)
    with pytest.raises(ConfigError, match="--input is missing"):
        read()
