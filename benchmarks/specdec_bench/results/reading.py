"""Reads result files strictly: what is torn, foreign or of another shape is refused, by line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from specdec.artifacts.input_files import read_input
from specdec.errors import SpecdecError
from specdec_bench.results.records import (
    KINDS,
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
from specdec_bench.results.values import wrong_value

_ADDED = {  # fields that files from before do not have
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
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise BrokenRecordError(f"field 'kind': {kind!r} is unknown")
    found: Record = _build(KINDS[kind], value, "")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


@cache
def _types(record: type[Any]) -> Mapping[str, Any]:
    return get_type_hints(record)


def _build(record: type[Any], value: Mapping[str, Any], where: str) -> Any:
    """An instance of a record's class, every field checked."""
    types = _types(record)  # type: ignore[arg-type]  # classes are hashable
    names = {f.name for f in fields(record)}
    unknown, missing = sorted(set(value) - names), sorted(names - set(value))
    missing = [name for name in missing if name not in _ADDED.get(record, ())]
    if unknown:
        raise BrokenRecordError(f"field {where + unknown[0]!r} is unknown")
    if missing:
        raise BrokenRecordError(f"field {where + missing[0]!r} is missing")
    kind = next((f for f in fields(record) if f.name == "kind"), None)
    if kind is not None and kind.default is not MISSING and value["kind"] != kind.default:
        raise BrokenRecordError(f"field 'kind': {value['kind']!r}")
    built = {
        name: _typed(types[name], value[name], where + name) for name in sorted(names & set(value))
    }
    found = record(**built)
    problem = wrong_value(found)
    if problem:
        raise BrokenRecordError(problem)
    return found


def _typed(wanted: Any, value: Any, where: str) -> Any:
    """`value` if it is of the type; JSON's lists become lists, pairs become tuples."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return value
    if is_dataclass(wanted) and isinstance(wanted, type):
        _must(isinstance(value, dict), "an object", value, where)
        return _build(wanted, value, f"{where}.")
    if origin is Literal:
        _must(value in inner, "one of " + ", ".join(inner), value, where)
        return value
    if origin in (Union, UnionType):
        return _optional(inner, value, where)
    if origin is tuple:
        is_pair = isinstance(value, list) and len(value) == len(inner)
        _must(is_pair, f"a list of {len(inner)}", value, where)
        return tuple(_each(zip(inner, value, strict=True), where))
    if origin is not None and issubclass(origin, Mapping):
        _must(isinstance(value, dict), "an object", value, where)
        return {k: _typed(inner[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if origin is not None and issubclass(origin, Sequence):
        _must(isinstance(value, list), "a list", value, where)
        return list(_each(((inner[0], item) for item in value), where))
    return _scalar(wanted, value, where)


def _each(pairs: Any, where: str) -> Iterator[Any]:
    for index, (wanted, item) in enumerate(pairs):
        yield _typed(wanted, item, f"{where}[{index}]")


def _optional(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NoneType in choices:
        return None
    (wanted,) = [choice for choice in choices if choice is not NoneType]
    return _typed(wanted, value, where)


def _scalar(wanted: type[Any], value: Any, where: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is float:
        _must(is_number and _is_finite(value), "a number", value, where)
        return float(value)
    if wanted is int:
        _must(is_number and isinstance(value, int), "a whole number", value, where)
        return value
    _must(type(value) is wanted, {str: "text", bool: "true or false"}[wanted], value, where)
    return value


def _is_finite(value: float) -> bool:
    """Also of whole numbers, of which JSON may hold some that no float can."""
    return abs(value) <= sys.float_info.max


def _must(holds: bool, wanted: str, value: Any, where: str) -> None:
    if not holds:
        raise BrokenRecordError(f"field {where!r} must be {wanted}, got {value!r:.80}")
