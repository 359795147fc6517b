"""Prompts to decode: the bundled smoke set, the usual benchmarks from a folder, or any JSONL.

Benchmarks are not part of the package: `--data FOLDER` says where they lie. Prompts that begin
alike form one cluster, and a prompt that two tasks share (Spec-Bench holds all of MT-Bench, and a
part of GSM8K) is kept in the first of them only: it is no second piece of evidence.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specdec.errors import ConfigError
from specdec_bench.rows import Row, is_rows, read_rows, shown, stem

SMOKE = "smoke"
"""Name of the bundled prompts."""

_PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"  # how SPEED-Bench marks texts left out
IDS = ("question_id", "task_id", "id")
"""Fields that may name a row; the first that is there counts."""
_FIELDS = ("prompt", "question", "turns", "messages")
_CLUSTER_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation that every arm is given.

    Attributes:
        id: Unique among the loaded prompts.
        cluster: Equal for prompts that begin with the same text; they are resampled together.
        category: Stratum of the bootstrap, and a row of the table by category.
        turns: What the user says, turn by turn; the answers between them are the model's own.
        chat: Whether the turns go through the tokenizer's chat template, if it has one.
    """

    id: str
    cluster: str
    category: str
    turns: tuple[str, ...]
    chat: bool


@dataclass(frozen=True)
class _Benchmark:
    """How a benchmark's file is called and read.

    Attributes:
        stems: Names of the file without ending; the first that is there counts.
        fields: Where the text stands, in the order of preference.
        chat: Whether it is a conversation; None leaves it to the field.
        category: Row -> category; None takes the row's own.
    """

    stems: tuple[str, ...]
    fields: tuple[str, ...] = _FIELDS
    chat: bool | None = None
    category: Callable[[str], str] | None = None


