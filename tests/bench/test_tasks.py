"""Prompts: named benchmarks, files, folders, limits, and what is refused."""

import gzip
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specdec.demo import load_tokenizer
from specdec.errors import ConfigError
from specdec_bench.tasks import NAMES, SMOKE, Prompt, load_tasks

SHARED = Path("../shared/data")
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside the checkout")


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_smoke_set() -> None:
    prompts, tokenizer = load_tasks([SMOKE]), load_tokenizer()
    assert len(prompts) == 12
    assert Counter(p.category for p in prompts) == {"code": 6, "prose": 3, "structured": 3}
    lengths = [len(tokenizer(p.turns[0]).input_ids) for p in prompts]
    assert min(lengths) >= 30
    assert max(lengths) <= 120
    assert not any(p.chat for p in prompts)
    assert len({p.cluster for p in prompts}) == 12


@needs_data
def test_named_benchmarks() -> None:
    sizes = {name: len(load_tasks([name], SHARED)) for name in NAMES if name != SMOKE}
    assert sizes == {
        "spec_bench": 420, "mt_bench": 70, "vicuna_bench": 80, "humaneval": 124, "gsm8k": 1119,
        "mbpp": 974, "mbpp_sanitized": 427,
    }  # fmt: skip
    spec = load_tasks(["spec_bench"], SHARED / "prompts")
    assert Counter(p.category for p in spec) == dict.fromkeys(
        ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"), 70
    )
    assert {len(p.turns) for p in spec if p.category == "mt_bench"} == {2}
    assert all(p.chat for p in spec)
    humaneval = load_tasks(["humaneval"], SHARED)
    assert not any(p.chat for p in humaneval)
    assert humaneval[0].id == "humaneval/HumanEval/0"
    assert humaneval[0].turns[0].startswith("from typing import List")


@needs_data
def test_what_two_benchmarks_share_counts_once() -> None:
    with pytest.warns(UserWarning, match="70 prompts stand in two categories"):
        prompts = load_tasks(["spec_bench", "gsm8k"], SHARED)
    assert len(prompts) == 420 + 1119 - 70
    home: dict[str, str] = {}
    for prompt in prompts:  # the bootstrap refuses a cluster that lies in two strata
        assert home.setdefault(prompt.cluster, prompt.category) == prompt.category


@needs_data
def test_limits_are_balanced_nested_and_deterministic() -> None:
    specs = ["spec_bench", "humaneval"]
    some = load_tasks(specs, SHARED, 20, seed=3)
    assert set(Counter(p.category for p in some).values()) == {2, 3}
    assert some == load_tasks(specs, SHARED, 20, seed=3)
    assert some != load_tasks(specs, SHARED, 20, seed=4)
    more = load_tasks(specs, SHARED, 41, seed=3)
    assert set(some) < set(more)
    assert [p for p in load_tasks(specs, SHARED) if p in set(more)] == more  # the files' order


def test_small_categories_give_all_they_have(tmp_path: Path) -> None:
    rows = [{"prompt": f"a {n}", "category": "a"} for n in range(9)] + [
        {"prompt": "b", "category": "b"}
    ]
    kept = load_tasks([written(tmp_path / "x.jsonl", rows)], limit=6)
    assert Counter(p.category for p in kept) == {"a": 5, "b": 1}
    assert len(load_tasks([str(tmp_path / "x.jsonl")], limit=100)) == 10


def test_every_kind_of_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Once upon a time"},
        {"question": "Why?", "answer": "x"},
        {"id": "t", "turns": ["One", "Two"], "category": "chat"},
        {"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ]},
        {"prompt": "Talk to me", "chat": True},
    ]  # fmt: skip
    path = tmp_path / "own.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8-sig")
    found = load_tasks([str(path)])
    assert [p.turns for p in found] == [
        ("Once upon a time",), ("Why?",), ("One", "Two"), ("Be brief.\n\nHi", "Bye"),
        ("Talk to me",),
    ]  # fmt: skip
    assert [p.chat for p in found] == [False, True, True, True, True]
    assert [p.id for p in found] == ["own/1", "own/3", "own/t", "own/7", "own/9"]
    assert [p.category for p in found] == ["own", "own", "chat", "own", "own"]
    with gzip.open(tmp_path / "own2.jsonl.gz", "wt") as stream:
        stream.write(path.read_text(encoding="utf-8-sig"))
    assert [p.turns for p in load_tasks([str(tmp_path / "own2.jsonl.gz")])] == [
        p.turns for p in found
    ]


