"""What one row of training data says, whichever of the usual formats it came in.

Knows formats and nothing about tokenizers, files or models. The format is found row by row, by the
keys that are there, so that one input may mix them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from specdec_training.bad_rows import BadRow, shown

Kind = Literal["chat", "text", "pair", "prompt", "tokens"]

ROLES: Mapping[str, str] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Role as written -> role of the chat template."""

# Keys that make a format, and the kinds they make. A key that is null counts as absent, because
# columnar files give every row the keys of all rows.
_FORMATS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"conversations"}), "sharegpt"),
    (frozenset({"messages"}), "openai"),
    (frozenset({"question", "answer"}), "question"),
    (frozenset({"text"}), "text"),
    (frozenset({"prompt", "completion"}), "pair"),
    (frozenset({"prompt_ids", "completion_ids"}), "tokens"),
)
_LARGEST_ID = 2**31 - 1
_MOST_TURNS = 400  # a conversation is rendered once for each of its turns


@dataclass(frozen=True)
class Row:
    """One row in the form that everything after reading works with.

    Attributes:
        kind: `chat` has messages; `text` a text; `pair` a prompt and a completion; `prompt` a
            prompt alone; `tokens` the exact ids of a prompt and a completion.
        messages: Role and content of each turn.
        prompt: Text, of `pair`, `prompt` and `text` (there it is all of it).
        completion: Text, of `pair`.
        prompt_ids: Of `tokens`.
        completion_ids: Of `tokens`.
        name: The row's own id, or empty.
        group: Rows with the same group belong together, and are held out together; or empty.
    """

    kind: Kind
    messages: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    completion: str = ""
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    name: str = ""
    group: str = ""

    def key(self) -> str:
        """64 hexadecimal digits that are equal for rows of equal content, whatever their name."""
        texts = [self.prompt, self.completion]
        content = [self.kind, self.messages, texts, self.prompt_ids, self.completion_ids]
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()

    def belongs_to(self) -> str:
        """Equal for rows that ask the same: several answers to a prompt stay on one side."""
        if self.group:
            return self.group
        asked: list[Any] = [self.prompt, self.prompt_ids]
        for role, content in self.messages:
            if role == "assistant":
                break
            asked.append((role, content))
        return hashlib.sha256(json.dumps(asked).encode("ascii")).hexdigest()

    def as_chat(self) -> Row:
        """A prompt, with its completion if it has one, as the turns of a conversation."""
        if self.kind not in ("prompt", "pair"):
            return self
        turns = (("user", self.prompt), ("assistant", self.completion))
        messages = turns if self.kind == "pair" else turns[:1]
        return Row("chat", messages=messages, name=self.name, group=self.group)

    def to_json(self) -> str:
        """One string, so that rows of all kinds fit one column."""
        return json.dumps(self.__dict__, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Row:
        """Reads what `to_json` wrote."""
        facts = json.loads(text)
        facts["messages"] = tuple((role, content) for role, content in facts["messages"])
        for name in ("prompt_ids", "completion_ids"):
            facts[name] = tuple(facts[name])
        return cls(**facts)


def parse_row(value: Any) -> Row:
    """The row in a JSON value.

    Raises:
        BadRow: It is none, with the reason.
    """
    if not isinstance(value, dict):
        raise BadRow("not_an_object", f"{type(value).__name__} {shown(value)}")
    there = {name for name, content in value.items() if content is not None}
    found = [name for keys, name in _FORMATS if keys <= there]
    if "prompt" in there and "pair" not in found:
        found.append("prompt")
    if len(found) > 1:
        raise BadRow("two_formats", " and ".join(found))
    name = shown(value["id"]) if isinstance(value.get("id"), str | int) else ""
    group = value["group"] if isinstance(value.get("group"), str) else ""
    if not found:
        raise BadRow("missing_keys", f"has {', '.join(sorted(map(shown, value))[:8]) or 'none'}")
    return replace(_PARSERS[found[0]](value), name=name, group=group)


def _chat(turns: Any, names: tuple[str, str]) -> Row:
    if not isinstance(turns, list):
        raise BadRow("bad_turn", f"the turns are {type(turns).__name__}, not a list")
    if len(turns) > _MOST_TURNS:
        raise BadRow("bad_turn", f"there are {len(turns):,} turns, more than {_MOST_TURNS}")
    messages = tuple(_turn(turn, names) for turn in turns)
    if not messages:
        raise BadRow("bad_turn", "there are no turns")
    return Row("chat", messages=messages)


def _turn(turn: Any, names: tuple[str, str]) -> tuple[str, str]:
    role_name, content_name = names
    if not isinstance(turn, dict):
        raise BadRow("bad_turn", f"a turn is {type(turn).__name__}")
    if role_name not in turn or content_name not in turn:
        raise BadRow("bad_turn", f"a turn has {', '.join(sorted(map(shown, turn))) or 'no keys'}")
    written, content = turn[role_name], turn[content_name]
    role = ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        raise BadRow("unknown_role", shown(written))
    if content is None:
        raise BadRow("null_content", f"of a turn of {role}")
    text = _joined(content)
    if role == "assistant" and not text.strip():
        raise BadRow("empty_assistant_turn")
    return role, text


def _joined(content: Any) -> str:
    """A content as text: a string, or a list of parts that are all text."""
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    return _text(content)


def _part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadRow("content_not_text", f"a part is {shown(kind)}")
    return _text(part.get("text"))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow("content_not_text", f"{type(value).__name__} {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:  # "\ud800" is JSON, and half a character
        raise BadRow("not_utf8", problem.reason) from problem
    return value


def _filled(value: Any, what: str) -> str:
    text = _text(value)
    if not text.strip():
        raise BadRow("empty_text", f"{what} is empty")
    return text


def _token_ids(value: Any, what: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(
        type(token) is int and abs(token) <= _LARGEST_ID for token in value
    )
    if not whole or not value:
        raise BadRow("bad_token_ids", f"{what} is {shown(value)}")
    return tuple(value)


def _sharegpt(value: Any) -> Row:
    return _chat(value["conversations"], ("from", "value"))


def _openai(value: Any) -> Row:
    return _chat(value["messages"], ("role", "content"))


def _question(value: Any) -> Row:
    question, answer = _filled(value["question"], "question"), _text(value["answer"])
    if not answer.strip():
        raise BadRow("empty_assistant_turn")
    return Row("chat", messages=(("user", question), ("assistant", answer)))


def _plain(value: Any) -> Row:
    return Row("text", prompt=_filled(value["text"], "text"))


def _prompt(value: Any) -> Row:
    return Row("prompt", prompt=_filled(value["prompt"], "prompt"))


def _pair(value: Any) -> Row:
    prompt, completion = _text(value["prompt"]), _filled(value["completion"], "completion")
    return Row("pair", prompt=prompt, completion=completion)


def _tokens(value: Any) -> Row:
    return Row(
        "tokens",
        prompt_ids=_token_ids(value["prompt_ids"], "prompt_ids"),
        completion_ids=_token_ids(value["completion_ids"], "completion_ids"),
    )


_PARSERS: Mapping[str, Callable[[Any], Row]] = {
    "sharegpt": _sharegpt,
    "openai": _openai,
    "question": _question,
    "text": _plain,
    "prompt": _prompt,
    "pair": _pair,
    "tokens": _tokens,
}
