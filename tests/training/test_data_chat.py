"""The loss mask covers what the assistant wrote, with the token that ends it, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_helpers import (
    CHATML,
    END,
    HEADER_IGNORED,
    INSTRUCT,
    TAGGED,
    TAGGED_TEXT_ONLY,
    THINKING,
    byte_tokenizer,
    chat_format,
    learnt,
)
from tokenizers import processors

from specdec import demo
from specdec.errors import ConfigError
from specdec_training.data.bad_rows import BadRow
from specdec_training.data.chat import ChatFormat, chat_template, template_options
from specdec_training.data.conversations import Row, parse_row
from specdec_training.data.encoding import Encoder
from specdec_training.data.turns import Turn

ONE = [Turn("user", "Hi"), Turn("assistant", "Hello, you.")]
THREE = [
    Turn("system", "Be brief."),
    *ONE,
    Turn("user", "And? é"),
    Turn("assistant", "Bye ü ok"),
]
TEMPLATES = {"prefixes": CHATML, "tags": TAGGED, "tags around the text": TAGGED_TEXT_ONLY}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_mask_is_the_assistants_turns_with_their_end(template: str) -> None:
    chat = chat_format(template)
    found = chat.encode(THREE)
    assert learnt(found, chat.tokenizer) == f"Hello, you.{END}|Bye ü ok{END}"
    whole = chat.render(THREE)
    assert found.token_ids == chat.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert found.prompt() == chat.tokens(chat.render(THREE[:2], add_generation_prompt=True))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_only_the_last_turn_on_request(template: str) -> None:
    chat = chat_format(template)
    assert learnt(chat.encode(THREE, last_only=True), chat.tokenizer) == f"Bye ü ok{END}"


def test_a_conversation_may_end_with_the_user() -> None:
    chat = chat_format(CHATML)
    assert learnt(chat.encode(THREE[:-1]), chat.tokenizer) == f"Hello, you.{END}"


def test_an_answer_without_markers_around_it() -> None:
    chat = chat_format(INSTRUCT)
    found = learnt(chat.encode([*ONE, *ONE]), chat.tokenizer)
    assert found == " Hello, you.<eos>| Hello, you.<eos>"


def test_the_next_turns_opening_token_may_end_an_answer() -> None:
    """Some templates write no end; the model then emits what opens the user's turn."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_end|>{{ m['content'] }}"
        "<|im_start|>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    chat = chat_format(template)
    found = learnt(chat.encode([*ONE, ("user", "x"), ("assistant", "y")]), chat.tokenizer)
    assert found == f"Hello, you.{END}|y"


def test_a_template_that_rewrites_earlier_turns() -> None:
    chat = chat_format(THINKING)
    with pytest.raises(BadRow) as refused:
        chat.encode(THREE)
    assert refused.value.reason == "template_rewrites_turns"
    encoder = Encoder(chat, 300, 500, turns="each")
    found = encoder.examples(Row("chat", messages=tuple(THREE)))
    assert [learnt(one, chat.tokenizer) for one in found] == [
        f"<think>\n\n</think>\n\nHello, you.{END}",
        f"<think>\n\n</think>\n\nBye ü ok{END}",
    ]
    last = Encoder(chat, 300, 500, turns="last").examples(Row("chat", messages=tuple(THREE)))
    assert last == found[1:]


def test_template_options_reach_the_template() -> None:
    """Without thinking, the empty block is part of the prompt, and is not learnt."""
    chat = chat_format(THINKING, **template_options(["enable_thinking=false"]))
    assert learnt(chat.encode(ONE), chat.tokenizer) == f"Hello, you.{END}"


def test_a_generation_prompt_that_is_no_beginning_of_an_answer() -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(BadRow) as refused:
        chat_format(template).encode(ONE)
    assert refused.value.reason == "other_generation_prompt"


@pytest.mark.parametrize("template", [CHATML, TAGGED, INSTRUCT], ids=["markers", "tags", "bos"])
def test_the_assistant_may_speak_first(template: str) -> None:
    """Then neither the header nor the token that opens every text is learnt."""
    chat = chat_format(template)
    found = chat.encode([("assistant", "Welcome."), ("user", "q"), ("assistant", "Yes?")])
    ends = ("<eos>", " Yes?<eos>") if template == INSTRUCT else (END, f"Yes?{END}")
    assert learnt(found, chat.tokenizer) == f"Welcome.{ends[0]}|{ends[1]}"


def test_a_header_that_no_generation_prompt_holds_is_not_learnt() -> None:
    with pytest.raises(BadRow) as refused:
        chat_format(HEADER_IGNORED).encode(ONE)
    assert refused.value.reason == "no_generation_prompt"


def test_the_template_refuses() -> None:
    with pytest.raises(BadRow) as refused:
        chat_format(INSTRUCT).encode(THREE)
    assert refused.value.reason == "template_refuses"
    assert "only user and assistant" in refused.value.detail
    for broken in ("{% for %}", "{{ messages[9].content }}", "{{ 1 / 0 }}"):
        with pytest.raises(BadRow, match="chat template raises"):
            chat_format(broken).encode(ONE)


def test_text_that_spells_a_special_token() -> None:
    with pytest.raises(BadRow) as refused:
        chat_format(CHATML).encode([("user", f"x{END}y"), ("assistant", "z")])
    assert refused.value.reason == "special_token_in_text"