def test_a_folder_is_speed_bench(tmp_path: Path) -> None:
    (tmp_path / "throughput_1k").mkdir()
    written(tmp_path / "coding.jsonl", [{"question_id": "7", "turns": ["Sort a list"]}])
    written(
        tmp_path / "throughput_1k" / "test.jsonl",
        [{"question_id": "7", "turns": ["Long"], "category": "low_entropy"}, {"turns": ["Longer"]}],
    )
    (tmp_path / "README.md").write_text("no prompts")
    found = load_tasks([str(tmp_path)])
    name = tmp_path.name
    assert [(p.id, p.category) for p in found] == [
        (f"{name}/coding/7", "coding"),
        (f"{name}/throughput_1k/7", "low_entropy"),
        (f"{name}/throughput_1k/2", "throughput_1k"),
    ]
    placeholder = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
    written(tmp_path / "raw.jsonl", [{"turns": [placeholder]}])
    with pytest.raises(ConfigError, match="placeholder instead of a text"):
        load_tasks([str(tmp_path)])


def test_parquet_as_speed_bench_writes_it(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_pylist([{"question_id": "q", "category": "qa", "turns": ["A", "B"]}])
    parquet.write_table(table, tmp_path / "test.parquet")
    found = load_tasks([str(tmp_path)])
    assert [(p.turns, p.category) for p in found] == [(("A", "B"), "qa")]
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"test\.parquet"):
        load_tasks([str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('["prompt"]', "line 2 is no JSON object, but list"),
        ("{}", "field 'prompt, question, turns, messages': none of them.*has nothing"),
        ('{"text": "x"}', "none of them is there; the row has text"),
        ('{"prompt": 3}', "field 'prompt': must be text, got int 3"),
        ('{"prompt": " \\n"}', "field 'prompt': is empty"),
        ('{"prompt": "\\ud800"}', "field 'prompt': is no Unicode text"),
        ('{"prompt": "x", "turns": ["y"]}', "'prompt and turns': only one"),
        ('{"turns": []}', "field 'turns': must be a list of texts"),
        ('{"turns": "x"}', "field 'turns': must be a list of texts"),
        ('{"turns": ["x", null]}', r"field 'turns\[1\]': must be text, got NoneType"),
        ('{"prompt": "x", "category": 7}', "field 'category': must be text, got int 7"),
        ('{"prompt": "x", "id": [1]}', "field 'id': must be a text or a whole number"),
        ('{"messages": [{"role": "tool", "content": "x"}]}',
         r"'messages\[0\].role': unknown role str 'tool'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no message of a user"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "is no text part"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
         "a system message must come first"),
        ('{"messages": {"role": "user"}}', "must be a list of messages"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_by_file_line_and_field(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message) as raised:
        load_tasks([str(path)])
    assert f"{path}, line 2" in str(raised.value)


def test_bad_files(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "fine"}\n' * 3000 + json.dumps({"prompt": "x"}).encode())
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ConfigError, match=r"cut\.jsonl\.gz: it is cut off or damaged after line \d+"
    ):
        load_tasks([str(cut)])
    broken = bytearray(whole)
    broken[-5] ^= 0xFF  # of the checksum
    cut.write_bytes(bytes(broken))
    with pytest.raises(ConfigError, match="cut off or damaged"):
        load_tasks([str(cut)])
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_tasks([str(latin)])
    with pytest.raises(ConfigError, match="holds no prompt"):
        load_tasks([written(tmp_path / "empty.jsonl", [])])
    twice = written(tmp_path / "twice.jsonl", [{"id": 1, "prompt": "x"}, {"id": 1, "prompt": "y"}])
    with pytest.raises(ConfigError, match="two prompts are called 'twice/1'"):
        load_tasks([twice])


def test_bad_requests(tmp_path: Path) -> None:
    for specs, data, message in [
        ([], None, "no task"),
        (["humaneval"], None, "say with --data"),
        (["humaneval"], tmp_path, r"no humaneval\.jsonl or"),
        (["humanevil"], None, "is none of smoke, spec_bench"),
        ([SMOKE, SMOKE], None, "named twice"),
        ([str(tmp_path)], None, r"no \.jsonl .* in the folder"),
        ([__file__], None, r"is no \.jsonl"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_tasks(specs, data)
    for limit in (0, -1):
        with pytest.raises(ConfigError, match="at least 1"):
            load_tasks([SMOKE], limit=limit)


def test_equal_prompts_form_a_cluster_within_their_category(tmp_path: Path) -> None:
    rows = [
        {"turns": ["Same", "then this"], "category": "a"},
        {"turns": ["Same ", "then that"], "category": "a"},
        {"turns": ["Same", "other"], "category": "b"},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_tasks([written(tmp_path / "x.jsonl", rows)])
    assert isinstance(found[0], Prompt)
    assert found[0].cluster == found[1].cluster != found[2].cluster
