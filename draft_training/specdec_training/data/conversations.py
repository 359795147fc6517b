"""What one row of training data says, whichever of the usual formats it came in.

Knows formats and nothing about tokenizers, files or models. The format is found row by row, by the
keys that are there, so that one input may mix them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from specdec_training.data.bad_rows import BadRow, shown
from specdec_training.data.turns import Turn, check_unknown, objects, parse_turn, present, text_of

Kind = Literal["chat", "text", "pair", "prompt", "tokens"]

_TURNS = ("messages", "conversations")
# Keys that make a format. A key that is null counts as absent, because columnar files give every
# row the keys of all rows.
_FORMATS: tuple[tuple[str, ...], ...] = (
    ("conversations",),
    ("messages",),
    ("question", "answer"),
    ("text",),
    ("prompt", "completion"),
    ("prompt_ids", "completion_ids"),
)
_FORMAT_KEYS = tuple(key for keys in _FORMATS for key in keys)
_LARGEST_ID = 2**31 - 1
_MOST_TURNS = 400  # a conversation is rendered once for each of its turns


@dataclass(frozen=True)
class Row:
    """One row in the form that everything after reading works with.

    Attributes:
        kind: `chat` has messages; `text` a text; `pair` a prompt and a completion; `prompt` a
            prompt alone; `tokens` the exact ids of a prompt and a completion.
        messages: The turns of `chat`; elsewhere what a conversation would begin with.
        prompt: Text, of `pair`, `prompt` and `text` (there it is all of it).
        completion: Text to be learnt, where `kind` is `pair`.
        prompt_ids: Context, where `kind` is `tokens`.
        completion_ids: What is to be learnt, where `kind` is `tokens`.
        name: The row's own id, or empty.
        group: Rows with the same group belong together, and are held out together; or empty.
        tools: What the assistant may call, as JSON objects for the chat template.
    """

    kind: Kind
    messages: tuple[Turn, ...] = ()
    prompt: str = ""
    completion: str = ""
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    name: str = ""
    group: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    def key(self) -> str:
        """64 hexadecimal digits that are equal for rows of equal content, whatever their name."""
        texts = [self.prompt, self.completion]
        turns = [_content(turn) for turn in self.messages]
        content = [self.kind, turns, texts, self.prompt_ids, self.completion_ids, *self.tools]
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()

    def belongs_to(self) -> str:
        """Equal for rows that ask the same: several answers to a prompt stay on one side."""
        if self.group:
            return self.group
        asked: list[Any] = [self.prompt, self.prompt_ids, *self.tools]
        for turn in self.messages:
            if turn.is_answer:
                break
            asked.append(_content(turn))
        return hashlib.sha256(json.dumps(asked).encode("ascii")).hexdigest()

    def as_chat(self) -> Row:
        """A prompt, with its completion if it has one, as the turns of a conversation."""
        if self.kind not in ("prompt", "pair"):
            return self
        turns = (Turn("user", self.prompt), Turn("assistant", self.completion))
        own = turns if self.kind == "pair" else turns[:1]
        chat = Row("chat", messages=(*self.messages, *own), tools=self.tools)
        return replace(chat, name=self.name, group=self.group)

    def check_plain(self) -> None:
        """Raises `BadRow` where something needs the chat template, and this is no conversation."""
        needs = [turn.role for turn in self.messages] + ["tools"] * bool(self.tools)
        if self.kind != "chat" and needs:
            raise BadRow("needs_conversation", " and ".join(needs))

    def speakers(self) -> str:
        """Who speaks first, for messages."""
        marks = {0: " (weight 0)", 1: ""}
        return ", ".join(f"{turn.role}{marks[turn.weight]}" for turn in self.messages[:6])

    def to_json(self) -> str:
        """One string, so that rows of all kinds fit one column."""
        facts = self.__dict__ | {"messages": [turn.to_dict() for turn in self.messages]}
        return json.dumps(facts, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Row:
        """Reads what `to_json` wrote."""
        facts = json.loads(text)
        facts["messages"] = tuple(map(Turn.from_dict, facts["messages"]))
        for name in ("prompt_ids", "completion_ids", "tools"):
            facts[name] = tuple(facts[name])
        return cls(**facts)


def parse_row(value: Any, ignored: Collection[str] = ()) -> Row:
    """The row in a JSON value.

    Args:
        ignored: Fields of rows and turns to read as if they were not there.

    Raises:
        BadRow: It is none, or has a field that cannot be kept, with the reason.
    """
    if not isinstance(value, dict):
        raise BadRow("not_an_object", f"{type(value).__name__} {shown(value)}")
    rest = present(_without(value, ignored), _FORMAT_KEYS)
    keys = _format(rest)
    name = shown(rest["id"]) if isinstance(rest.get("id"), str | int) else ""
    group = rest["group"] if isinstance(rest.get("group"), str) else ""
    row = _PARSERS[keys](*(rest.pop(key) for key in keys))
    if row.kind == "chat" and "prompt" in rest:
        _check_repeated(rest.pop("prompt"), row)
    return replace(_with_fields(row, rest), name=name, group=group)


def _without(value: Mapping[str, Any], ignored: Collection[str]) -> Mapping[str, Any]:
    """The row without those fields, of which its turns may have some, too."""
    if not ignored:
        return value
    kept = {name: content for name, content in value.items() if name not in ignored}
    for name in (*_TURNS, "prompt", "completion"):
        if isinstance(kept.get(name), list):
            kept[name] = [
                {key: inner for key, inner in turn.items() if key not in ignored}
                if isinstance(turn, dict)
                else turn
                for turn in kept[name]
            ]
    return kept


def _format(there: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys by which the row is read."""
    found = [keys for keys in _FORMATS if there.keys() >= set(keys)]
    chat = bool(found) and found[0][0] in _TURNS  # which may repeat its prompt beside the turns
    if "prompt" in there and ("prompt", "completion") not in found and not chat:
        found.append(("prompt",))
    if len(found) > 1:
        raise BadRow("two_formats", " and ".join(map("/".join, found)))
    if not found:
        raise BadRow("missing_keys", f"has {', '.join(sorted(map(shown, there))[:8]) or 'none'}")
    return found[0]


