"""Masks are made from characters, so that odd tokens at an answer's borders are on their side."""

from __future__ import annotations

import random
from typing import Any

import pytest
from data_helpers import (
    CHATML,
    END,
    EOS,
    TAGGED,
    TAGGED_TEXT_ONLY,
    byte_tokenizer,
    chat_format,
    learnt,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from specdec_training.data.answer_spans import Conversation, tagged_spans
from specdec_training.data.bad_rows import BadRow
from specdec_training.data.chat import ChatFormat
from specdec_training.data.turns import Turn

WORDS = ["[UNK]", "user", "hi", "there", "yes", "no", "bot", ":", "ok", "!"]
MARKED = "{% generation %}CONTENT{% endgeneration %}"
LINES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}bot : " + MARKED + "{% else %}"
    "{{ '\n' }}user : {{ m.content + '\n' }}{% endif %}{% endfor %}"
)
TURNS = [("user", "hi"), ("assistant", "yes"), ("user", "there there"), ("assistant", "no")]


def words(template: str, **parts: Any) -> ChatFormat:
    """A token a word; no token holds white space."""
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, "[UNK]"))
    raw.pre_tokenizer = parts.get("pre_tokenizer", pre_tokenizers.Whitespace())
    return ChatFormat(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]"), template)


def fallback(template: str) -> ChatFormat:
    """Characters, and where there is none a token for each of its bytes, as Llama 2 has them."""
    known = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz:#!"]
    vocab = {name: at for at, name in enumerate([*known, *(f"<0x{b:02X}>" for b in range(256))])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return ChatFormat(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"), template)


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content }}",
        "{{ m.content + '\n' }}",
        "{{ '\n' + m.content }}",
        "{{ ' \n ' + m.content + '\n\n ' }}",
    ],
)
def test_spans_that_begin_or_end_with_what_no_token_holds(content: str) -> None:
    form = words(LINES.replace("CONTENT", content))
    found = form.encode(TURNS)
    assert learnt(found, form.tokenizer) == "yes|no"
    assert learnt(form.encode(TURNS, last_only=True), form.tokenizer) == "no"
    assert learnt(form.encode(TURNS[:3]), form.tokenizer) == "yes"


def test_an_answer_of_the_first_token() -> None:
    form = words(LINES.replace("bot : ", "").replace("CONTENT", "{{ m.content }}"))
    turns = [("assistant", "yes"), *TURNS[2:], ("user", "ok"), ("assistant", "hi there")]
    assert learnt(form.encode(turns), form.tokenizer) == "yes|no|hi there"


@pytest.mark.parametrize("content", [" ", "\n\n"])
def test_an_answer_of_which_no_token_is_left(content: str) -> None:
    """The tags hold only white space; what stands behind is not the answer."""
    form = words(LINES.replace("CONTENT", "{{ m.content if loop.last else '" + content + "' }}"))
    assert learnt(form.encode(TURNS), form.tokenizer) == "no"


def test_a_token_never_reaches_from_an_answer_into_what_follows() -> None:
    """The next turn begins without a space, and its first word would be one with the last."""
    template = LINES.replace("{{ '\n' }}user", "user").replace("CONTENT", "{{ '\n' + m.content }}")
    form = words(template)
    found = form.encode(TURNS)
    assert learnt(found, form.tokenizer) == "yes|no"
    assert form.tokenizer.decode(found.token_ids).split().count("user") == 2
    apart = form.encode(TURNS, last_only=True)  # nothing is torn that is not learnt
    assert form.tokenizer.decode(apart.token_ids).count("[UNK]") == 1


EMOJI = ["x 😀", "é", "日本 日", "👩‍👩‍👧", "a😀b😀"]


@pytest.mark.parametrize("answer", EMOJI)
@pytest.mark.parametrize(
    "template", [CHATML, TAGGED, TAGGED_TEXT_ONLY], ids=["prefix", "tags", "text"]
)
def test_every_byte_of_the_last_character_is_learnt(template: str, answer: str) -> None:
    form = chat_format(template)
    turns = [("user", "q é"), ("assistant", answer), ("user", "😀"), ("assistant", answer)]
    assert learnt(form.encode(turns), form.tokenizer) == f"{answer}{END}|{answer}{END}"
    count = len(answer.encode()) + 1
    assert sum(form.encode(turns).loss_mask) == 2 * count
    pair = form.encode_pair("p 😀", answer)
    assert learnt(pair, form.tokenizer) == answer + EOS
    assert sum(pair.loss_mask) == count


@pytest.mark.parametrize("tagged", [True, False], ids=["tags", "prefixes"])
@pytest.mark.parametrize("answer", ["a 😀", "é", "a日b日"])
def test_bytes_of_a_tokenizer_that_falls_back_to_them(tagged: bool, answer: str) -> None:
    """No end token says where the answer is over, so its last byte is the last that is learnt."""
    content = MARKED.replace("CONTENT", "{{ m.content }}") if tagged else "{{ m.content }}"
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + content + "{% else %}"
        "#{{ m.content }}:{% endif %}{% endfor %}"
    )
    form = fallback(template)
    turns = [("user", "q日"), ("assistant", answer), ("user", "😀"), ("assistant", answer)]
    found = form.encode(turns)
    expected = form.tokens(form.render(turns))
    assert found.token_ids == expected
    both = [t for t, m in zip(found.token_ids, found.loss_mask, strict=True) if m]
    one = form.tokens("#" + answer)[2:]
    assert both == one + one


