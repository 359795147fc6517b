"""One turn of a conversation: who speaks, what, and the fields beside that change what it means.

A field is rendered by the chat template, or obeyed, or known to say nothing about the text;
any other makes the row a bad one. None is dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from specdec_training.data.bad_rows import BadRow, shown

ROLES: Mapping[str, str] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}
"""Role as written -> role of the chat template."""

BOOKKEEPING = frozenset({
    "id", "_id", "uid", "uuid", "guid", "idx", "index", "hash", "key", "group", "split",
    "prompt_id", "conversation_id", "conversation_hash", "session_id", "message_id", "parent_id",
    "question_id", "answer_id", "turn_id", "sample_id", "example_id", "user_id", "model_id",
    "request_id", "response_id", "turn", "num_turns", "n_turns", "created", "created_at",
    "updated_at", "create_time", "update_time", "date", "time", "timestamp", "model", "model_name",
    "generator", "source", "dataset", "dataset_name", "origin", "url", "license", "author",
    "category", "subcategory", "topic", "subject", "domain", "tags", "language", "lang", "title",
    "difficulty", "score", "scores", "rating", "upvotes", "views", "likes", "quality", "toxicity",
    "toxic", "redacted", "openai_moderation", "metadata", "meta", "annotations", "tokens",
    "num_tokens", "token_count", "n_tokens", "length", "status", "finish", "finish_reason",
    "stop_reason", "usage", "cache_control", "parallel_tool_calls", "decoded_prompt",
    "decoded_completion",
})  # fmt: skip
"""Fields of rows, turns and parts that say where a text comes from, and nothing about the text."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of one field, what the assistant thought; the first is the one that is kept."""

_DEEPEST = 64  # levels of a JSON value


class Turn(NamedTuple):
    """One turn.

    Attributes:
        role: Of the chat template.
        fields: Names and JSON values that the template is given beside the two.
        weight: 0 for an answer that is context, and not learnt.
    """

    role: str
    content: str
    fields: tuple[tuple[str, Any], ...] = ()
    weight: int = 1

    @property
    def is_answer(self) -> bool:
        """Whether the assistant is to learn it."""
        return self.role == "assistant" and self.weight == 1

    @property
    def calls_tools(self) -> bool:
        """Whether it calls tools, so that the turns behind it depend on it."""
        return any(name == "tool_calls" for name, _ in self.fields)

    def without(self, field: str) -> Turn:
        """The turn without one of its fields."""
        return self._replace(fields=tuple(pair for pair in self.fields if pair[0] != field))

    def for_template(self, arguments_as_text: bool = False) -> dict[str, Any]:
        """What the chat template is given.

        Args:
            arguments_as_text: Hand over the arguments of calls as JSON text instead of objects.
        """
        fields = dict(self.fields)
        if arguments_as_text and self.calls_tools:
            fields["tool_calls"] = [_with_text(call) for call in fields["tool_calls"]]
        if REASONING[0] in fields:  # some templates read it by another name
            fields["thinking"] = fields[REASONING[0]]
        return {"role": self.role, "content": self.content, **fields}

    def to_dict(self) -> dict[str, Any]:
        """All of it as a JSON object, without what is as usual."""
        whole = {"role": self.role, "content": self.content, **dict(self.fields)}
        return whole if self.weight == 1 else whole | {"weight": self.weight}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Turn:
        """Reads what `to_dict` wrote."""
        rest = dict(facts)
        role, content, weight = rest.pop("role"), rest.pop("content"), rest.pop("weight", 1)
        return cls(role, content, tuple(rest.items()), weight)


def parse_turn(value: Any) -> Turn:
    """A turn with `role` and `content`, or with `from` and `value` as ShareGPT has them.

    Raises:
        BadRow: It is none, or has a field that cannot be kept.
    """
    if not isinstance(value, dict):
        raise BadRow("bad_turn", f"{type(value).__name__} {shown(value)}")
    names = ("role", "content") if value.get("from") is None else ("from", "value")
    rest = present(value, names)
    if names[0] not in rest:
        raise BadRow("bad_turn", f"has {', '.join(sorted(map(shown, value))) or 'no fields'}")
    written = rest.pop(names[0])
    role = ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        raise BadRow("unknown_role", shown(written))
    if names[1] not in rest and not {"tool_calls", "function_call"} & rest.keys():
        if names[1] in value:
            raise BadRow("null_content", role)
        raise BadRow("bad_turn", f"has {', '.join(sorted(map(shown, value)))}")
    text = _joined(rest.pop(names[1], ""))
    weight = _weight(rest, role)
    turn = Turn(role, text, tuple(_fields(rest, f"a turn of {role}").items()), weight)
    if role == "assistant" and not text.strip() and not turn.calls_tools:
        raise BadRow("empty_assistant_turn")
    return turn


