"""Fields beside the text: rendered, obeyed, known to mean nothing, or the row is bad by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_helpers import (
    CHATML,
    END,
    TAGGED,
    WHOLE,
    WHOLE_TAGGED,
    chat_format,
    learnt,
    write_rows,
    write_target,
)

from specdec_training.data.bad_rows import BadRow
from specdec_training.data.conversations import Row, parse_row
from specdec_training.data.encoding import Encoder
from specdec_training.data.options import DataPrepareOptions, DataRegenerateOptions, ReadOptions
from specdec_training.data.prepare import prepare
from specdec_training.data.regenerate import regenerate
from specdec_training.data.row_files import Inputs
from specdec_training.data.turns import Turn


def user(text: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **fields}


def answer(text: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def chat(*turns: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(turns), **fields}


def call(name: str = "weather", arguments: Any = '{"city": "Oslo"}', **more: Any) -> dict[str, Any]:
    return {
        "id": "c1",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    } | more


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
AGENT = chat(
    user("Weather in Oslo?"),
    answer(None, tool_calls=[call()]),
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "sun"},
    answer("It is sunny."),
    tools=[TOOL],
)
DEEP: Any = "x"
for _ in range(70):
    DEEP = [DEEP]

REFUSED: list[tuple[Any, str]] = [
    (chat(user("q"), answer("a"), documents=[{"text": "d"}]), "unknown_field"),
    (chat(user("q"), answer("a"), images=["a.png"]), "unknown_field"),
    (chat(user("q"), answer("a"), rejected=[answer("b")]), "unknown_field"),
    (chat(user("q"), answer("a"), enable_thinking=False), "unknown_field"),
    (chat(user("q"), answer("a"), completion="b"), "unknown_field"),
    (chat(user("q"), answer("a", audio={"id": "x"})), "unknown_field"),
    (chat(user("q"), answer("a", refusal="no")), "unknown_field"),
    (chat(user("q", images=["a.png"]), answer("a")), "unknown_field"),
    (chat(user("q"), answer("a", train=False)), "unknown_field"),
    ({"prompt": "q", "completion": "a", "label": False}, "unknown_field"),
    ({"question": "q", "answer": "a", "context": "c"}, "unknown_field"),
    ({"text": "t", "input": "i"}, "unknown_field"),
    ({"conversations": [user("q")], "status": "error", "error": "timeout"}, "unknown_field"),
    ({"conversations": [{"from": "human", "value": "q", "role": "user"}]}, "unknown_field"),
    (chat(user([{"type": "text", "text": "q", "citations": [1]}]), answer("a")), "unknown_field"),
    (chat(user("q"), answer("", tool_calls=[{"name": "f", "parameters": {}, "x": 1}])),
     "unknown_field"),
    (chat(user([{"type": "image_url", "image_url": "u"}]), answer("a")), "content_not_text"),
    (chat(user("q"), answer([{"type": "thinking", "thinking": "t"}])), "content_not_text"),
    (chat(user("q"), answer("a", weight=0.5)), "bad_weight"),
    (chat(user("q"), answer("a", weight="0")), "bad_weight"),
    (chat(user("q"), answer("a", weight=True)), "bad_weight"),
    (chat(user("q", weight=1), answer("a")), "bad_weight"),
    (chat(user("q"), answer("a"), weight=0), "bad_weight"),
    ({"text": "t", "weight": 0.2}, "bad_weight"),
    (chat({"role": "system", "content": "s"}, user("q"), answer("a"), system="t"), "two_systems"),
    (chat(user("q"), answer("a"), system="s", system_prompt="t"), "two_systems"),
    (chat(user("q"), answer("", tool_calls=[call(arguments="{nope")])), "bad_field"),
    (chat(user("q"), answer("", tool_calls=[call(arguments="[1]")])), "bad_field"),
    (chat(user("q"), answer("", tool_calls=[call(type="custom")])), "bad_field"),
    (chat(user("q"), answer("", tool_calls=["f(x)"])), "bad_field"),
    (chat(user("q"), answer("", function_call="f")), "bad_field"),
    (chat(user("q"), answer("a"), tools="[{"), "bad_field"),
    (chat(user("q"), answer("a"), tools={"name": "f"}), "bad_field"),
    (chat(user("q"), answer("a"), tools=[{"name": "f", "parameters": DEEP}]), "bad_field"),
    (chat(user("q"), answer("a"), tools=[{"name": "\ud800"}]), "not_utf8"),
    (chat(user("q"), answer("a", reasoning="x", thinking="y")), "bad_field"),
    (chat(user("q"), answer("a"), prompt="another question"), "two_formats"),
    ({"prompt": [user("q")], "completion": "a"}, "bad_turn"),
    ({"prompt": [], "completion": [answer("a")]}, "bad_turn"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_would_change_the_meaning_is_a_bad_row(row: Any, reason: str) -> None:
    with pytest.raises(BadRow) as refused:
        parse_row(row)
    assert refused.value.reason == reason


def test_the_bad_field_is_named() -> None:
    for row, name in ((REFUSED[0][0], "'documents' of the row"), (REFUSED[5][0], "'audio' of a")):
        with pytest.raises(BadRow) as refused:
            parse_row(row)
        assert name in refused.value.detail


SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1.0}]
QA = (Turn("user", "q"), Turn("assistant", "a"))
CONTEXT = Turn("assistant", "5", (), 0)
WEATHER = (("tool_calls", [call(arguments={"city": "Oslo"})]),)
KEPT: list[tuple[Any, tuple[Turn, ...]]] = [
    (chat(user("q"), answer("a"), prompt="q", prompt_id="f" * 64), QA),
    (chat(user("q "), answer("a"), prompt=" q"), (Turn("user", "q "), QA[1])),
    ({"id": "1", "conversations": [user("q"), answer("a", reasoning_content=None)],
      "status": "success"}, QA),
    ({"conversations": [SHAREGPT[0], answer("a")]}, QA),
    ({"messages": SHAREGPT, "source": "x", "__index_level_0__": 3}, QA),
    ({"conversations": SHAREGPT, "system": "s"}, (Turn("system", "s"), *QA)),
    (chat(user("q"), answer("a"), system="s\n"), (Turn("system", "s\n"), *QA)),
    (chat({"role": "system", "content": "s"}, *map(Turn.to_dict, QA), system="s"),
     (Turn("system", "s"), *QA)),
    (chat({"role": "system", "content": ""}, *map(Turn.to_dict, QA), system="s"),
     (Turn("system", "s"), *QA)),
    ({"question": "q", "answer": "a", "system_prompt": "s"}, (Turn("system", "s"), *QA)),
    ({"prompt": [user("q")], "completion": [answer("a")]}, QA),
    ({"prompt": [user("q"), answer("5"), user("q")], "completion": [answer("a")]},
     (QA[0], CONTEXT, *QA)),
    ({"prompt": [user("q")]}, QA[:1]),
    (chat(user("q"), answer("5", weight=0), user("q", weight=0), answer("a", weight=1)),
     (QA[0], CONTEXT, *QA)),
    (chat(user("q"), answer("a", tool_calls=[], refusal=None, annotations=[], thinking="")), QA),
    (chat(user([{"type": "text", "text": "q", "cache_control": {"type": "x"}}]), answer("a")), QA),
    (chat(user("q", name="bob"), answer("a")), (Turn("user", "q", (("name", "bob"),)), QA[1])),
    (chat(user("q"), answer(None, tool_calls=[call()])), (QA[0], Turn("assistant", "", WEATHER))),
    (chat(user("q"), {"role": "assistant", "tool_calls": json.dumps([call()])}),
     (QA[0], Turn("assistant", "", WEATHER))),
    (chat(user("q"), answer("a", function_call={"name": "f", "arguments": ""}),
          {"role": "function", "name": "f", "content": "1"}),
     (QA[0],
      Turn("assistant", "a", (("tool_calls", [
          {"type": "function", "function": {"name": "f", "arguments": {}}}]),)),
      Turn("tool", "1", (("name", "f"),)))),
    *((chat(user("q"), answer("a", **{name: "t"})),
       (QA[0], Turn("assistant", "a", (("reasoning_content", "t"),))))
      for name in ("reasoning_content", "reasoning", "thinking")),
]  # fmt: skip


@pytest.mark.parametrize(("value", "turns"), KEPT, ids=lambda value: str(value)[:60])
def test_every_format_gives_its_turns_and_survives_its_column(
    value: Any, turns: tuple[Turn, ...]
) -> None:
    row = parse_row(value)
    assert (row.kind, row.messages) == ("chat", turns)
    assert Row.from_json(row.to_json()) == row


def test_tools_are_kept_in_every_spelling() -> None:
    function = TOOL["function"]
    for fields in ({"tools": [TOOL]}, {"tools": json.dumps([TOOL])}, {"functions": [function]}):
        row = parse_row(chat(user("q"), answer("a"), **fields, parallel_tool_calls=False))
        assert row.tools == (TOOL,)
        assert Row.from_json(row.to_json()) == row


def test_a_field_makes_another_row() -> None:
    """Of another content, and where it is part of the question, of another question."""
    plain = parse_row(chat(user("q"), answer("a")))
    for value, asks_the_same in (
        (chat(user("q"), answer("a"), tools=[TOOL]), False),
        (chat(user("q"), answer("a"), system="s"), False),
        (chat(user("q", name="bob"), answer("a")), False),
        (chat(user("q"), answer("a", weight=0), user("q"), answer("b")), False),
        (chat(user("q"), answer("a", reasoning="t")), True),
    ):
        row = parse_row(value)
        assert row.key() != plain.key()
        assert (row.belongs_to() == plain.belongs_to()) == asks_the_same


def test_fields_may_be_ignored_by_name() -> None:
    value = chat(user("q", name="bob"), answer("a", audio={}, mood="x"), documents=[1], text="t")
    with pytest.raises(BadRow):
        parse_row(value)
    row = parse_row(value, ("name", "mood", "documents", "text"))
    assert row == parse_row(chat(user("q"), answer("a")))
    tools = chat(user("q"), answer("a"), tools=[{"name": "f"}])
    assert parse_row(tools, ("name",)).tools == ({"name": "f"},)  # only of rows and turns


def encoded(row: Any, template: str, turns: str = "all", **options: Any) -> list[str]:
    form = chat_format(template, **options)
    found = Encoder(form, 300, 5000, turns).examples(parse_row(row))
    return [learnt(one, form.tokenizer) for one in found]


CALLED = '<call>weather {"city": "Oslo"}</call>'


@pytest.mark.parametrize("template", [WHOLE, WHOLE_TAGGED], ids=["prefixes", "tags"])
def test_fields_are_learnt_where_the_template_writes_them(template: str) -> None:
    assert encoded(AGENT, template) == [f"{CALLED}{END}|It is sunny.{END}"]
    said = answer("Let me see.", tool_calls=[call(), call("time", {})])
    second = "<call>time {}</call>"
    assert encoded(chat(user("q"), said), template) == [f"Let me see.{CALLED}{second}{END}"]
    thought = chat(user("q"), answer("a", reasoning="hm"))
    assert encoded(thought, template) == [f"<think>hm</think>a{END}"]
    form = chat_format(template)
    (example,) = Encoder(form, 300, 5000).examples(parse_row(AGENT))
    assert '"parameters"' in form.tokenizer.decode(example.prompt())


def test_arguments_are_text_for_templates_that_join_them() -> None:
    """As DeepSeek's; a template that takes objects is never given text."""
    joined = WHOLE.replace(
        " {{ call.function.arguments | tojson }}", "{{ ' ' + call.function.arguments }}"
    )
    assert encoded(AGENT, joined) == encoded(AGENT, WHOLE)
    bare = joined.replace("call.function.", "call.")
    assert encoded(chat(user("q"), answer("", tool_calls=[{"name": "f"}])), bare) == [
        f"<call>f {{}}</call>{END}"
    ]
    with pytest.raises(BadRow, match="no calls here"):
        encoded(AGENT, "{{ raise_exception('no calls here') }}")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (chat(user("q"), answer("a"), tools=[TOOL]), "tools"),
        (chat(user("q"), answer("a", tool_calls=[call()])), "tool_calls of turn 2 of 2"),
        (chat(user("q"), answer("a", thinking="t")), "reasoning_content of turn 2 of 2"),
        (chat(user("q", name="bob"), answer("a")), "name of turn 1 of 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("template", [CHATML, TAGGED], ids=["prefixes", "tags"])
def test_fields_that_the_template_leaves_out_are_bad_by_name(
    row: Any, named: str, template: str
) -> None:
    with pytest.raises(BadRow) as refused:
        encoded(row, template)
    assert (refused.value.reason, refused.value.detail) == ("field_not_rendered", named)


def test_what_only_links_a_result_to_its_call_may_be_left_out() -> None:
    result = {"role": "tool", "content": "sun", "tool_call_id": "c1", "name": "weather"}
    assert encoded(chat(user("q"), result, answer("a")), CHATML) == [f"a{END}"]


@pytest.mark.parametrize("template", [WHOLE, WHOLE_TAGGED], ids=["prefixes", "tags"])
def test_thoughts_that_are_dropped_from_earlier_turns(template: str) -> None:
    """They cannot be learnt in one piece, and are learnt turn by turn."""
    row = chat(user("q"), answer("a", reasoning="one"), user("r"), answer("b", reasoning="two"))
    with pytest.raises(BadRow) as refused:
        encoded(row, template)
    assert refused.value.reason == "template_rewrites_turns"
    both = [f"<think>one</think>a{END}", f"<think>two</think>b{END}"]
    assert encoded(row, template, "each") == both
    assert encoded(row, template, "last") == both[1:]
    assert encoded(row, template, keep=True) == ["|".join(both)]


@pytest.mark.parametrize(
    "template", [CHATML, TAGGED, WHOLE_TAGGED], ids=["prefixes", "tags", "all"]
)
def test_an_answer_of_weight_zero_is_context(template: str) -> None:
    row = chat(
        user("2+2?"), answer("5", weight=0), user("No."), answer("4"), user("3?"), answer("3")
    )
    assert encoded(row, template) == [f"4{END}|3{END}"]
    assert encoded(row, template, "each") == [f"4{END}", f"3{END}"]
    row["messages"][-1]["weight"] = 0
    assert encoded(row, template) == encoded(row, template, "last") == [f"4{END}"]
    row["messages"][3]["weight"] = 0
    with pytest.raises(BadRow) as refused:
        encoded(row, template)
    assert refused.value.reason == "no_assistant_turn"
    assert "assistant (weight 0)" in refused.value.detail


def test_special_tokens_are_found_in_fields_too() -> None:
    for row in (
        chat(user("q"), answer("a"), tools=[{"name": f"f{END}"}]),
        chat(user("q"), answer("", tool_calls=[call(arguments={"x": [f"y{END}"]})])),
        chat(user("q"), answer("a", thinking=f"t{END}")),
    ):
        with pytest.raises(BadRow) as refused:
            encoded(row, WHOLE)
        assert refused.value.reason == "special_token_in_text"


def test_a_system_prompt_beside_a_plain_prompt_needs_a_conversation() -> None:
    for value in (
        {"prompt": "q", "completion": "a", "system": "Be brief."},
        {"prompt": "q", "completion": "a", "tools": [TOOL]},
    ):
        row = parse_row(value)
        assert Row.from_json(row.to_json()) == row
        with pytest.raises(BadRow) as refused:
            Encoder(chat_format(WHOLE), 300, 5000).examples(row)
        assert refused.value.reason == "needs_conversation"
        form = chat_format(WHOLE)
        (example,) = Encoder(form, 300, 5000).examples(row.as_chat())
        assert learnt(example, form.tokenizer) == f"a{END}"
        said = form.tokenizer.decode(example.prompt())
        assert "Be brief." in said or '"parameters"' in said


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"), WHOLE)


SHORT = {"name": "f"}
ASKING = [
    chat(
        user("q1"), answer("", tool_calls=[call("f", {"x": 1})]), {"role": "tool", "content": "r1"},
        answer("dropped", reasoning="dropped"), tools=[SHORT],
    ),
    chat(user("q2"), answer("kept", weight=0), user("q3"), answer("dropped")),
    {"prompt": [user("q4"), answer("shot"), user("q5")], "completion": [answer("dropped")]},
    {"prompt": [user("q6", name="bob")], "id": 7},
    chat(user("q7"), answer("a"), documents=[1]),
    {"prompt": "q8", "system": "pirate"},
]  # fmt: skip


def test_regenerated_answers_see_every_field(tmp_path: Path, target: Path) -> None:
    options = DataRegenerateOptions(
        input=(str(write_rows(tmp_path / "rows.jsonl", ASKING)),),
        target=str(target), output=tmp_path / "answers.jsonl", max_new_tokens=4,
        temperature=1.0, threads=1, max_bad_fraction=0.5,
    )  # fmt: skip
    done = regenerate(options)
    assert done.tally.counts == {"unknown_field": 1, "needs_conversation": 1}
    lines = options.output.read_text().splitlines() if options.output else []
    prompts = sorted(json.loads(line)["decoded_prompt"] for line in lines)
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    opened = "<|im_start|>assistant\n"
    agent = turn("system", '[{"name": "f"}]') + turn("user", "q1")
    called = turn("assistant", '<call>f {"x": 1}</call>') + turn("tool", "r1")
    assert prompts == sorted([
        agent + opened,
        agent + called + opened,
        turn("user", "q2") + turn("assistant", "kept") + turn("user", "q3") + opened,
        turn("user", "q4") + turn("assistant", "shot") + turn("user", "q5") + opened,
        turn("user bob", "q6") + opened,
    ])  # fmt: skip
    assert regenerate(options).written == 0
    as_chat = replace(options, output=tmp_path / "chat.jsonl", as_chat=True)
    assert "unknown_field" in regenerate(as_chat).tally.counts
    assert turn("system", "pirate").replace("\n", "\\n") in (tmp_path / "chat.jsonl").read_text()


def test_a_replaced_answers_thoughts_need_no_template_that_knows_them(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", CHATML)
    rows = [
        chat(user("q"), answer("a", reasoning="t")),
        chat(user("q"), answer("a", reasoning="t", weight=0), user("r")),
        chat(user("q"), answer("a"), tools=[SHORT]),
    ]
    options = DataRegenerateOptions(
        input=(str(write_rows(tmp_path / "rows.jsonl", rows)),), target=str(target),
        output=tmp_path / "answers.jsonl", max_new_tokens=4, threads=1, max_bad_fraction=1.0,
    )  # fmt: skip
    done = regenerate(options)
    assert (done.rows, done.tally.counts) == (1, {"field_not_rendered": 2})


def test_prepared_with_fields_from_columns(tmp_path: Path, target: Path) -> None:
    """Columnar files fill in null fields at every depth; they are not there."""
    rows = [
        AGENT | {"id": 1, "documents": None},
        chat(user("q"), answer("a"), tools=[{"type": "function", "function": {"name": "t"}}], id=2),
        chat(user("r"), answer("b", tool_calls=[call("g", {"other": "x"})]), id=3),
    ]
    for row in rows:
        for turn in row["messages"]:
            for one in turn.get("tool_calls") or []:
                if isinstance(one["function"]["arguments"], str):
                    one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    data = prepare(
        DataPrepareOptions(
            input=(str(path),), target=str(target), output=tmp_path / "out",
            cache_dir=tmp_path / "cache", held_out=0,
        )
    ).data  # fmt: skip
    form = chat_format(WHOLE)
    said = [form.tokenizer.decode(example.token_ids) for example in data.examples]
    assert len(said) == 3
    assert CALLED in said[0]
    assert '"parameters"' not in said[1]
    assert '<call>g {"other": "x"}</call>' in said[2]
    assert not any("null" in text for text in said)


def test_ignored_fields_are_part_of_what_data_are(tmp_path: Path, target: Path) -> None:
    """The cache of rows that were read otherwise is not used."""
    path = write_rows(tmp_path / "rows.jsonl", [chat(user("q"), answer("a"), tools=[SHORT])])
    options = DataPrepareOptions(
        input=(str(path),), target=str(target), output=tmp_path / "with",
        cache_dir=tmp_path / "cache", held_out=0,
    )  # fmt: skip
    without = replace(options, output=tmp_path / "without", ignore_field=("tools",))
    assert prepare(options).data.meta.tokens > prepare(without).data.meta.tokens


def texts(*names: Path, **options: Any) -> list[str]:
    read = Inputs(ReadOptions(input=tuple(map(str, names)), **options)).rows()
    return [one.row.prompt if one.row else str(one.problem and one.problem.reason) for one in read]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n\xc3\xa9\n")
    assert texts(tmp_path / "a.txt") == ["one\ntwo\n\né\n"]
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.txt").write_text(" \n")
    assert texts(tmp_path) == ["one\ntwo\n\né\n", "three", "not_utf8", "empty_text"]
    write_rows(tmp_path / "rows.jsonl", [{"text": "row"}])
    assert texts(tmp_path) == ["row"]  # a text beside rows is about them