_MT_BENCH = frozenset(
    {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
)
_NAMED: Mapping[str, _Benchmark] = {
    # Spec-Bench's own tables have six tasks: the categories of MT-Bench are one of them.
    "spec_bench": _Benchmark(
        ("spec_bench",), category=lambda own: "mt_bench" if own in _MT_BENCH else own
    ),
    "mt_bench": _Benchmark(("mt_bench",)),
    "vicuna_bench": _Benchmark(("vicuna_bench",)),
    "humaneval": _Benchmark(("humaneval", "HumanEval"), ("prompt",), chat=False),
    "gsm8k": _Benchmark(("gsm8k", "gsm8k_test"), ("question",), chat=True),
    "mbpp": _Benchmark(("mbpp",), ("text", "prompt"), chat=True),
    "mbpp_sanitized": _Benchmark(("mbpp_sanitized",), ("prompt",), chat=True),
}
NAMES = (SMOKE, *_NAMED)
"""Tasks that have a name; any other is the path of a file or a folder."""


def load_tasks(
    specs: Sequence[str], data: Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Prompt]:
    """The prompts of all tasks, in the order of their files.

    Args:
        specs: `smoke`, the name of a benchmark, a file (JSONL, also gzip, with `prompt`,
            `question`, `turns` or `messages`; Parquet) or a folder of such files (SPEED-Bench).
        data: Folder of the named benchmarks: `data/prompts/NAME.jsonl` or `data/NAME.jsonl`.
        limit: Prompts to keep at most, over all tasks, as many of each category as there are. With
            one seed, a smaller limit keeps a part of what a larger one keeps.
        seed: Decides which are kept.

    Raises:
        ConfigError: Nothing was asked for, a file is missing or a row is bad; names file, line and
            field.
    """
    if not specs:
        raise ConfigError(f"no task; give one of {', '.join(NAMES)}, a JSONL file or a folder")
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of prompts must be at least 1, got {limit}")
    if len(set(specs)) < len(specs):
        raise ConfigError(f"a task is named twice in {', '.join(specs)}")
    prompts: list[Prompt] = []
    for spec in specs:
        found = _load(spec, data)
        if len(specs) > 1:  # equal names in two tasks are two categories
            name = _title(spec)
            found = [
                replace(p, category=name if p.category == name else f"{name}/{p.category}")
                for p in found
            ]
        prompts += found
    _check_unique(prompts)
    prompts = _without_twins(prompts)
    return prompts if limit is None else _balanced(prompts, limit, seed)


def _title(spec: str) -> str:
    return spec if spec in NAMES else stem(Path(spec).expanduser()) or spec


def _load(spec: str, data: Path | None) -> list[Prompt]:
    if spec == SMOKE:
        return _from_file(Path(__file__).parent / "smoke.jsonl", SMOKE, _Benchmark(()))
    if spec in _NAMED:
        return _from_file(_find(spec, data), spec, _NAMED[spec])
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise ConfigError(
            f"task {spec!r} is none of {', '.join(NAMES)}, and there is no such file or folder"
        )
    if not is_rows(path):
        raise ConfigError(f"task {spec!r} is no .jsonl, .ndjson (or those .gz) or .parquet file")
    return _from_file(path, stem(path), _Benchmark(()))


def _find(name: str, data: Path | None) -> Path:
    """The file of a named benchmark."""
    if data is None:
        raise ConfigError(
            f"task {name!r} is not part of specdec; say with --data in which folder it lies"
        )
    folder = data.expanduser()
    names = [f"{s}{end}" for s in _NAMED[name].stems for end in (".jsonl", ".jsonl.gz")]
    for where in (folder / "prompts", folder):
        for file in names:
            if (where / file).is_file():
                return where / file
    raise ConfigError(f"task {name!r}: no {' or '.join(names)} in {folder} or {folder / 'prompts'}")


def _from_folder(folder: Path) -> list[Prompt]:
    """All files of a folder; what a row does not say of its category, its file does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and is_rows(path))
    if not files:
        raise ConfigError(f"no .jsonl (or .jsonl.gz) or .parquet file in the folder {folder}")
    prompts = []
    for path in files:
        inner = path.relative_to(folder)
        # SPEED-Bench calls every file "test" and tells them apart by their folders.
        title = "/".join([*inner.parts[:-1], *([stem(path)] if stem(path) != "test" else [])])
        name = f"{folder.resolve().name}/{title}" if title else folder.resolve().name
        category = title.rpartition("/")[2] or folder.resolve().name
        prompts += _from_file(path, name, _Benchmark(()), category)
    return prompts


def _from_file(
    path: Path, name: str, benchmark: _Benchmark, category: str | None = None
) -> list[Prompt]:
    fallback = category or name
    prompts = [_prompt(row, name, benchmark, fallback) for row in read_rows(path)]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt")
    return prompts


def _prompt(row: Row, name: str, benchmark: _Benchmark, fallback: str) -> Prompt:
    turns, chat = _turns(row, benchmark)
    for turn in turns:
        if turn.startswith(_PLACEHOLDER):
            raise row.refuse(
                "turns",
                "holds a placeholder instead of a text; SPEED-Bench has to be prepared with its "
                "own script first",
            )
    if isinstance(row.value.get("chat"), bool) and benchmark.chat is None:
        chat = row.value["chat"]
    own = row.value.get("category")
    if own is not None:
        own = row.text("category", own)
    if benchmark.category is not None and own is not None:
        own = benchmark.category(own)
    return Prompt(f"{name}/{row_id(row)}", cluster_of(turns[0]), own or fallback, turns, chat)


def cluster_of(prompt: str) -> str:
    """Equal for prompts that begin with the same text."""
    return hashlib.sha256(prompt.strip().encode("utf-8")).hexdigest()[:_CLUSTER_DIGITS]


def row_id(row: Row) -> str:
    """What a row calls itself, or else its number.

    Raises:
        ConfigError: Its name is no text and no whole number.
    """
    for field in IDS:
        value = row.value.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise row.refuse(field, f"must be a text or a whole number, got {shown(value)}")
        return row.text(field, value) if isinstance(value, str) else str(value)
    return str(row.number)


def _turns(row: Row, benchmark: _Benchmark) -> tuple[tuple[str, ...], bool]:
    """What the user says, and whether it is a conversation."""
    there = [field for field in benchmark.fields or _FIELDS if row.value.get(field) is not None]
    if not there:
        wanted = ", ".join(benchmark.fields or _FIELDS)
        known = ", ".join(sorted(map(str, row.value))[:8]) or "nothing"
        raise row.refuse(wanted, f"none of them is there; the row has {known}")
    if len(there) > 1 and not benchmark.stems:
        raise row.refuse(" and ".join(there), "only one of them may be there")
    field = there[0]
    value = row.value[field]
    if field == "messages":
        turns = user_turns(row, value)
    elif field == "turns":
        turns = row.texts(field, value)
    else:
        turns = (row.text(field, value),)
    return turns, field not in ("prompt",) if benchmark.chat is None else benchmark.chat


def user_turns(row: Row, messages: Any) -> tuple[str, ...]:
    """What the user says in a list of messages.

    Recorded answers are left out, for the model gives its own; a system message stands in front of
    the first turn, for not every template has that role.

    Args:
        row: Where the messages stand.
        messages: List of objects with `role` and `content`.

    Raises:
        ConfigError: They are something else, or no user speaks.
    """
    turns: list[str] = []
    system: list[str] = []
    for at, (role, text) in enumerate(spoken(row, messages)):
        if role == "user":
            turns.append(text)
        elif role == "system":
            system.append(text)
            if turns:
                raise row.refuse(f"messages[{at}]", "a system message must come first")
    if not turns:
        raise row.refuse("messages", "no message of a user")
    if system:
        turns[0] = "\n\n".join([*system, turns[0]])
    return tuple(turns)


def spoken(row: Row, messages: Any, field: str = "messages") -> list[tuple[str, str]]:
    """(role, text) of every message; roles are "user", "assistant" or "system".

    Raises:
        ConfigError: A message has another role, or its content is no text.
    """
    if not isinstance(messages, list) or not messages:
        raise row.refuse(field, f"must be a list of messages, got {shown(messages)}")
    found = []
    for at, message in enumerate(messages):
        here = f"{field}[{at}]"
        if not isinstance(message, dict):
            raise row.refuse(here, f"must be an object, got {shown(message)}")
        written = message.get("role", message.get("from"))
        role = _ROLES.get(written) if isinstance(written, str) else None
        if role is None:
            raise row.refuse(f"{here}.role", f"unknown role {shown(written)}")
        found.append((role, _content(row, f"{here}.content", message)))
    return found


_ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip


def _content(row: Row, field: str, message: Mapping[str, Any]) -> str:
    """A content: a text, or a list of parts that are all text."""
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = []
        for at, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise row.refuse(f"{field}[{at}]", "is no text part; only text can be decoded")
            parts.append(row.text(f"{field}[{at}].text", part.get("text")))
        content = "".join(parts)
    return row.text(field, content)


def _check_unique(prompts: Sequence[Prompt]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ConfigError(f"two prompts are called {prompt.id!r}; ids must be unique in a file")
        seen.add(prompt.id)


def _without_twins(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those that did not stand in an earlier category; a cluster then lies within one category."""
    first: dict[tuple[str, ...], str] = {}
    kept = [p for p in prompts if first.setdefault(p.turns, p.category) == p.category]
    if len(kept) < len(prompts):
        warnings.warn(
            f"{len(prompts) - len(kept)} prompts stand in two categories; each is kept in the "
            "first only",
            stacklevel=3,
        )
    home: dict[str, str] = {}
    return [
        p
        if home.setdefault(p.cluster, p.category) == p.category
        else replace(p, cluster=f"{p.cluster} {p.category}")  # begins alike, goes on differently
        for p in kept
    ]


def _balanced(prompts: list[Prompt], limit: int, seed: int) -> list[Prompt]:
    """At most `limit` prompts, dealt out category by category."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt.category, []).append(place)
    # A string seeds alike in every process, and the draw of one category depends on no other.
    for category, mine in places.items():
        random.Random(f"{seed} {category}").shuffle(mine)
    kept: list[int] = []
    for deal in range(max(map(len, places.values()))):
        kept += [mine[deal] for mine in places.values() if deal < len(mine)]
    return [prompts[place] for place in sorted(kept[:limit])]