def test_spaces_that_offsets_leave_out() -> None:
    """A space at the end of an answer is the answer's, and of a prompt the prompt's."""
    form = chat_format(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + MARKED.replace("CONTENT", "{{ m.content }}")
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    backend = form.tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [("user", "q "), ("assistant", "a  "), ("user", "r  "), ("assistant", " b ")]
    assert learnt(form.encode(turns), form.tokenizer) == "a  | b "
    assert learnt(form.encode_pair("p ", "a  "), form.tokenizer) == f"a  {EOS}"


def test_several_spans_of_a_turn() -> None:
    template = TAGGED_TEXT_ONLY.replace(
        "{% generation %}{{ m['content'] }}{% endgeneration %}",
        "{% generation %}{{ m.content }}{% endgeneration %} [{% generation %}x{% endgeneration %}]",
    )
    form = chat_format(template)
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), Turn("assistant", "b", (), 0)]
    turns += [("user", "s"), ("assistant", "c")]
    assert learnt(form.encode(turns), form.tokenizer) == "a|x|c|x"
    assert learnt(form.encode(turns, last_only=True), form.tokenizer) == "c|x"


SAID = "{% generation %}{{ m.content }}{% endgeneration %}"
EITHER = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
TRICKS = {
    "a macro": "{% macro say(m) %}["
    + SAID
    + "]{% endmacro %}"
    + EITHER
    + "{{ say(m) }}{% endif %}{% endfor %}",
    "a block": EITHER.replace("{% if", "{% set said %}{% if", 1)
    + SAID
    + "{% endif %}{% endset %}{{ said }}.{% endfor %}",
    "lines": "  {%- for m in messages %}\n  {%- if m.role == 'user' %}\n    {{ m.content }}\n"
    "  {% else %}\n    {%- generation -%}\n      {{ m.content }}\n    {%- endgeneration %}\n"
    "    end\n  {% endif %}\n{%- endfor %}",
    "no loop": "{% set m = messages[1] %}"
    + SAID
    + "\n{{ messages[2].content }}{% set m = messages[3] %}"
    + SAID,
}


@pytest.mark.parametrize("template", TRICKS.values(), ids=TRICKS)
def test_tags_are_followed_wherever_their_text_ends_up(template: str) -> None:
    form = chat_format(template)
    turns = [("user", "question"), ("assistant", "one"), ("user", "then"), ("assistant", "two")]
    assert learnt(form.encode(turns), form.tokenizer) == "one|two"
    assert form.tokenizer.decode(form.encode(turns).token_ids) == form.render(turns)


def test_tags_that_cannot_be_followed() -> None:
    """A filter counts what is in the tags, or the text has the marks by which they are followed."""
    template = (
        "{% for m in messages %}{% set said %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endset %}{{ said | length }}{{ said }}{% endfor %}"
    )
    with pytest.raises(BadRow) as refused:
        chat_format(template).encode(TURNS)
    assert refused.value.reason == "lost_tags"
    marks = [("user", "q"), ("assistant", "a \ufdd0 b")]
    with pytest.raises(BadRow) as refused:
        chat_format(TAGGED).encode(marks)
    assert refused.value.reason == "lost_tags"


def test_tags_and_prefixes_say_the_same() -> None:
    """On texts of every kind of character, whichever turns are learnt."""
    drawn = random.Random(0)
    without = TAGGED.replace("{% generation", "{% if true").replace("endgeneration", "endif")
    plain, tagged = chat_format(without), chat_format(TAGGED)
    alphabet = [*"ab \n\t", "é", "日", "😀", "\u200d", "\u0301", "\xa0"]
    for _ in range(60):
        turns = []
        for number in range(drawn.randint(2, 7)):
            text = "".join(drawn.choices(alphabet, k=drawn.randint(1, 6))) + "."
            turns.append(Turn(("user", "assistant")[number % 2], text, (), drawn.randint(0, 1)))
        for last_only in (False, True):
            assert plain.encode(turns, last_only) == tagged.encode(turns, last_only)


def test_spans_are_those_of_the_turns_that_are_asked_for() -> None:
    turns = [Turn(*turn) for turn in TURNS]
    conversation = Conversation(byte_tokenizer(), TAGGED, {}, turns)
    whole, every = tagged_spans(conversation, [1, 3])
    assert [whole[start:end] for start, end in every] == [f"yes{END}", f"no{END}"]
    assert tagged_spans(conversation, [3]) == (whole, every[1:])
    assert tagged_spans(conversation, []) == (whole, [])