def _check_repeated(prompt: Any, row: Row) -> None:
    """Some data sets have the first question beside the turns; another text is another format."""
    asked = next((turn.content for turn in row.messages if turn.role == "user"), None)
    if not isinstance(prompt, str) or prompt.strip() not in ("", str(asked).strip()):
        raise BadRow("two_formats", "prompt and turns, and the first of the user is another text")


def _with_fields(row: Row, rest: dict[str, Any]) -> Row:
    """The row with what stands beside its format's keys; nothing may be left but bookkeeping."""
    row = replace(row, messages=_opened(row.messages, rest))
    tools = objects(rest.pop("tools", []), "tools")
    functions = objects(rest.pop("functions", []), "functions")
    tools += [{"type": "function", "function": one} for one in functions]
    weight = rest.pop("weight", 1)
    if type(weight) not in (int, float) or weight != 1:
        raise BadRow("bad_weight", f"{shown(weight)} of the row")
    check_unknown(rest, "the row")
    return replace(row, tools=tuple(tools))


def _opened(turns: tuple[Turn, ...], rest: dict[str, Any]) -> tuple[Turn, ...]:
    """The turns, with a system prompt that stood beside them as the first."""
    texts = [text_of(rest.pop(name)) for name in ("system", "system_prompt") if name in rest]
    has_own = bool(turns) and turns[0].role == "system"
    if has_own:
        texts.append(turns[0].content)
    texts = [text for text in texts if text.strip()]
    if len({text.strip() for text in texts}) > 1:
        raise BadRow("two_systems", " / ".join(map(repr, texts)))
    if not texts or (has_own and turns[0].content.strip()):
        return turns
    return (Turn("system", texts[0]), *turns[has_own:])


def _content(turn: Turn) -> list[Any]:
    """What makes a turn another one; the two texts where there is no more."""
    usual = not turn.fields and turn.weight == 1
    return [turn.role, turn.content] if usual else list(turn)


def _chat(turns: Any) -> Row:
    if not isinstance(turns, list):
        raise BadRow("bad_turn", f"{type(turns).__name__} {shown(turns)}, not a list")
    if len(turns) > _MOST_TURNS:
        raise BadRow("bad_turn", f"there are {len(turns):,} turns, more than {_MOST_TURNS}")
    messages = tuple(map(parse_turn, turns))
    if not messages:
        raise BadRow("bad_turn", "there are no turns")
    return Row("chat", messages=messages)


def _filled(value: Any, what: str) -> str:
    text = text_of(value)
    if not text.strip():
        raise BadRow("empty_text", what)
    return text


def _token_ids(value: Any, what: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(
        type(token) is int and abs(token) <= _LARGEST_ID for token in value
    )
    if not whole or not value:
        raise BadRow("bad_token_ids", f"{what} is {shown(value)}")
    return tuple(value)


def _question(question: Any, answer: Any) -> Row:
    asked, answered = _filled(question, "question"), text_of(answer)
    if not answered.strip():
        raise BadRow("empty_assistant_turn")
    return Row("chat", messages=(Turn("user", asked), Turn("assistant", answered)))


def _plain(text: Any) -> Row:
    return Row("text", prompt=_filled(text, "text"))


def _prompt(prompt: Any) -> Row:
    if isinstance(prompt, list):
        return _chat(prompt)
    return Row("prompt", prompt=_filled(prompt, "prompt"))


def _pair(prompt: Any, completion: Any) -> Row:
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Row("pair", prompt=text_of(prompt), completion=_filled(completion, "completion"))
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise BadRow("bad_turn", "of prompt and completion only one is a list of turns")
    asked, answered = _chat(prompt).messages, _chat(completion).messages
    # What the assistant said in the prompt is context.
    asked = tuple(t._replace(weight=0) if t.role == "assistant" else t for t in asked)
    return Row("chat", messages=asked + answered)


def _tokens(prompt: Any, completion: Any) -> Row:
    return Row(
        "tokens",
        prompt_ids=_token_ids(prompt, "prompt_ids"),
        completion_ids=_token_ids(completion, "completion_ids"),
    )


_PARSERS: Mapping[tuple[str, ...], Callable[..., Row]] = {
    ("conversations",): _chat,
    ("messages",): _chat,
    ("question", "answer"): _question,
    ("text",): _plain,
    ("prompt",): _prompt,
    ("prompt", "completion"): _pair,
    ("prompt_ids", "completion_ids"): _tokens,
}
