"""Recorded answers: whatever prompt and answer a row holds, turn by turn, or its own counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from specdec.errors import ConfigError
from specdec_bench.rows import Row, read_rows, shown, stem
from specdec_bench.tasks import IDS, Prompt, cluster_of, load_tasks, row_id, spoken

Message = tuple[str, str]

_PROMPTS = ("prompt", "question", "instruction")
_ANSWERS = ("output", "answer", "response", "completion", "solution", "generated_text")
_MOST_TOKENS = 2**40  # of a counter; more is no count of tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """One recorded answer.

    Attributes:
        id: Unique in its file.
        cluster: Equal for answers to prompts that begin alike, whichever turn they are.
        category: Of the row, of its prompt, or the file's name.
        said: (role, text) of all that was said before, the question last.
        text: The answer.
    """

    id: str
    cluster: str
    category: str
    said: tuple[Message, ...]
    text: str


@dataclass(frozen=True, slots=True)
class CountedAnswer:
    """What the program that wrote an answer counted.

    Attributes:
        id: Unique in its file.
        cluster: The row's id.
        category: Of the row, or the file's name.
        tokens: New tokens, the overshoot of the last step included.
        steps: Target forwards behind the prefill.
    """

    id: str
    cluster: str
    category: str
    tokens: int
    steps: int


@dataclass(frozen=True)
class Reading:
    """How the rows are read.

    Attributes:
        prompt_field: Where the prompt stands; None takes the first known name.
        answer_field: Where the answer stands; None takes the first known name.
        prompts: Prompt by id, for rows that hold none.
        turn: Only this turn, from 1.
        limit: Rows of the file at most.
    """

    prompt_field: str | None = None
    answer_field: str | None = None
    prompts: Mapping[str, Prompt] | None = None
    turn: int | None = None
    limit: int | None = None


def load_prompts(path: Path) -> dict[str, Prompt]:
    """Prompts of a JSONL file by their id in it.

    Raises:
        ConfigError: As `load_tasks`; or a row has no id.
    """
    for row in read_rows(path):
        if all(row.value.get(field) is None for field in IDS):
            raise row.refuse(IDS[0], "is not there, so no answer can name this prompt")
    return {prompt.id.rpartition("/")[2]: prompt for prompt in load_tasks([str(path)])}


def read_answers(path: Path, reading: Reading) -> list[Answer]:
    """All answers of a file.

    Raises:
        ConfigError: The file or a row is not what it should be, or there is no answer.
    """
    found: list[Answer] = []
    for row in islice(read_rows(path), reading.limit):
        turns = list(enumerate(_answers(row, reading), 1))
        kept = [(n, answer) for n, answer in turns if reading.turn in (None, n)]
        found += [
            replace(answer, id=f"{answer.id}.{n}" if len(turns) > 1 else answer.id)
            for n, answer in kept
        ]
    if not found:
        turn = f" of turn {reading.turn}" if reading.turn else ""
        raise ConfigError(f"{path} holds no answer{turn}")
    names = [answer.id for answer in found]
    if len(set(names)) < len(names):  # several samples of one prompt share its id
        found = [replace(answer, id=f"{at}:{answer.id}") for at, answer in enumerate(found)]
    home: dict[str, str] = {}
    return [
        answer
        if home.setdefault(answer.cluster, answer.category) == answer.category
        else replace(answer, cluster=f"{answer.cluster} {answer.category}")
        for answer in found
    ]


def read_counters(path: Path, reading: Reading) -> list[CountedAnswer]:
    """The counters that FastChat-like answer files hold: `new_tokens`, and `idxs` or steps.

    `idxs` holds the index of the last step, so there were as many steps, and one; `decoding_steps`
    holds their number.

    Raises:
        ConfigError: A row has no such counters.
    """
    found = []
    for row in islice(read_rows(path), reading.limit):
        category = _category(row, None)
        for at, choice in enumerate(_choices(row)):
            where = f"choices[{at}]"
            tokens = _whole(row, f"{where}.new_tokens", choice.get("new_tokens"))
            if "idxs" in choice:
                steps = [n + 1 for n in _whole(row, f"{where}.idxs", choice["idxs"])]
            else:
                steps = _whole(row, f"{where}.decoding_steps", choice.get("decoding_steps"))
            if len(tokens) != len(steps):
                raise row.refuse(where, f"{len(tokens)} token counts for {len(steps)} step counts")
            for turn, (new, taken) in enumerate(zip(tokens, steps, strict=True), 1):
                if reading.turn not in (None, turn):
                    continue
                if not taken or new < taken:
                    raise row.refuse(where, f"{new} tokens in {taken} steps of turn {turn}")
                name = row_id(row)
                found.append(CountedAnswer(f"{name}.{at}.{turn}", name, category, new, taken))
    if not found:
        raise ConfigError(f"{path} holds no counters")
    return found


def _answers(row: Row, reading: Reading) -> Iterator[Answer]:
    """The answers of a row, in the order of its turns."""
    explicit = reading.prompt_field is not None or reading.answer_field is not None
    chat = next((f for f in ("messages", "conversations") if row.value.get(f) is not None), None)
    if not explicit and row.value.get("choices") is not None:
        yield from _of_choices(row, reading)
    elif not explicit and chat is not None:
        yield from _of_messages(row, chat)
    else:
        prompt = _field(row, reading.prompt_field, _PROMPTS, "--prompt-field")
        text = _field(row, reading.answer_field, _ANSWERS, "--answer-field")
        said = (("user", prompt),)
        yield Answer(row_id(row), cluster_of(prompt), _category(row, None), said, text)


def _of_choices(row: Row, reading: Reading) -> Iterator[Answer]:
    """FastChat: answers in `choices`, prompts in a file of their own."""
    name = row_id(row)
    prompt = (reading.prompts or {}).get(name)
    if prompt is None:
        known = "they do not hold it" if reading.prompts else "it is missing"
        raise row.refuse(
            "question_id", f"the prompt of {name} is looked up in --prompts FILE, and {known}"
        )
    choice = _choices(row)[0]  # further choices are samples of the same conversation
    answers = row.texts("choices[0].turns", choice.get("turns"))
    if len(answers) > len(prompt.turns):
        raise row.refuse(
            "choices[0].turns", f"{len(answers)} answers to a prompt of {len(prompt.turns)} turns"
        )
    said: list[Message] = []
    for question, text in zip(prompt.turns, answers, strict=False):
        said.append(("user", question))
        category = _category(row, prompt.category)
        yield Answer(name, cluster_of(prompt.turns[0]), category, tuple(said), text)
        said.append(("assistant", text))


def _of_messages(row: Row, field: str) -> Iterator[Answer]:
    messages = spoken(row, row.value[field], field)
    if "assistant" not in {role for role, _ in messages}:
        raise row.refuse(field, "no message of an assistant, so there is no answer to replay")
    name, category = row_id(row), _category(row, None)
    first = next((text for role, text in messages if role == "user"), messages[0][1])
    for at, (role, text) in enumerate(messages):
        if role == "assistant" and at:  # a greeting answers nothing
            yield Answer(name, cluster_of(first), category, tuple(messages[:at]), text)


def _choices(row: Row) -> Sequence[Mapping[str, Any]]:
    choices = row.value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise row.refuse("choices", f"must be a list of objects, got {shown(choices)}")
    if not all(isinstance(choice, dict) for choice in choices):
        raise row.refuse("choices", "must be a list of objects")
    return choices


def _whole(row: Row, field: str, values: Any) -> list[int]:
    """A list of counts."""
    fine = isinstance(values, list) and all(
        type(value) is int and 0 <= value < _MOST_TOKENS for value in values
    )
    if not fine or not values:
        raise row.refuse(field, f"must be a list of counts, got {shown(values)}")
    return list(values)


def _field(row: Row, wanted: str | None, known: Sequence[str], flag: str) -> str:
    """The text in a field, named by the user or the only known one."""
    if wanted is None:
        there = [name for name in known if isinstance(row.value.get(name), str)]
        if len(there) != 1:
            has = ", ".join(sorted(map(str, row.value))[:8]) or "nothing"
            found = f"has both {' and '.join(there)}" if there else f"none of them; it has {has}"
            raise row.refuse(", ".join(known), f"{found}; say which with {flag}")
        wanted = there[0]
    value: Any = row.value
    for part in wanted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise row.refuse(wanted, "is not there")
        value = value[part]
    return row.text(wanted, value)


def _category(row: Row, fallback: str | None) -> str:
    own = row.value.get("category")
    return row.text("category", own) if own is not None else fallback or stem(row.path)
