"""The training loop of an EAGLE-3 head: batches, optimiser, measurements, checkpoints.

Knows steps, schedules, files and when to stop; how the head learns stands in `train_step`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.artifacts.atomic_files import replace_file, to_json
from specdec.errors import ConfigError
from specdec.heads.draft_head import DraftHead
from specdec_training.contracts import FeatureSource, TokenBatch
from specdec_training.data.batches import AnyExample, RowSampler, collate, own_batches
from specdec_training.run.checkpoints import Checkpoint, CheckpointStore
from specdec_training.run.evaluate import Acceptance, AcceptanceMeter, Selection
from specdec_training.run.folder import note_saved, refuse_lost_run, restore_results
from specdec_training.run.options import TrainOptions, resolved
from specdec_training.run.progress import Progress, StepLog, memory_gb, write_metrics
from specdec_training.run.state import Clock, StopSignals, random_state, restore_random_state
from specdec_training.run.train_step import StepResult, Told, TrainStep

_MEASUREMENTS = 8  # of a run, when nothing else is said
_MOST_MEASURING = 0.2  # share of a time budget that measurements may take, roughly
_DEFAULT_STEPS = 1000
_WIDTHS = 64  # rows are padded to a multiple of it, so that kernels see few shapes


@dataclass
class RunParts:
    """What a trainer works on.

    Attributes:
        head: On the device, fp32, with embeddings and an output matrix.
        source: The target, or what was recorded of it.
        sampler: Which of them come when.
        max_length: Tokens of an example and of a row.
        meter: Measures acceptance; None where there is no target to generate with.
        accelerator: Hugging Face's, made for this run.
        save_head: Writes the head to its folder; called when it is the best so far.
        facts: Of data and target; a checkpoint of others is refused.
        provenance: What is written down of where the head comes from.
    """

    head: DraftHead
    source: FeatureSource
    examples: Sequence[AnyExample]
    sampler: RowSampler
    max_length: int
    meter: AcceptanceMeter | None
    accelerator: Any
    folder: Path
    save_head: Callable[[Acceptance | None], None]
    facts: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        steps: Optimiser steps in all.
        history: All measurements of the head, the oldest first.
        baselines: What they are compared with.
        signal: That stopped it, or None.
        reason: Why it ended, for people.
        skipped: Steps without an update.
    """

    steps: int
    history: list[Acceptance]
    baselines: dict[str, Any]
    signal: int | None
    reason: str
    skipped: int


