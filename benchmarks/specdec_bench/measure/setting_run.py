"""Measures one setting: warm-up, instrumented pass, text check, then interleaved timing.

What an earlier start of the run has measured already is taken over, not measured again.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from specdec.cost.curve import CurveMeter
from specdec.errors import SpecdecError
from specdec.hf.compat import input_device
from specdec.loading import sentence
from specdec_bench.arm_names import ArmSpec
from specdec_bench.checks.text import ReferenceModel, check_text
from specdec_bench.contracts import Arm, Unit, Workbench
from specdec_bench.measure.arms import GenerateArm
from specdec_bench.measure.measuring import instrumented, timed, view, warm_up
from specdec_bench.measure.schedule import Stopping, Timings, order
from specdec_bench.measure.units import text_hash
from specdec_bench.results.files import RecordWriter
from specdec_bench.results.records import (
    CheckRecord,
    CurveRecord,
    Record,
    Results,
    Setting,
    TimeRecord,
)

_CURVE_SECONDS, _CURVE_PARTS = 2.0, 4  # of a setting


class Progress(Protocol):
    """Told about every step; tqdm is one."""

    total: int | None

    def update(self, n: int = 1) -> object:
        """`n` steps are done."""
        ...

    def refresh(self) -> object:
        """Shows a new total."""
        ...


@dataclass
class SettingRun:
    """One setting on its way.

    Attributes:
        bench: Model and conditions.
        arms: In the order of the tables; the baseline first.
        units: What they answer.
        writer: Takes the records.
        reference: Judges texts; None leaves them unchecked.
        progress: Told about every answer.
    """

    bench: Workbench
    arms: Sequence[Arm]
    units: Sequence[Unit]
    writer: RecordWriter
    reference: ReferenceModel | None
    progress: Progress | None = None
    _checked: set[tuple[str, str, str]] = field(default_factory=set, init=False)
    _passed: set[tuple[str, str]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        """Takes over what was measured before."""
        index = self.units[0].record.setting if self.units else -1
        self._device = input_device(self.bench.model)
        self._largest = max(self.units, key=_positions, default=None)
        by_cpu = self._device.type == "cpu" and torch.get_num_threads() == 1
        baseline = self.writer.header.baseline
        self.timings = Timings((unit.record for unit in self.units), baseline, by_cpu)
        before: Results | None = self.writer.before
        if before is None:
            return
        for time in before.times:
            if time.setting == index:
                self.timings.add(time)
        of_this = (check for check in before.checks if check.setting == index)
        self._checked = {(check.unit, check.arm, check.text_sha256) for check in of_this}
        self._passed = {(unit, arm) for setting, unit, arm in before.passes if setting == index}

    def prepare(self, curve: CurveMeter | None = None) -> None:
        """Warms up every arm on every unit, looks into its rounds, and checks its text.

        Args:
            curve: Measured in between, so that it sees the machine as the arms do.
        """
        every = -(-len(self.units) // _CURVE_PARTS)
        for unit in self.units:
            if curve is not None and unit.index % every == 0:
                curve.measure(_CURVE_SECONDS / _CURVE_PARTS)
            for arm in self.arms:
                if not self.timings.has_failed(unit.record.unit, arm.name):
                    self._look(arm, unit)
                self._tick()
        if curve is not None:
            setting, found = self.bench.setting, curve.curve().seconds
            seconds = {str(q): taken for q, taken in found.items()}
            longest = setting.prompt_tokens or 0
            self.writer.append(
                CurveRecord(setting.dtype, setting.batch, seconds, longest, curve.prefix)
            )

    def time(self, stopping: Stopping) -> str:
        """Times repeats of all units until `stopping` has a reason; returns it.

        A repeat that an earlier start began is finished first, so that all units have as many.
        """
        pair, begun = 0, self.timings.begun
        while pair < begun or not (reason := stopping.reason(pair, self.timings)):
            gc.collect()
            for unit in self.units:
                self._visit(unit, pair)
            pair += 1
        return reason

    def _look(self, arm: Arm, unit: Unit) -> None:
        """The untimed answers of one arm to one unit."""
        key = (unit.record.unit, arm.name)
        try:
            rows, looked = warm_up(arm, unit)
            rows = rows_of_ids(rows, unit)
            found: list[Record] = []
            if key not in self._passed:
                passed = instrumented(arm, unit, self.bench, looked.chain, unit is self._largest)
                found += [] if passed is None else [passed]
                if unit.index == 0 and looked.rounds:
                    found.append(view(unit, arm.name, looked, self.bench.tokenizer))
            found += self._checks(arm, unit, rows)
        except Exception as problem:  # noqa: BLE001 - the others go on, whatever it was
            self.writer.append(self._error(arm, unit, 0, 0, problem))
            return
        self.writer.append(*found)
        self._passed.add(key)

    def _visit(self, unit: Unit, pair: int) -> None:
        """One repeat of one unit by all arms."""
        found: list[Record] = []
        texts: dict[str, tuple[Arm, list[list[int]]]] = {}
        for place, number in enumerate(order(len(self.arms), pair, unit.index)):
            arm = self.arms[number]
            if not self.timings.is_done(unit.record.unit, arm.name, pair):
                record, rows = self._answer(arm, unit, pair, place)
                found.append(record)
                if rows is not None:
                    texts[arm.name] = (arm, rows)
            self._tick()
        for arm, rows in texts.values():
            try:
                found += self._checks(arm, unit, rows)
            except Exception as problem:  # noqa: BLE001 - a time without a verdict is none
                found = [
                    self._error(arm, unit, pair, old.order, problem)
                    if isinstance(old, TimeRecord) and old.arm == arm.name
                    else old
                    for old in found
                ]
        self.writer.append(*found)

    def _answer(
        self, arm: Arm, unit: Unit, pair: int, place: int
    ) -> tuple[TimeRecord, list[list[int]] | None]:
        """One timed answer."""
        try:
            found, seconds = timed(lambda: arm.run(unit), self._device)
            rows, wall = rows_of_ids(found, unit), own_seconds(arm, seconds.wall)
        except Exception as problem:  # noqa: BLE001 - the others go on, whatever it was
            return self._error(arm, unit, pair, place, problem), None
        record = TimeRecord(
            setting=unit.record.setting,
            unit=unit.record.unit,
            arm=arm.name,
            pair=pair,
            order=place,
            wall=wall,
            cpu=seconds.cpu if arm.in_process else None,
            text_sha256=text_hash(rows),
        )
        self.timings.add(record)
        return record, rows

    def _error(self, arm: Arm, unit: Unit, pair: int, place: int, problem: Exception) -> TimeRecord:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what an arm without enough memory had taken
        record = TimeRecord(
            setting=unit.record.setting,
            unit=unit.record.unit,
            arm=arm.name,
            pair=pair,
            order=place,
            wall=0.0,
            cpu=None,
            text_sha256="",
            error=f"{type(problem).__name__}: {sentence(problem)}",
        )
        self.timings.add(record)
        return record

    def _checks(self, arm: Arm, unit: Unit, rows: list[list[int]]) -> list[CheckRecord]:
        """Judges a text that this arm has not given to this unit before."""
        digest, setting = text_hash(rows), self.bench.setting
        key = (unit.record.unit, arm.name, digest)
        if self.reference is None or key in self._checked or not _promises(arm, self.bench):
            return []
        verdict, tokens, first, worst = check_text(
            self.reference, self.bench.model, unit, rows, setting
        )
        self._checked.add(key)
        return [
            CheckRecord(
                setting=unit.record.setting,
                unit=unit.record.unit,
                arm=arm.name,
                text_sha256=digest,
                verdict=verdict,
                tokens=tokens,
                first_difference=None if first is None else list(first),
                worst_ratio=worst,
            )
        ]

    def _tick(self) -> None:
        if self.progress is not None:
            self.progress.update()


def rows_of_ids(rows: Any, unit: Unit) -> list[list[int]]:
    """What an arm gave, if it can be judged at all: a list of token ids for each row of the unit.

    Raises:
        SpecdecError: It is something else.
    """
    wanted = len(unit.prompt_ids)
    is_list = isinstance(rows, list | tuple) and len(rows) == wanted
    if not is_list or not all(isinstance(row, list | tuple) for row in rows):
        raise SpecdecError(f"gave {rows!r:.80} where {wanted} lists of token ids were asked for")
    odd = [token for row in rows for token in row if type(token) is not int]
    if odd:
        raise SpecdecError(f"gave {odd[0]!r:.80} where a token id was asked for")
    return [list(row) for row in rows]


def own_seconds(arm: Arm, wall: float) -> float:
    """Seconds of an answer: another process may know better than our clock.

    Raises:
        SpecdecError: It knows nothing of the kind.
    """
    own = getattr(arm, "seconds", None)
    if own is None:
        return wall
    if not isinstance(own, int | float) or not 1e-9 <= own <= wall:
        raise SpecdecError(f"says that an answer of {wall:.3g} s took {own!r:.40} s")
    return float(own)


def not_promised(
    settings: Sequence[Setting], specs: Sequence[ArmSpec], own: Mapping[str, object]
) -> dict[str, list[str]]:
    """Index of a setting, as text -> arms whose texts need not be plain's there; for the header.

    Args:
        settings: Of the run.
        specs: Arms by name.
        own: Makers of arms of one's own, by name; one with `promises_text` says it for its arms.
    """
    found = {}
    for index, setting in enumerate(settings):
        names = [spec.name for spec in specs if not spec.promises_text(setting.temperature)]
        names += [name for name, maker in own.items() if not getattr(maker, "promises_text", True)]
        if names:
            found[str(index)] = names
    return found


def _positions(unit: Unit) -> int:
    """Tokens of a row at the end of an answer."""
    return max(unit.record.prompt_tokens) + unit.record.new_tokens


def _promises(arm: Arm, bench: Workbench) -> bool:
    """Whether an arm promises plain's text; one that was added says so itself, or does."""
    if isinstance(arm, GenerateArm):
        return arm.spec.promises_text(bench.setting.temperature)
    return bool(getattr(arm, "promises_text", True))
