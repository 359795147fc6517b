"""Reads result files strictly: what is torn, foreign or of another shape is refused, by line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from specdec.artifacts.input_files import read_input
from specdec.errors import SpecdecError
from specdec_bench.results.records import (
    SCHEMA,
    CheckRecord,
    CurveRecord,
    EndRecord,
    Header,
    PassRecord,
    Record,
    Results,
    SamplingRecord,
    SkippedRecord,
    TimeRecord,
    UnitRecord,
    ViewRecord,
)
from specdec_bench.results.values import LEAST_SECONDS

_RECORDS: TypeAdapter[Record] = TypeAdapter(Record, config=ConfigDict(extra="forbid"))
_WANTED = {  # by the type of pydantic's error
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "literal_error": "one of {expected}",
    "is_instance_of": "a list",
    "sequence_str": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "tuple_type": "a list of 2",
    "mapping_type": "an object",
    "dict_type": "an object",
    "dataclass_type": "an object",
}
_ADDED: Mapping[type[Any], set[str]] = {  # fields that files from before do not have
    PassRecord: {"first_tokens"},
    CurveRecord: {"prompt_tokens", "prefix"},
}
_LONGEST_LINE = 64 << 20  # bytes; a line of a real file has thousands
_LONGEST_FILE = 512 << 20


class BrokenRecordError(SpecdecError):
    """A line of a result file is not what it should be; the message names line and field."""


@dataclass(frozen=True)
class Lines:
    """The records of a file and how far they go.

    Attributes:
        records: Header first.
        whole_bytes: Up to the end of the last whole line.
        torn: There is more behind it.
    """

    records: Sequence[Record]
    whole_bytes: int
    torn: bool


def read_results(path: str | Path) -> Results:
    """The results of a finished run.

    Args:
        path: A file that `specdec bench run` wrote.

    Raises:
        SpecdecError: It cannot be read, is truncated or torn, or a line is not a record of this run
            (names the line and the field).
    """
    path = Path(path)
    found = read_lines(path)
    if found.torn:
        raise BrokenRecordError(
            f"{path} is truncated: line {len(found.records) + 1} is torn. Go on with the run "
            "(--resume), or measure again"
        )
    end = found.records[-1] if found.records else None
    if not isinstance(end, EndRecord):
        raise BrokenRecordError(
            f"{path} is truncated: it has {len(found.records)} lines and no end mark. Go on with "
            "the run (--resume), or measure again"
        )
    return as_results(path, found.records)


def read_lines(path: Path) -> Lines:
    """All whole lines of a file, finished or not, each checked by itself and against the header.

    Raises:
        SpecdecError: The file cannot be read, or a whole line is wrong.
    """
    content = read_input(path, "the results", _LONGEST_FILE)
    whole = content.rfind(b"\n") + 1
    reader, records = _Reader(path), []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        records.append(reader.record(number, line))
    return Lines(records, whole, whole < len(content))


def as_results(path: Path, records: Sequence[Record]) -> Results:
    """Records sorted by kind.

    Raises:
        SpecdecError: There is no header.
    """
    if not records or not isinstance(records[0], Header):
        raise BrokenRecordError(f"{path} holds no records: it is empty or torn in its first line")
    rest = records[1:]
    return Results(
        header=records[0],
        units={(r.setting, r.unit): r for r in rest if isinstance(r, UnitRecord)},
        times=[r for r in rest if isinstance(r, TimeRecord)],
        passes={(r.setting, r.unit, r.arm): r for r in rest if isinstance(r, PassRecord)},
        checks=[r for r in rest if isinstance(r, CheckRecord)],
        curves={(r.dtype, r.batch, r.prompt_tokens): r for r in rest if isinstance(r, CurveRecord)},
        views=[r for r in rest if isinstance(r, ViewRecord)],
        end=next((r for r in rest if isinstance(r, EndRecord)), None),
        skipped={r.setting: r for r in rest if isinstance(r, SkippedRecord)},
        sampling=[r for r in rest if isinstance(r, SamplingRecord)],
    )


class _Reader:
    """Checks lines one after the other; knows what came before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header: Header | None = None
        self._ended = False
        self._units: dict[tuple[int, str], UnitRecord] = {}
        self._seen: set[tuple[Any, ...]] = set()

    def record(self, number: int, line: bytes) -> Record:
        """The record on line `number`, from 1."""
        try:
            found = _parse(line)
            self._check_place(number, found)
            return found
        except BrokenRecordError as problem:
            raise BrokenRecordError(f"{self._path}, line {number}: {problem}") from None

    def _check_place(self, number: int, record: Record) -> None:
        if self._ended:
            raise BrokenRecordError("there is more after the end mark: another run's records?")
        if isinstance(record, Header):
            self._check_header(record)
            return
        if self._header is None:
            raise BrokenRecordError(f"field 'kind': the first line must be a header, got {record}")
        self._check_names(record, self._header)
        self._check_once(record)
        if isinstance(record, UnitRecord):
            self._check_rows(record, self._header)
            self._units[record.setting, record.unit] = record
        if isinstance(record, CheckRecord):
            self._check_exact(record)
        if isinstance(record, EndRecord):
            self._ended = True
            if record.records != number - 1:
                raise BrokenRecordError(
                    f"field 'records': the end mark counts {record.records} lines before it, and "
                    f"there are {number - 1}: lines were lost or added"
                )

    def _check_header(self, header: Header) -> None:
        if self._header is not None:
            same = header.run_id == self._header.run_id
            raise BrokenRecordError(
                f"field 'run_id': a second header, of run {header.run_id!r}"
                + ("" if same else f" where the file is of run {self._header.run_id!r}")
            )
        if header.schema != SCHEMA:
            raise BrokenRecordError(
                f"field 'schema': version {header.schema}, and this specdec reads {SCHEMA}; read "
                "it with the version that wrote it"
            )
        if header.baseline not in header.arms:
            raise BrokenRecordError(f"field 'baseline': {header.baseline!r} is not among the arms")
        if len(set(header.arms)) < len(header.arms) or not header.settings:
            raise BrokenRecordError("field 'arms' or 'settings': names repeat, or there are none")
        self._header = header

    def _check_names(self, record: Any, header: Header) -> None:
        setting, arm = getattr(record, "setting", None), getattr(record, "arm", None)
        if setting is not None and not 0 <= setting < len(header.settings):
            raise BrokenRecordError(
                f"field 'setting': {setting}, and the header has {len(header.settings)}"
            )
        if arm is None:
            return
        if arm not in header.arms:
            raise BrokenRecordError(f"field 'arm': {arm!r} is not among the header's arms")
        if hasattr(record, "unit") and (setting, record.unit) not in self._units:
            raise BrokenRecordError(
                f"field 'unit': no unit {record.unit!r} in setting {setting} before this line"
            )

    def _check_rows(self, unit: UnitRecord, header: Header) -> None:
        batch = header.settings[unit.setting].batch
        if len(unit.prompt_tokens) != batch:
            raise BrokenRecordError(
                f"field 'prompt_tokens': {len(unit.prompt_tokens)} rows in a setting of {batch}"
            )

    def _check_exact(self, check: CheckRecord) -> None:
        """An exact text has plain's hash."""
        plain = self._units[check.setting, check.unit].text_sha256
        if check.verdict == "exact" and check.text_sha256 != plain:
            raise BrokenRecordError(
                "field 'verdict': 'exact', and the hash of the text is not that of plain's"
            )

    def _check_once(self, record: Any) -> None:
        """Nothing is measured twice."""
        names = {
            "unit": ("setting", "unit"),
            "skipped": ("setting",),
            "time": ("setting", "unit", "arm", "pair"),
            "pass": ("setting", "unit", "arm"),
            "check": ("setting", "unit", "arm", "text_sha256"),
            "curve": ("dtype", "batch", "prompt_tokens"),
            "view": ("setting", "unit", "arm"),
            "sampling": ("setting", "arm"),
        }.get(record.kind, ())
        if not names:
            return
        key = (record.kind, *(getattr(record, name) for name in names))
        if key in self._seen:
            values = ", ".join(f"{n} {v!r}" for n, v in zip(names, key[1:], strict=True))
            raise BrokenRecordError(f"a second {record.kind!r} record with {values}")
        self._seen.add(key)