def present(value: Mapping[str, Any], kept: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields that say something: null, empty texts and empty lists count as absent.

    Columnar files give every row the fields of all rows, and clients write out what they lack.

    Args:
        value: A row, a turn or a part.
        kept: Fields that may be empty; null is absent there, too.
    """
    return {
        name: content
        for name, content in value.items()
        if content is not None
        and (name in kept or not isinstance(content, str | list | dict) or content)
    }


def check_unknown(rest: Mapping[str, Any], where: str) -> None:
    """Raises `BadRow` that names the first field that is no bookkeeping.

    Args:
        rest: Fields that nothing has read.
        where: What they are fields of, for the message.
    """
    for name in rest:
        if not (isinstance(name, str) and (name in BOOKKEEPING or name.startswith("__"))):
            raise BadRow("unknown_field", f"{shown(name)!r} of {where}")


def text_of(value: Any) -> str:
    """`value`, which must be a text that UTF-8 can hold.

    Raises:
        BadRow: It is not.
    """
    if not isinstance(value, str):
        raise BadRow("content_not_text", f"{type(value).__name__} {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:  # "\ud800" is JSON, and half a character
        raise BadRow("not_utf8", problem.reason) from problem
    return value


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON value, names included.

    Raises:
        BadRow: It is none, or is nested too deep for any template.
    """
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                yield one
            elif isinstance(one, dict):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple):
                below += one
            elif not (one is None or isinstance(one, bool | int | float)):
                raise BadRow("bad_field", f"it holds {type(one).__name__}")
        if not below:
            return
        level = below
    raise BadRow("bad_field", f"it is nested more than {_DEEPEST} deep")


def objects(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of JSON objects, or the JSON text of one.

    Raises:
        BadRow: It is something else.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError) as problem:
            raise BadRow("bad_field", f"{name} is no JSON: {problem}") from problem
    if not isinstance(found, list) or not all(isinstance(one, dict) and one for one in found):
        raise BadRow("bad_field", f"{name} is {shown(found)}, not a list of objects")
    for text in strings_in(found):
        text_of(text)
    return found


def _fields(rest: dict[str, Any], where: str) -> dict[str, Any]:
    """What the template is given; nothing else may be left."""
    fields: dict[str, Any] = {}
    calls = []
    if "function_call" in rest:  # as OpenAI had it before there were several
        calls = [{"type": "function", "function": rest.pop("function_call")}]
    if "tool_calls" in rest:
        calls += objects(rest.pop("tool_calls"), "tool_calls")
    if calls:
        fields["tool_calls"] = [_call(call) for call in objects(calls, "function_call")]
    thoughts = {text_of(rest.pop(name)) for name in REASONING if name in rest}
    if len(thoughts) > 1:
        raise BadRow("bad_field", f"{', '.join(REASONING)} of {where} differ")
    if thoughts:
        fields[REASONING[0]] = thoughts.pop()
    for name in ("name", "tool_call_id"):
        if name in rest:
            fields[name] = text_of(rest.pop(name))
    check_unknown(rest, where)
    return fields


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object, which is what chat templates expect."""
    outer = {name: value for name, value in call.items() if name != "function"}
    inner = call.get("function", call)
    if call.get("type") not in (None, "function") or not isinstance(inner, dict):
        raise BadRow("bad_field", f"a tool call is {shown(call)}")
    known = {"name": inner.get("name"), "arguments": _arguments(inner.get("arguments"))}
    if not isinstance(known["name"], str):
        raise BadRow("bad_field", f"a tool call has no name: {shown(call)}")
    for fields in (inner, outer):
        others = {n: v for n, v in fields.items() if n not in ("type", *known)}
        check_unknown(present(others), "a tool call")
    return outer | ({"function": known} if "function" in call else known)


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    inner = call.get("function", call)
    inner = inner | {"arguments": json.dumps(inner["arguments"], ensure_ascii=False)}
    return call | {"function": inner} if "function" in call else inner


def _arguments(value: Any) -> dict[str, Any]:
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value or "{}")
        except (ValueError, RecursionError) as problem:
            raise BadRow("bad_field", f"arguments of a tool call: {problem}") from problem
    if not isinstance(found, dict | None):
        raise BadRow("bad_field", f"arguments of a tool call are {shown(found)}, no object")
    for text in strings_in(found):
        text_of(text)
    return found or {}


def _weight(rest: dict[str, Any], role: str) -> int:
    weight = rest.pop("weight", None)
    if weight is None:
        return 1
    usual = type(weight) in (int, float) and weight in ((0, 1) if role == "assistant" else (0,))
    if not usual:
        raise BadRow("bad_weight", f"{shown(weight)} on a turn of {role}")
    return int(weight) if role == "assistant" else 1


def _joined(content: Any) -> str:
    """A content as text: a string, or a list of parts that are all text."""
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    return text_of(content)


def _part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadRow("content_not_text", f"a part is {shown(kind)}")
    rest = present(part, ("text",))
    del rest["type"]
    text = text_of(rest.pop("text", None))
    check_unknown(rest, "a part of a content")
    return text