class Trainer:
    """Trains one head; `run` does all of it.

    Args:
        parts: What to work on.
        options: Of the command, as `resolved` left them.
    """

    def __init__(self, parts: RunParts, options: TrainOptions) -> None:
        options = resolved(options, parts.head.config.hidden_size)
        self.parts, self.options = parts, options
        self.step, self._share = 0, 0.0
        self._accelerator, self._head = parts.accelerator, parts.head
        self._train_step = TrainStep(parts.accelerator, parts.head, parts.source, options)
        self._guard = self._train_step.guard
        self._selection = Selection(options.patience)
        self._baselines: dict[str, Any] = {}
        self._store = CheckpointStore(parts.folder / "checkpoints", options.keep)
        self._steps = None if options.minutes is not None else options.steps or _DEFAULT_STEPS
        self._clock = Clock(self._steps, options.minutes)
        self._log: StepLog | None = None
        self._measured_at = self._saved_at = -1
        self._next_measurement, self._is_due = 0.0, False

    @property
    def _leads(self) -> bool:
        return bool(self._accelerator.is_main_process)

    def run(self) -> RunResult:
        """Goes on from the newest checkpoint, or starts; ends with a checkpoint and a best head.

        Raises:
            ConfigError: The folder holds a run with other options, data or target, or one that has
                lost its checkpoints.
            SpecdecError: Too many steps in a row were not finite, or a file cannot be written.
        """
        folder, found = self.parts.folder, self._store.latest()
        if found is None:
            refuse_lost_run(folder, damaged=not self._store.is_empty)
        size = 0 if found is None else self._resume(found)
        self._accelerator.wait_for_everyone()  # all have looked, before anything is written
        if self._leads:
            content = to_json(self.parts.provenance, "provenance")
            replace_file(folder / "provenance.json", content + b"\n")
            self._log = StepLog(folder / "log.jsonl", size)
        events = folder / "tensorboard" if self.options.tensorboard else None
        try:
            with (
                StopSignals() as signals,
                Progress(self._steps, self.step, self._leads, events) as progress,
            ):
                return self._loop(signals, progress)
        finally:
            if self._log is not None:
                self._log.close()

    def _loop(self, signals: StopSignals, progress: Progress) -> RunResult:
        reason, over = self._finished(), self.step > 0 and self._selection.is_over
        if self.step:
            progress.note(f"going on from the checkpoint of step {self.step}")
            if self._leads:
                chosen, save = self._selection, self.parts.save_head
                restore_results(self.parts.folder, self.step, chosen, self._baselines, save)
        if self.step == 0 and self.options.max_steps == 0:
            self._dry_run()
            return self._result("everything was checked and nothing trained", None)
        self._measure_if_due(progress, at_end=bool(reason))  # a signal may have come before it
        reason = reason or ("early" if over else "")  # an earlier session ended so
        while not reason:
            begin = time.perf_counter()
            record, reason = self._one_step(signals)
            self._write(record, time.perf_counter() - begin, progress)
            if reason:
                break
            reason = self._finished()
            self._measure_if_due(progress, at_end=bool(reason))
            self._save_if_due(at_end=bool(reason))
        if reason == "signal":
            self._save()
            return self._result("stopped; run the same command again to go on", signals.received)
        if reason == "early":
            self._save()
            count = self.options.patience
            reason = f"no gain in {count} measurement{'' if count == 1 else 's'}"
        if self.parts.meter is None and self._leads:
            self.parts.save_head(None)
        self._accelerator.wait_for_everyone()
        return self._result(reason, None)

    def _finished(self) -> str:
        """Why the run is over, or nothing."""
        if self.options.max_steps is not None and self.step >= self.options.max_steps:
            return f"--max-steps {self.options.max_steps}"
        if self._share >= 1:
            return "its time is over" if self._steps is None else "all steps are done"
        return ""

    def _result(self, reason: str, signal: int | None) -> RunResult:
        return RunResult(
            self.step,
            self._selection.history,
            self._baselines,
            signal,
            reason,
            self._guard.skipped,
        )

    def _dry_run(self) -> None:
        """One batch forward and backward, so that whatever fails later fails now."""
        before = self.parts.sampler.state()
        batches = self._batches(self._next_rows())
        self._train_step(batches, Told(), self.options.seed, update=False)
        self.parts.sampler.restore(before)

    def _one_step(self, signals: StopSignals) -> tuple[dict[str, Any], str]:
        """Does an optimiser step; returns its record, and why all processes stop, or nothing."""
        if self.step <= 1:  # after the first measurement, and what a first step compiles
            self._clock.begin()
        rows = self._next_rows()
        early = self._leads and self._selection.is_over  # the others do not measure
        share = self._clock.share(self.step + 1) if self._leads else 0.0
        due = self._leads and self._measurement_due(self.step + 1, share)
        told = Told(signals.received is not None, early, share, due)
        seed = self.options.seed * 2**32 + self.step
        found = self._train_step(self._batches(rows), told, seed)
        self._share, self._is_due = found.told.share, found.told.due > 0
        if not found.updated:
            self._note_bad(found, rows)
        self.step += 1
        self._guard.check(str(self.parts.folder / "bad_batches.jsonl"))
        reason = "signal" if found.told.stopped else "early" if found.told.early else ""
        return {"step": self.step, **found.record}, reason

    def _next_rows(self) -> list[tuple[int, ...]]:
        options = self.options
        count = options.batch_rows * options.accumulate * self._train_step.processes
        return self.parts.sampler.next_rows(count)

    def _batches(self, rows: list[tuple[int, ...]]) -> list[TokenBatch]:
        """This process's part of a global batch."""
        rank, processes = self._train_step.rank, self._train_step.processes
        return [
            collate(own, self.parts.examples, self.parts.max_length, _WIDTHS)
            for own in own_batches(rows, self.options.batch_rows, rank, processes)
        ]

    # What is written down.

    def _write(self, record: dict[str, Any], seconds: float, progress: Progress) -> None:
        record["seconds"] = round(seconds, 4)
        record["tokens_per_second"] = round(record["tokens"] / seconds, 1)
        record["memory_gb"] = round(memory_gb(self._train_step.device), 3)
        if self._log is not None:
            self._log.write(record)
        progress.advance()
        if self.step % self.options.log_every == 0:
            progress.show(record)
            progress.event(self.step, record, "train")

    def _note_bad(self, found: StepResult, rows: list[tuple[int, ...]]) -> None:
        if not self._leads:
            return
        figures = {name: str(found.record[name]) for name in ("loss", "grad_norm")}
        line = {"step": self.step + 1, "examples": rows, **figures}
        with (self.parts.folder / "bad_batches.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    # Measurements and checkpoints.

    def _measurement_due(self, step: int, share: float) -> bool:
        """Whether to measure after `step` steps; only the leading process knows."""
        every = self.options.eval_every
        if every is None and self._steps is not None:
            every = -(-self._steps // _MEASUREMENTS)
        return share >= self._next_measurement if every is None else step % max(every, 1) == 0

    def _measure_if_due(self, progress: Progress, at_end: bool = False) -> None:
        if self.parts.meter is None or self._measured_at == self.step:
            return
        if self._steps is None and at_end and self.step - self._measured_at <= self.step // 50:
            return  # by the clock, the run ended with the last measurement
        if not (self._is_due or at_end or self.step == 0):
            return
        self._measured_at = self.step
        if self._leads:
            self._measure(self.parts.meter, progress)
        self._accelerator.wait_for_everyone()

    def _measure(self, meter: AcceptanceMeter, progress: Progress) -> None:
        begin = time.monotonic()
        new = self.step == 0 and self.options.init_from is None
        found = meter.measure(self._head, self.step, brief=new)
        seconds = self._clock.reserve = time.monotonic() - begin
        if self.options.minutes is not None:
            least = seconds / (_MOST_MEASURING * 60 * self.options.minutes)
            self._next_measurement = self._share + max(1 / _MEASUREMENTS, least)
        if not self._baselines:
            self._baselines = {
                "prompt_lookup_t0": meter.prompt_lookup(),
                "looping_share": meter.looping_share(),
            }
        if self._selection.add(found):
            self.parts.save_head(found)
        write_metrics(self.parts.folder / "metrics.json", self._selection.history, self._baselines)
        figures = ", ".join(
            f"{mode} {value:.2f}" for mode, value in found.acceptance_length.items()
        )
        progress.note(f"step {self.step}: acceptance length {figures}")
        progress.event(self.step, found.acceptance_length, "acceptance_length")

    def _save_if_due(self, at_end: bool) -> None:
        every = self.options.save_every
        if every is not None:
            due = self.step % every == 0
        elif self.parts.meter is not None:
            due = self._measured_at == self.step
        else:
            due = self._share >= self._next_measurement
            if due:
                self._next_measurement = self._share + 1 / _MEASUREMENTS
        if due or at_end:
            self._save()

    def _save(self) -> None:
        if self._saved_at == self.step:
            return
        head, optimizer = self._train_step.stepper.tensors()  # all processes take part
        if self._leads:
            plain, generators = random_state()
            state = {
                "options": self.options.to_json(),
                "facts": self.parts.facts,
                "processes": self._train_step.processes,
                "sampler": self.parts.sampler.state(),
                "seconds": self._clock.elapsed,
                "begun": self._clock.begun,
                "share": self._share,
                "next_measurement": self._next_measurement,
                "reserve": self._clock.reserve,
                "measured_at": self._measured_at,
                "is_due": self._is_due,
                "log_bytes": 0 if self._log is None else self._log.size,
                "skipped": [self._guard.skipped, self._guard.in_a_row],
                "history": self._selection.state(),
                "baselines": self._baselines,
                "random": plain,
            }
            tensors = {
                "head": head,
                "optimizer": optimizer,
                "random": {**generators, "acceptance": self._train_step.acceptance},
            }
            self._store.save(self.step, tensors, state)
            note_saved(self.parts.folder, self.step)
        self._saved_at = self.step
        self._accelerator.wait_for_everyone()

    def _resume(self, found: Checkpoint) -> int:
        """Goes back to a checkpoint; the bytes of the log that belong to it."""
        try:
            return self._take_up(found, found.state)
        except (KeyError, TypeError, AttributeError) as problem:
            raise ConfigError(
                f"{found.folder} does not hold what this release saves: {type(problem).__name__} "
                f"{problem}; choose another --output"
            ) from problem

    def _take_up(self, found: Checkpoint, state: dict[str, Any]) -> int:
        differing = self.options.differences(state["options"])
        for name, value in {**self.parts.facts, "processes": self._train_step.processes}.items():
            before = state["processes"] if name == "processes" else state["facts"].get(name)
            if before != value:
                differing.append(f"{name}: {before} before, {value} now")
        if differing:
            raise ConfigError(
                f"{self.parts.folder} holds a run with other options; repeat them, or choose "
                f"another --output. Different: {'; '.join(differing)}"
            )
        self._is_due = bool(state["is_due"])
        self._train_step.stepper.load(found.tensors("head"), found.tensors("optimizer"))
        generators = found.tensors("random")
        self._train_step.acceptance = generators.pop("acceptance").to(self._train_step.device)
        restore_random_state(state["random"], generators)
        self.parts.sampler.restore(state["sampler"])
        self.step = self._saved_at = found.step
        self._share, self._measured_at = state["share"], state["measured_at"]
        self._next_measurement = state["next_measurement"]
        self._guard.skipped, self._guard.in_a_row = state["skipped"]
        self._selection.restore(state["history"])
        self._baselines = state["baselines"]
        times = state["seconds"], state.get("begun", 0.0)
        self._clock = Clock(self._steps, self.options.minutes, *times)
        self._clock.reserve = state["reserve"]
        return int(state["log_bytes"])