def _parse(line: bytes) -> Record:
    """A line as a record."""
    if len(line) > _LONGEST_LINE:
        raise BrokenRecordError(f"it has {len(line):,} bytes")
    try:
        value = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        raise BrokenRecordError(f"not JSON: {problem}") from None
    if not isinstance(value, dict):
        raise BrokenRecordError(f"not a JSON object but {type(value).__name__}")
    try:
        record = _RECORDS.validate_python(value)
    except ValidationError as problem:
        raise BrokenRecordError(_in_words(problem, value)) from None
    _check_whole(record, value)
    found = _contradiction(record)
    if found:
        raise BrokenRecordError(found)
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _check_whole(record: Any, value: Mapping[str, Any], where: str = "") -> None:
    """Defaults are for our own calls: a line that lacks a field was not written by us."""
    missing = {f.name for f in fields(record)} - value.keys() - _ADDED.get(type(record), set())
    if missing:
        raise BrokenRecordError(f"field {where + min(missing)!r} is missing")
    if isinstance(record, Header):
        for at, setting in enumerate(record.settings):
            _check_whole(setting, value["settings"][at], f"settings[{at}].")


def _in_words(problem: ValidationError, value: Mapping[str, Any]) -> str:
    """What is wrong with a line, naming the field."""
    wrong = problem.errors(include_url=False)[0]
    kind, facts = wrong["type"], wrong.get("ctx", {})
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"field 'kind': {value.get('kind')!r:.80} is unknown"
    place = wrong["loc"][1:]  # behind the kind of the record
    if kind == "string_unicode" or not place:
        return f"field {wrong['input']!r:.80} is unknown"
    wanted = _WANTED.get(kind, "").format(**facts).replace("'", "")
    if kind == "missing" and isinstance(place[-1], int):  # of a pair
        place, wanted = place[:-1], _WANTED["tuple_type"]
    if kind == "value_error":
        return f"field {_path(place)!r}: {facts['error']}"
    if not wanted:
        return f"field {_path(place)!r} is {'missing' if kind == 'missing' else 'unknown'}"
    return f"field {_path(place)!r} must be {wanted}, got {wrong['input']!r:.80}"


