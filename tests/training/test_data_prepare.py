"""Prepared data: the same twice, whole or not there, checked when opened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from data_helpers import CHATML, TAGGED_WHOLE, byte_tokenizer, chat_row, write_rows, write_target
from safetensors.torch import load_file, save_file

from specdec.errors import ConfigError
from specdec_training.commands.data import run_prepare
from specdec_training.data import dataset_bars
from specdec_training.data import prepare as prepare_module
from specdec_training.data.options import DataPrepareOptions
from specdec_training.data.prepare import prepare
from specdec_training.data.prepared import PreparedData

ROWS = [chat_row(f"question {n}", f"answer {n * n}") for n in range(40)]
Make = Callable[..., PreparedData]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def options(tmp_path: Path, target: Path, cache: Path) -> DataPrepareOptions:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    return DataPrepareOptions(
        input=(str(rows),),
        target=str(target),
        output=tmp_path / "out",
        cache_dir=cache,
        draft_vocab=64,
        max_length=96,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, target: Path, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    prepare(
        DataPrepareOptions(
            input=(str(write_rows(folder / "rows.jsonl", ROWS)),),
            target=str(target),
            output=folder / "out",
            cache_dir=cache,
            draft_vocab=64,
            max_length=96,
        )
    )
    return folder / "out"


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_is_written_is_what_is_read(options: DataPrepareOptions, target: Path) -> None:
    data = prepare(options).data
    tokenizer, meta = byte_tokenizer(CHATML), data.meta
    assert (len(data.examples), len(data.held_out)) == (36, 4)
    assert meta.rows_read == 40
    assert meta.kinds == {"chat": 36}
    assert meta.target.vocab_size == meta.vocab_size == len(tokenizer) + 4
    for example in data.examples:
        spoken = [t for t, m in zip(example.token_ids, example.loss_mask, strict=True) if m]
        assert tokenizer.decode(spoken).startswith("answer ")
        assert tokenizer.decode(spoken).endswith("<|im_end|>")
    for prompt in data.held_out:
        assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
        assert not any(e.token_ids[: len(prompt)] == prompt for e in data.examples)
    counts = torch.zeros_like(data.counts)
    for example in data.examples:
        for token, wanted in zip(example.token_ids, example.loss_mask, strict=True):
            counts[token] += wanted
    assert torch.equal(counts, data.counts)
    assert int(counts.sum()) == meta.loss_tokens
    assert sum(len(example.token_ids) for example in data.examples) == meta.tokens
    ids = set(data.vocabulary.ids.tolist())
    assert len(ids) == 64
    assert set(counts.nonzero().flatten().tolist()) <= ids
    assert {tokenizer.eos_token_id, tokenizer.bos_token_id} <= ids
    assert meta.draft_vocab_coverage == 1.0
    assert data.examples[-1] == data.examples[35] == data.examples[35:][0]


def test_the_same_twice(options: DataPrepareOptions, tmp_path: Path, cache: Path) -> None:
    """With and without the cache, in one process or in two."""
    first = prepare(options).data
    fresh = replace(options, output=tmp_path / "fresh", cache_dir=tmp_path / "cache", num_proc=2)
    cached = replace(options, output=tmp_path / "cached")
    for again in (prepare(fresh).data, prepare(cached).data):
        assert again.meta == first.meta
        assert again.held_out == first.held_out
        assert again.examples.hash() == first.examples.hash()
    for name in ("meta.json", "held_out.json", "draft_vocab.safetensors"):
        assert (tmp_path / "fresh" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_other_options_make_other_data(options: DataPrepareOptions, tmp_path: Path) -> None:
    hashes = set()
    template = tmp_path / "other.jinja"
    template.write_text(CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    for number, changes in enumerate(
        ({}, {"seed": 1}, {"max_length": 40}, {"chat_template": template}, {"held_out": 0})
    ):
        done = prepare(replace(options, output=tmp_path / str(number), **changes))
        hashes.add(done.data.meta.data_hash)
    assert len(hashes) == 5


def test_answers_to_a_held_out_prompt_are_held_out_with_it(
    options: DataPrepareOptions, tmp_path: Path
) -> None:
    rows = [chat_row(f"question {n}", f"answer {n} {k}") for n in range(20) for k in range(3)]
    path = write_rows(tmp_path / "many.jsonl", rows)
    data = prepare(replace(options, input=(str(path),))).data
    assert (len(data.held_out), len(data.examples)) == (2, 54)
    for prompt in data.held_out:
        assert not any(e.token_ids[: len(prompt)] == prompt for e in data.examples)


def test_held_out_prompts_from_another_input(options: DataPrepareOptions, tmp_path: Path) -> None:
    """They are all from there, and rows that ask the same are not trained on."""
    rows = [chat_row(f"question {n}", "another answer") for n in (3, 100, 101)]
    others = write_rows(tmp_path / "others.jsonl", rows)
    apart = replace(options, held_out_input=(str(others),), held_out=3)
    data = prepare(apart).data
    tokenizer = byte_tokenizer(CHATML)
    assert (len(data.examples), len(data.held_out)) == (39, 3)
    for prompt in data.held_out:
        assert not any(e.token_ids[: len(prompt)] == prompt for e in data.examples)
    asked = {tokenizer.decode(prompt) for prompt in data.held_out}
    assert len(asked) == 3
    with pytest.raises(ConfigError, match="has 3 prompts, --held-out wants 4"):
        prepare(replace(apart, held_out=4, overwrite=True))


def test_bad_rows_are_skipped_or_stop_it(options: DataPrepareOptions, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [*ROWS, "{broken", {"messages": []}])
    options = replace(options, input=(str(path),))
    with pytest.raises(ConfigError, match=r"2 of 42.*broken_json"):
        prepare(options)
    assert options.output is not None
    assert not options.output.exists()
    done = prepare(replace(options, max_bad_fraction=0.05))
    assert done.data.meta.skipped == {"bad_turn": 1, "broken_json": 1}
    assert done.tally.first["broken_json"].startswith("bad.jsonl:41: ")


def test_nothing_to_learn_and_everything_to_learn(
    options: DataPrepareOptions, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no example is left"):
        prepare(replace(options, max_length=5, max_bad_fraction=1.0))
    whole = tmp_path / "whole.jinja"
    whole.write_text(TAGGED_WHOLE)
    with pytest.raises(ConfigError, match="covers every token"):
        prepare(replace(options, chat_template=whole))


def test_the_whole_vocabulary(options: DataPrepareOptions) -> None:
    data = prepare(replace(options, draft_vocab=10**6)).data
    assert data.vocabulary.is_whole
    assert data.meta.draft_vocab_size == data.meta.vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 1}, "--max-length"),
        ({"draft_vocab": 0}, "--draft-vocab"),
        ({"held_out": -1}, "--held-out"),
        ({"num_proc": 0}, "--num-proc"),
        ({"limit": 0}, "--limit"),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction"),
        ({"max_bad_fraction": float("nan")}, "--max-bad-fraction"),
        ({"output": None}, "--output is missing"),
        ({"input": ()}, "--input is missing"),
        ({"draft_vocab": 2}, "too small"),
    ],
)
def test_options_out_of_range(
    changes: dict[str, Any], message: str, options: DataPrepareOptions, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(replace(options, **changes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_places_where_nothing_is_written(options: DataPrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for name, message in (
        ("file", "is a file"), ("full", "holds other files"), ("link", "symbolic link"),
        ("dangling", "symbolic link"), ("file/below", "cannot"), ("a\0b", "cannot|null"),
    ):  # fmt: skip
        for overwrite in (False, True):
            with pytest.raises((ConfigError, ValueError), match=message):
                prepare(replace(options, output=tmp_path / name, overwrite=overwrite))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken_and_a_finished_one_only_on_request(
    options: DataPrepareOptions,
) -> None:
    assert options.output is not None
    options.output.mkdir()
    first = prepare(options).data.meta
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare(options)
    second = prepare(replace(options, overwrite=True, seed=1)).data.meta
    assert second != first
    assert [p.name for p in options.output.parent.iterdir() if p.name.startswith(".")] == []


def test_a_failure_leaves_nothing_behind(
    options: DataPrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, *_: Any) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    first = prepare(options).data.meta
    monkeypatch.setattr(prepare_module, "write_prepared", fail)
    with pytest.raises(ConfigError, match=r"cannot write --output .*: No space left"):
        prepare(replace(options, overwrite=True, seed=1))
    assert options.output is not None
    assert PreparedData.load(options.output).meta == first
    assert [p.name for p in options.output.parent.iterdir() if p.name.startswith(".")] == []


def test_unfinished_data_are_refused(damaged: Path, tmp_path: Path) -> None:
    (damaged / "meta.json").unlink()
    with pytest.raises(ConfigError, match="holds no finished data"):
        PreparedData.load(damaged)
    with pytest.raises(ConfigError, match="there is no folder"):
        PreparedData.load(tmp_path / "missing")


def _changed_meta(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(facts | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 9},
        {"unknown": 1},
        {"rows": 35},
        {"tokens": 1},
        {"loss_tokens": 1},
        {"vocab_size": 70},
        {"max_length": 10},
        {"draft_vocab_size": 63},
        {"draft_vocab_coverage": 7},
        {"held_out": 3},
        {"rows": "many"},
        {"target": {}},
        {"skipped": [1]},
        {"vocab_hash": "0" * 64},
    ],
    ids=str,
)
def test_a_description_that_does_not_fit(changes: dict[str, Any], damaged: Path) -> None:
    _changed_meta(damaged, **changes)
    with pytest.raises(ConfigError):
        PreparedData.load(damaged)


def test_damaged_files_are_refused(damaged: Path) -> None:
    def swap(name: str, content: bytes) -> None:
        before = (damaged / name).read_bytes()
        (damaged / name).write_bytes(content)
        with pytest.raises(ConfigError):
            PreparedData.load(damaged)
        (damaged / name).write_bytes(before)

    for name in ("meta.json", "held_out.json", "draft_vocab.safetensors"):
        swap(name, b"")
        swap(name, b"[1, 2")
        swap(name, (damaged / name).read_bytes()[:-9])
    (arrow,) = (damaged / "examples").glob("*.arrow")
    swap(f"examples/{arrow.name}", arrow.read_bytes()[:200])
    tensors = load_file(damaged / "draft_vocab.safetensors")
    save_file(tensors | {"d2t": tensors["d2t"] + 1}, damaged / "draft_vocab.safetensors")
    with pytest.raises(ConfigError, match="was changed"):
        PreparedData.load(damaged)


def test_examples_from_elsewhere_are_refused(damaged: Path, tmp_path: Path) -> None:
    state = damaged / "examples" / "state.json"
    facts = json.loads(state.read_text())
    (arrow,) = (damaged / "examples").glob("*.arrow")
    moved = tmp_path / arrow.name
    shutil.copy(arrow, moved)
    for name in (str(moved), f"../../{arrow.name}"):
        state.write_text(json.dumps(facts | {"_data_files": [{"filename": name}]}))
        with pytest.raises(ConfigError, match="is no file of the folder"):
            PreparedData.load(damaged)
    state.write_text(json.dumps(facts))
    arrow.unlink()
    arrow.symlink_to(moved)
    with pytest.raises(ConfigError, match="is no file of the folder"):
        PreparedData.load(damaged)


@pytest.mark.parametrize(
    "columns",
    [
        {"token_ids": [[1, 2]], "loss_mask": [[True]]},
        {"token_ids": [[1, None]], "loss_mask": [[True, False]]},
        {"token_ids": [[1.5]], "loss_mask": [[True]]},
        {"token_ids": [[1]]},
    ],
    ids=["lengths", "nulls", "floats", "missing"],
)
def test_odd_examples_are_refused(columns: dict[str, Any], damaged: Path) -> None:
    kinds = {"token_ids": "int32", "loss_mask": "bool"}
    if columns["token_ids"] == [[1.5]]:
        kinds["token_ids"] = "float32"
    features = {name: datasets.List(datasets.Value(kinds[name])) for name in columns}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    shutil.rmtree(damaged / "examples")
    table.save_to_disk(damaged / "examples")
    with pytest.raises(ConfigError, match=r"differ in length|nulls|other columns"):
        PreparedData.load(damaged)


def test_the_cache_is_used(
    options: DataPrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(options).data.meta

    def never(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(prepare_module.Encoder, "examples", never)
    assert prepare(replace(options, output=tmp_path / "again")).data.meta == first


def test_the_only_bar_is_ours_and_comes_when_there_is_something_to_wait_for(
    options: DataPrepareOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(name: str) -> str:
        prepare(replace(options, output=tmp_path / name, cache_dir=tmp_path / f"{name} cache"))
        assert not datasets.are_progress_bars_disabled()  # the caller's setting stays
        return capsys.readouterr().err

    assert said("short") == ""
    monkeypatch.setattr(dataset_bars, "_PATIENCE", 0.0)
    long = said("long")
    assert "tokenising: 100%" in long
    assert "40/40" in long
    for theirs in ("examples", "Generating", "Saving", "Map"):
        assert theirs not in long


def test_the_command(
    options: DataPrepareOptions, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_prepare(replace(options, output=Path(os.path.relpath(tmp_path / "out")))) == 0
    said = capsys.readouterr().out
    assert "36 from 40 rows" in said
    assert "4 prompts" in said


def test_the_command_lists_bad_rows_line_by_line(
    options: DataPrepareOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [*ROWS, "{broken", {"messages": []}])
    with pytest.raises(ConfigError) as refused:
        run_prepare(replace(options, input=(str(path),)))
    assert len(str(refused.value)) < 200
    said = capsys.readouterr().err
    assert "skipped 1 x broken_json" in said
    assert "skipped 1 x bad_turn" in said
