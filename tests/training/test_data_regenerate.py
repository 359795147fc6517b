"""The target's own answers: exact tokens, resumable at any byte, never mixed with others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import CHATML, CONTEXT, END, byte_tokenizer, chat_row, write_rows, write_target
from transformers import AutoModelForCausalLM

from specdec.audit.loops import loop_start
from specdec.errors import ConfigError
from specdec_training.commands.data import run_regenerate
from specdec_training.data import regenerate as regenerate_module
from specdec_training.data.generation import Sampling, Writer
from specdec_training.data.options import DataPrepareOptions, DataRegenerateOptions
from specdec_training.data.prepare import prepare
from specdec_training.data.regenerate import regenerate

ROWS = [
    *({"text": f"prefix {n} " * (1 + n % 3)} for n in range(5)),
    {"prompt": "a prompt"},
    {"prompt": "with a", "completion": "completion that is dropped"},
    {"prompt_ids": [70, 71, 72], "completion_ids": [1]},
    chat_row("one question", "dropped"),
    {"messages": [{"role": "user", "content": "no answer yet"}]},
    {
        "messages": [
            {"role": role, "content": content}
            for role, content in (
                ("system", "s"), ("user", "q1"), ("assistant", "x"), ("user", "q2"),
                ("assistant", "y"), ("user", "q3"),
            )
        ]
    },
]  # fmt: skip
Read = Callable[[], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def options(tmp_path: Path, target: Path) -> DataRegenerateOptions:
    return DataRegenerateOptions(
        input=(str(write_rows(tmp_path / "rows.jsonl", ROWS)),),
        target=str(target),
        output=tmp_path / "answers.jsonl",
        batch_size=4,
        max_new_tokens=12,
        temperature=1.0,
        threads=1,
    )


def rows_of(options: DataRegenerateOptions) -> list[dict[str, Any]]:
    assert options.output is not None
    return [json.loads(line) for line in options.output.read_text().splitlines()]


def test_every_row_is_answered_with_its_own_context(options: DataRegenerateOptions) -> None:
    done = regenerate(options)
    rows, tokenizer = rows_of(options), byte_tokenizer(CHATML)
    assert done.rows == done.written == len(rows) == 10 + 3
    assert len({row["id"] for row in rows}) == len(rows)
    assert done.new_tokens == sum(len(row["completion_ids"]) for row in rows)
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)}
    for row in rows:
        ids = row["completion_ids"]
        assert 1 <= len(ids) <= 12
        assert not stops & set(ids[:-1])
        assert row["finish"] == ("stop" if ids[-1] in stops else "length")
        assert row["decoded_completion"] == tokenizer.decode(ids)
    prompts = [row["decoded_prompt"] for row in rows]
    assert {"a prompt", "with a", "prefix 0 ", tokenizer.decode([70, 71, 72])} <= set(prompts)
    turns = [row for row in rows if "q1" in row["decoded_prompt"]]
    assert len({row["group"] for row in turns}) == 1
    system = "<|im_start|>system\ns<|im_end|>\n"
    context = f"{system}<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    for row, question in zip(turns, ("q2", "q3", None), strict=True):
        assert row["decoded_prompt"] == context
        said = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        context += f"{said}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        context += "<|im_start|>assistant\n"


def test_greedy_answers_are_those_of_plain_generate(
    options: DataRegenerateOptions, target: Path
) -> None:
    """In a batch with padding as alone."""
    regenerate(replace(options, temperature=0.0, batch_size=8))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    for row in rows_of(options):
        ids = torch.tensor([row["prompt_ids"]])
        plain = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert plain[0, ids.shape[1] :].tolist() == row["completion_ids"]


def test_the_same_twice_and_torchs_generator_is_left_alone(
    options: DataRegenerateOptions, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    regenerate(options)
    assert torch.equal(before, torch.random.get_rng_state())
    other = replace(options, output=tmp_path / "other.jsonl")
    torch.manual_seed(4)
    regenerate(other)
    assert rows_of(other) == rows_of(options)
    changed = replace(options, output=tmp_path / "changed.jsonl", seed=1)
    regenerate(changed)
    assert rows_of(changed) != rows_of(options)


def test_every_batch_and_turn_has_its_own_seed(
    options: DataRegenerateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, seeds = Writer.answer, []

    def noting(self: Writer, prompts: Any, seed: int) -> Any:
        seeds.append(seed)
        return answer(self, prompts, seed)

    monkeypatch.setattr(Writer, "answer", noting)
    regenerate(options)
    assert len(set(seeds)) == len(seeds) == 3 + 2


@pytest.mark.fault
def test_resuming_after_a_cut_anywhere_gives_the_same_file(options: DataRegenerateOptions) -> None:
    regenerate(options)
    assert options.output is not None
    whole = options.output.read_bytes()
    line = whole.index(b"\n") + 1
    for cut in (0, 1, line - 1, line, line + 1, len(whole) // 2, len(whole) - 1, len(whole)):
        options.output.write_bytes(whole[:cut])
        done = regenerate(options)
        assert options.output.read_bytes() == whole, cut
        assert done.written == len(ROWS) + 2 - whole[:cut].count(b"\n")


@pytest.mark.fault
def test_a_killed_run_goes_on(
    options: DataRegenerateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regenerate(replace(options, output=tmp_path / "whole.jsonl"))
    answer, calls = Writer.answer, []

    def dies(self: Writer, prompts: Any, seed: int) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, prompts, seed)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "answer", dies)
        with pytest.raises(KeyboardInterrupt):
            regenerate(options)
    assert options.output is not None
    assert options.output.read_text().count("\n") == 4
    regenerate(options)
    assert options.output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_options_are_refused_and_named(options: DataRegenerateOptions) -> None:
    regenerate(options)
    assert options.output is not None
    before = options.output.read_bytes()
    with pytest.raises(ConfigError) as refused:
        regenerate(replace(options, temperature=0.5, seed=2))
    message = str(refused.value)
    assert "temperature (there 1.0, now 0.5)" in message
    assert "seed (there 0, now 2)" in message
    assert "top_p" not in message
    write_rows(Path(options.input[0]), ROWS[:-1])
    with pytest.raises(ConfigError, match="inputs"):
        regenerate(options)
    assert options.output.read_bytes() == before


def test_a_file_without_rows_may_be_begun_with_other_options(
    options: DataRegenerateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ConfigError("no such device")

    with monkeypatch.context() as patched:
        patched.setattr(regenerate_module, "load_model", fail)
        with pytest.raises(ConfigError, match="no such device"):
            regenerate(options)
    assert regenerate(replace(options, seed=5)).written == 13


def test_any_drafting_method_writes_the_same(
    options: DataRegenerateOptions, tmp_path: Path
) -> None:
    plain = replace(options, dtype="float32")
    regenerate(plain)
    drafted = replace(plain, output=tmp_path / "drafted.jsonl", method="prompt_lookup")
    regenerate(drafted)
    assert rows_of(drafted) == rows_of(plain)
    with pytest.raises(ConfigError, match="nosuch"):
        regenerate(replace(plain, output=tmp_path / "x.jsonl", method="nosuch"))


def test_loops_are_cut_off(options: DataRegenerateOptions) -> None:
    options = replace(options, temperature=0.0, max_new_tokens=60, drop_loops=True)
    done = regenerate(options)
    assert done.finishes.get("loop", 0) > 0
    for row in rows_of(options):
        assert row["completion_ids"]
        if row["finish"] == "loop":
            assert loop_start(row["completion_ids"]) is None


def test_prompts_that_leave_no_room_are_counted(
    options: DataRegenerateOptions, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "long.jsonl", [{"text": "x" * n} for n in (5, 150, 500)])
    options = replace(options, input=(str(path),))
    with pytest.raises(ConfigError, match="2 x prompt_too_long"):
        regenerate(options)
    done = regenerate(replace(options, max_bad_fraction=0.7))
    assert done.rows == 1
    roomy = replace(options, output=tmp_path / "b.jsonl", max_prompt=155, max_bad_fraction=0.7)
    regenerate(roomy)
    assert {len(row["completion_ids"]) for row in rows_of(roomy)} <= set(
        range(1, CONTEXT - 150 + 1)
    )
    with pytest.raises(ConfigError, match="leaves no room"):
        regenerate(replace(options, output=tmp_path / "c.jsonl", max_new_tokens=CONTEXT))


def test_a_conversation_that_outgrows_the_context_ends_early(
    options: DataRegenerateOptions, tmp_path: Path
) -> None:
    turns = [(r, c * 30) for _ in range(4) for r, c in (("user", "q"), ("assistant", "a"))]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    options = replace(options, input=(str(write_rows(tmp_path / "x.jsonl", [row])),))
    done = regenerate(options)
    assert 1 <= done.rows < 4
    again = regenerate(options)
    assert (again.written, again.new_tokens) == (0, 0)  # it is not begun again


def test_places_where_nothing_is_written(options: DataRegenerateOptions, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "mine.jsonl").write_text('{"my": "rows"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "mine.jsonl")
    for name, message in (
        ("folder.jsonl", "is a folder"), ("link.jsonl", "symbolic link"),
        ("mine.jsonl", "has rows and no"), ("mine.txt", "must end in .jsonl"),
        ("mine.jsonl/x.jsonl", "cannot write"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            regenerate(replace(options, output=tmp_path / name))
    assert (tmp_path / "mine.jsonl").read_text() == '{"my": "rows"}\n'


def test_damage_in_the_middle_is_not_papered_over(options: DataRegenerateOptions) -> None:
    regenerate(options)
    assert options.output is not None
    lines = options.output.read_bytes().splitlines(keepends=True)
    options.output.write_bytes(b"".join([lines[0], b"{broken}\n", *lines[2:]]))
    with pytest.raises(ConfigError, match=r"line 2 .* is damaged"):
        regenerate(options)
    options.output.with_suffix(".meta.json").write_text("[")
    with pytest.raises(ConfigError, match="is damaged"):
        regenerate(options)


def test_two_runs_do_not_write_one_file(
    options: DataRegenerateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    load = regenerate_module.load_model

    def during(*arguments: Any) -> Any:
        monkeypatch.setattr(regenerate_module, "load_model", load)
        with pytest.raises(ConfigError, match="in use by another run"):
            regenerate(options)
        refused.append(True)
        return load(*arguments)

    monkeypatch.setattr(regenerate_module, "load_model", during)
    regenerate(options)
    assert refused == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"output": None}, "--output is missing"),
        ({"threads": 0}, "--threads"),
    ],
)
def test_options_out_of_range(
    changes: dict[str, Any], message: str, options: DataRegenerateOptions
) -> None:
    with pytest.raises(ConfigError, match=message):
        regenerate(replace(options, **changes))


def test_nothing_of_the_checkpoints_own_sampling_is_left(target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01)
    writer = Writer(model, frozenset({0}), 0, Sampling(20, 5.0, 1.0, False))
    first, second = (writer.answer([[70, 71]], seed)[0].token_ids for seed in (0, 1))
    assert first != second
    greedy = Writer(model, frozenset({0}), 0, Sampling(20, 0.0, 1.0, False))
    before = greedy.answer([[70, 71]], 0)
    model.generation_config.update(repetition_penalty=50.0, no_repeat_ngram_size=1, num_beams=2)
    assert greedy.answer([[70, 71]], 0) == before
    assert len(set(before[0].token_ids)) < len(before[0].token_ids)


def test_from_answers_to_prepared_data(
    options: DataRegenerateOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_regenerate(options) == 0
    assert "13, 13 of them written now" in capsys.readouterr().out
    data = prepare(
        DataPrepareOptions(
            input=(str(options.output),),
            target=options.target,
            output=tmp_path / "data",
            draft_vocab=100,
            cache_dir=tmp_path / "cache",
        )
    ).data
    answers = {(*row["prompt_ids"], *row["completion_ids"]) for row in rows_of(options)}
    assert all(tuple(example.token_ids) in answers for example in data.examples)
    assert data.meta.skipped == {}
    assert data.meta.kinds == {"tokens": len(data.examples)}
    assert len(data.held_out) == 1