def _path(place: Sequence[int | str]) -> str:
    """As it would be written in Python, with the fields of a setting behind its index."""
    path = str(place[0])
    for before, part in pairwise(place):
        is_field = isinstance(before, int) and isinstance(part, str)
        path += f".{part}" if is_field else f"[{part!r}]"
    return path


def _contradiction(record: Record) -> str:
    """Values that are possible each, and not together; names the field."""
    match record:
        case SkippedRecord() if record.short + record.ungrouped > record.asked:
            return f"field 'asked': {record.asked} is fewer than were left out"
        case TimeRecord(error="") if record.wall < LEAST_SECONDS:
            return f"field 'wall': {record.wall:g} s of an answer without an error"
        case TimeRecord(error="") if record.cpu is not None and 0 < record.cpu < LEAST_SECONDS:
            return f"field 'cpu': {record.cpu:g} s is less than a clock can tell"
        case CheckRecord(verdict="exact") if record.first_difference is not None:
            return "field 'first_difference': an exact text has none"
        case CheckRecord(verdict="exact" | "near_tie") if record.tokens.get("wrong"):
            return (
                f"field 'verdict': {record.verdict!r}, with {record.tokens['wrong']} wrong tokens"
            )
        case SamplingRecord(passed=True) if record.p_value < record.limit:
            return f"field 'passed': true, with p = {record.p_value:g} below {record.limit:g}"
    return ""