def test_a_tokenizer_without_offsets() -> None:
    class Slow:
        is_fast = False

        def __init__(self) -> None:
            self._fast = byte_tokenizer(CHATML)

        def __getattr__(self, name: str) -> object:
            return getattr(self._fast, name)

        def __call__(self, text: str, **how: object) -> object:
            assert "return_offsets_mapping" not in how
            return self._fast(text, **how)

    fast = chat_format(CHATML)
    slow = ChatFormat(Slow(), CHATML, {}, fast.stop_ids)
    assert slow.encode(THREE) == fast.encode(THREE)
    assert slow.encode_pair("ab", "cd") == fast.encode_pair("ab", "cd")


def test_merged_tokens_across_the_border_belong_to_the_answer() -> None:
    """The prompt ends with a space that the tokenizer joins with the answer's first word."""
    tokenizer = demo.load_tokenizer()
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = ChatFormat(tokenizer, template, {}, frozenset({tokenizer.eos_token_id}))
    found = learnt(chat.encode([("user", "x"), ("assistant", "return self")]), tokenizer)
    assert found == " return self\n"


@pytest.mark.parametrize("template", [CHATML, INSTRUCT], ids=["markers", "spaces"])
def test_offsets_that_leave_out_spaces(template: str) -> None:
    """Some tokenizers report a token of nothing but spaces as empty."""
    chat = chat_format(template)
    backend = chat.tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [("user", " Hi \n"), ("assistant", "  a b \n c  "), *ONE[:1], ("assistant", "\n x ")]
    lead, end = (" ", "<eos>") if template == INSTRUCT else ("", END)
    expected = f"{lead}  a b \n c  {end}|{lead}\n x {end}"
    assert learnt(chat.encode(turns), chat.tokenizer) == expected


def test_truncation_in_the_middle_of_a_turn() -> None:
    chat = chat_format(CHATML)
    whole = chat.encode(THREE)
    first = whole.loss_mask.index(True)
    row = Row("chat", messages=tuple(THREE))
    (cut,) = Encoder(chat, 300, first + 5).examples(row)
    assert learnt(cut, chat.tokenizer) == "Hello"
    assert cut.token_ids == whole.token_ids[: first + 5]
    with pytest.raises(BadRow) as refused:
        Encoder(chat, 300, first).examples(row)
    assert refused.value.reason == "nothing_to_learn"


def test_text_and_pairs_and_tokens() -> None:
    chat = chat_format(None)
    encoder = Encoder(chat, 300, 500)

    def only(row: object) -> str:
        (found,) = encoder.examples(parse_row(row))
        return learnt(found, chat.tokenizer)

    assert only({"text": "abc"}) == "bc"  # nothing predicts the first token
    assert only({"prompt": "ab ", "completion": "cd"}) == "cd<eos>"
    assert only({"prompt": "", "completion": "cd"}) == "d<eos>"
    assert only({"prompt_ids": [65, 66], "completion_ids": [67, 68]}) == chat.tokenizer.decode(
        [67, 68]
    )
    for row, reason in (
        ({"prompt": "ab"}, "no_completion"),
        ({"prompt_ids": [1], "completion_ids": [300]}, "token_out_of_vocabulary"),
        ({"prompt_ids": [-1], "completion_ids": [3]}, "token_out_of_vocabulary"),
        ({"text": "a"}, "nothing_to_learn"),
    ):
        with pytest.raises(BadRow) as refused:
            only(row)
        assert refused.value.reason == reason


def test_a_long_text_goes_on_in_the_next_example() -> None:
    chat = chat_format(None)
    text = "".join(chr(97 + number % 26) for number in range(45))
    found = Encoder(chat, 300, 22).examples(Row("text", prompt=text))
    assert [chat.tokenizer.decode(one.token_ids) for one in found] == [text[:22], text[22:44]]
    assert [learnt(one, chat.tokenizer) for one in found] == [text[1:22], text[23:44]]
    (pair,) = Encoder(chat, 300, 22).examples(Row("pair", prompt="p", completion=text))
    assert chat.tokenizer.decode(pair.token_ids) == f"p{text[:21]}"


def test_conversations_need_a_template() -> None:
    with pytest.raises(ConfigError, match="--chat-template FILE"):
        chat_format(None).encode(ONE)


@pytest.mark.parametrize("pair", ["enable_thinking", "=x", "a b=1", "tokenize=true", "messages=1"])
def test_odd_template_options(pair: str) -> None:
    with pytest.raises(ConfigError, match="--template-option"):
        template_options([pair])


def test_template_values_are_json_where_they_can_be() -> None:
    assert template_options(["a=false", "b=3", "c=word", "d=[1]", "e=True"]) == {
        "a": False, "b": 3, "c": "word", "d": [1], "e": True,
    }  # fmt: skip


def test_the_template_comes_from_a_file_or_the_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path
    tokenizer = byte_tokenizer(CHATML)
    assert chat_template(tokenizer, None) == CHATML
    (folder / "own.jinja").write_text(TAGGED)
    assert chat_template(tokenizer, folder / "own.jinja") == TAGGED
    (folder / "empty").write_text(" ")
    (folder / "binary").write_bytes(b"\xff\xfe")
    for name in ("empty", "binary", "missing"):
        with pytest.raises(ConfigError, match="--chat-template"):
            chat_template(tokenizer, folder / name)


def test_the_hash_follows_template_and_options() -> None:
    hashes = {
        chat_format(CHATML).hash(),
        chat_format(TAGGED).hash(),
        chat_format(CHATML, enable_thinking=False).hash(),
    }
    assert len(hashes) == 3
    assert chat_format(None).hash() is None
