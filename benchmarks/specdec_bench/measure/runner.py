"""`run`: from options to a result file, setting by setting."""

from __future__ import annotations

import itertools
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.api import augment, capability
from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL
from specdec.cost.curve import CurveMeter
from specdec.errors import ConfigError
from specdec.heads.checkpoints.load import locate_head
from specdec.hf.compat import input_device
from specdec.loading import TOY, check_model, load_config, load_tokenizer
from specdec_bench.arm_names import AGAIN, BASELINE, SERVER, ArmSpec, parse_arm
from specdec_bench.contracts import Arm, Unit, Workbench
from specdec_bench.default_arms import ARMS, SMOKE_ARMS
from specdec_bench.measure.arms import fill_stores, make_arm
from specdec_bench.measure.global_state import as_before
from specdec_bench.measure.loaded import (
    Loaded,
    clear_generation_config,
    drafts_of,
    head_of,
    torch_threads,
)
from specdec_bench.measure.measuring import EnergyMeter
from specdec_bench.measure.options import DTYPES, RunOptions, check_run_options
from specdec_bench.measure.sampling_run import sampling_records
from specdec_bench.measure.schedule import Stopping
from specdec_bench.measure.setting_run import Progress, SettingRun, not_promised
from specdec_bench.measure.units import Maker
from specdec_bench.results.files import RecordWriter, check_output, read_results
from specdec_bench.results.provenance import provenance, weights_hash
from specdec_bench.results.records import NOT_PROMISED, PLAIN, Header, Record, Results, Setting
from specdec_bench.tasks import Prompt, load_tasks

__all__ = ["ArmMaker", "clear_generation_config", "default_arms", "run", "settings_of"]

ArmMaker = Callable[[Workbench], Arm]
"""Makes an arm of one's own for a setting."""

_HALF = ("bfloat16", "float16")  # judged with a copy of the model in fp64


def run(
    options: RunOptions,
    extra_arms: Mapping[str, ArmMaker] | None = None,
    on_start: Callable[[int, str], Progress] | None = None,
) -> Results:
    """Measures, and writes the result file.

    Args:
        options: What to measure.
        extra_arms: Arms of one's own, by name; besides `Arm` they may have `promises_text` (False
            where the text may differ from plain's; their makers then have it, too),
            `instrumented(unit) -> PassRecord`, and `seconds`, what their newest answer took, where
            they know better than our clock.
        on_start: Called with the number of steps and a title; returns what is told about each.

    Returns:
        What the file holds, of all starts of a resumed run.

    Raises:
        SpecdecError: An option, the model, the prompts or the file is wrong.
    """
    check_run_options(options)
    with as_before():
        return _Run(options, dict(extra_arms or {}), on_start).all()


def default_arms(options: RunOptions) -> tuple[str, ...]:
    """What is measured when no arms are named; without the baseline."""
    here = {None, *drafts_of(options, None)}
    arms = SMOKE_ARMS if options.is_smoke else ARMS
    return tuple(arm for arm in arms if parse_arm(arm).draft_kind in here)


def settings_of(options: RunOptions) -> list[Setting]:
    """All combinations of the sweeps, dtype by dtype, so that each is loaded once."""
    dtypes = options.dtypes or (_own_dtype(options.target),)
    return [
        Setting(*combination)
        for combination in itertools.product(
            dtypes,
            options.batches or (1,),
            options.temperatures or (0.0,),
            options.prompt_tokens or (None,),
        )
    ]


def _own_dtype(target: str) -> str:
    if target == TOY:
        return "float32"  # where identical text is a promise; the file holds bfloat16
    found = str(getattr(load_config(target), "dtype", None) or "float32").removeprefix("torch.")
    if found not in DTYPES:
        raise ConfigError(f"{target!r} has dtype {found}; choose with --dtypes")
    return found


@dataclass
class _Run:
    options: RunOptions
    extra_arms: dict[str, ArmMaker]
    on_start: Callable[[int, str], Progress] | None
    specs: list[ArmSpec] = field(init=False)
    prompts: list[Prompt] = field(init=False)
    tokenizer: Any = field(init=False)

    def all(self) -> Results:
        """Everything; the options were checked."""
        options, start = self.options, time.perf_counter()
        check_output(options.output_path, options.resume, options.overwrite)
        check_model(options.target)
        self.specs = [ArmSpec(BASELINE, "none"), ArmSpec(AGAIN, "none"), *self._wanted()]
        self._check_arms()
        self.prompts = load_tasks(options.task_list, options.data, options.limit, options.seed)
        self.tokenizer = load_tokenizer(options.target)
        settings = settings_of(options)
        with (
            torch_threads(options.device, options.threads),
            tempfile.TemporaryDirectory() as folder,
        ):
            model = Loaded(options, settings[0].dtype)
            header = self._header(settings, model.model)
            with RecordWriter(
                options.output_path, header, options.resume, options.overwrite
            ) as writer:
                reasons = []
                for index, setting in enumerate(settings):
                    if setting.dtype != model.dtype:
                        model.close()  # before the next one: never two at a time
                        model = Loaded(options, setting.dtype)
                    stores = Path(folder) / str(index)
                    budget = _Budget(options.time_budget, len(settings) - index, start)
                    reasons.append(self._setting(index, setting, model, writer, stores, budget))
                before = _seconds_before(writer.before)
                writer.finish(_overall(reasons), time.perf_counter() - start + before)
        return read_results(options.output_path)

    def _wanted(self) -> list[ArmSpec]:
        """The arms that were asked for, and plain `generate`, which users compare with."""
        specs = map(parse_arm, self.options.arms or default_arms(self.options))
        wanted = [spec for spec in specs if spec.method != "none"]
        if PLAIN not in {spec.method for spec in wanted} | self.extra_arms.keys():
            wanted.insert(0, ArmSpec(PLAIN, PLAIN))
        return wanted

    def _check_arms(self) -> None:
        names = [*(spec.name for spec in self.specs), *self.extra_arms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"--arms names {twice!r} twice")
        bench = Workbench(None, None, Setting(), drafts_of(self.options, None))
        servers = [spec.name for spec in self.specs if spec.method == SERVER]
        if servers and any(self.options.temperatures):
            raise ConfigError(
                f"arm {servers[0]!r} answers greedily only: a server's random numbers are its own; "
                "leave out --temperatures above 0, or measure it in a run of its own"
            )
        for spec in self.specs:
            bench.check_draft(spec)
        needed = {spec.draft_kind for spec in self.specs if spec.needs_draft}
        if self.options.head is not None and DRAFT_HEAD in needed:
            locate_head(self.options.head)  # now, and not as the error of an arm at the end
        if self.options.draft is not None and DRAFT_MODEL in needed:
            check_model(self.options.draft)

    def _header(self, settings: Sequence[Setting], model: Any) -> Header:
        options = self.options
        chat = any(prompt.chat for prompt in self.prompts)
        template = bool(self.tokenizer.chat_template)
        return Header(
            run_id=uuid.uuid4().hex,
            settings=settings,
            arms=[*(spec.name for spec in self.specs), *self.extra_arms],
            baseline=BASELINE,
            config={**options.to_json(), "tasks": list(options.task_list)},
            provenance=provenance(
                model,
                self.prompts,
                target=options.target,
                tasks=list(options.task_list),
                max_new_tokens=options.new_tokens,
                chat_template=(template if chat else None),
                energy=EnergyMeter(input_device(model)).source,
                pairs=options.most_pairs,
                until_ci=options.until_ci,
                time_budget=options.time_budget,
                text_check=not options.no_text_check,
                head_sha256=weights_hash(head_of(options)),
                draft_sha256=weights_hash(options.draft),
                servers=self._servers(model, settings[0]),
                **{NOT_PROMISED: not_promised(settings, self.specs, self.extra_arms)},
            ),
        )

    def _servers(self, model: Any, setting: Setting) -> dict[str, dict[str, str]]:
        """What is known of the engines behind the server arms, by arm."""
        bench = Workbench(model, self.tokenizer, setting)
        arms = [make_arm(spec, bench) for spec in self.specs if spec.method == SERVER]
        return {arm.name: getattr(arm, "facts", {}) for arm in arms}

    def _setting(
        self,
        index: int,
        setting: Setting,
        model: Loaded,
        writer: RecordWriter,
        stores: Path,
        budget: _Budget,
    ) -> str:
        """One setting; returns why its timing ended."""
        options = self.options
        bench = Workbench(model.model, self.tokenizer, setting, model.drafts, stores)
        reference = None if options.no_text_check else model.reference
        if reference is not None and setting.dtype in _HALF:
            reference.of(model.model)  # what cannot be checked is better known before than after
        arms = [make_arm(spec, bench) for spec in self.specs]
        arms += [_named(name, make(bench)) for name, make in self.extra_arms.items()]
        units = self._units(index, bench, model.ends, writer)
        if any(spec.store for spec in self.specs):
            fill_stores(bench, units)
        if options.check_sampling and _is_first(setting, writer.header.settings, index):
            self._sampling(index, bench, units, arms, writer)
        rounds = options.most_pairs
        progress = None
        if self.on_start is not None:
            progress = self.on_start(len(units) * len(arms) * (1 + rounds), str(setting))
        measured = SettingRun(bench, arms, units, writer, reference, progress)
        measured.prepare(self._curve(bench, units, writer))  # gone before anything is timed
        reason = measured.time(Stopping(rounds, budget.left(str(setting)), options.until_ci))
        if any(spec.store for spec in self.specs):
            augment(model.model, "none")  # lets go of the stores that drafters have opened
        return reason

    def _units(
        self, index: int, bench: Workbench, ends: frozenset[int], writer: RecordWriter
    ) -> list[Unit]:
        """The units; those that the file has already must be the same."""
        options, setting = self.options, bench.setting
        maker = Maker(
            bench.model,
            self.tokenizer,
            setting,
            bench.sampling(),
            options.new_tokens,
            ends,
            options.seed,
        )
        progress = None
        if self.on_start is not None:
            turns = sum(len(prompt.turns) for prompt in self.prompts)
            grouped = turns // setting.batch if setting.batch > 1 else 0
            progress = self.on_start(turns + grouped, f"{setting}: plain's texts")
        tick: Callable[[], object] = (lambda: None) if progress is None else progress.update
        units, skipped = maker.make(index, self.prompts, tick)
        if not units:
            raise ConfigError(
                f"no prompt is left to measure in setting {setting}: of {skipped.asked} texts "
                f"{skipped.short} end or loop before the 16th token, and {skipped.ungrouped} fill "
                "no batch; take other prompts, a longer --max-new-tokens or a smaller --batches"
            )
        if setting.prompt_tokens is not None and not skipped.shortened:
            warnings.warn(
                f"--prompt-tokens {setting.prompt_tokens} shortens no prompt: this setting measures"
                " the same as one without it",
                stacklevel=2,
            )
        known = {} if writer.before is None else writer.before.units
        new: list[Record] = []
        for unit in units:
            old = known.get((index, unit.record.unit))
            if old is None:
                new.append(unit.record)
            elif old != unit.record:
                raise ConfigError(
                    f"{options.output_path}: unit {unit.record.unit!r} has another text than "
                    "before the run was stopped, so its times cannot be joined; this device "
                    "computes differently each time, or has changed. Use --overwrite"
                )
        if writer.before is None or index not in writer.before.skipped:
            new.append(skipped)
        writer.append(*new)
        return units

    def _curve(
        self, bench: Workbench, units: Sequence[Unit], writer: RecordWriter
    ) -> CurveMeter | None:
        """Measures t(q) beside the units, where that was not done before."""
        setting = bench.setting
        done = self.curves if writer.before is None else {*self.curves, *writer.before.curves}
        key = (setting.dtype, setting.batch, setting.prompt_tokens or 0)
        found = capability(bench.model)
        if key in done or found.mode != "tree":
            return None
        self.curves.add(key)
        lengths = [
            length + unit.record.new_tokens // 2
            for unit in units
            for length in unit.record.prompt_tokens
        ]
        prefix = sum(lengths) // len(lengths)
        return CurveMeter(bench.model, setting.batch, prefix, found.backend)

    def _sampling(
        self,
        index: int,
        bench: Workbench,
        units: Sequence[Unit],
        arms: Sequence[Arm],
        writer: RecordWriter,
    ) -> None:
        known = set()
        if writer.before is not None:
            known = {record.arm for record in writer.before.sampling if record.setting == index}
        writer.append(*sampling_records(index, bench, units, arms, known, self.options.seed))

    curves: set[tuple[str, int, int]] = field(default_factory=set, init=False)


def _named(name: str, arm: Arm) -> Arm:
    if arm.name != name:
        raise ConfigError(f"the extra arm {name!r} calls itself {arm.name!r}; give one name")
    return arm


def _is_first(setting: Setting, settings: Sequence[Setting], index: int) -> bool:
    """Whether no earlier setting has the dtype."""
    return all(earlier.dtype != setting.dtype for earlier in settings[:index])


class _Budget:
    """What a setting may take of `--time-budget`, preparation included.

    Args:
        seconds: Of the whole run; 0 for no limit.
        settings: That are still to be measured, this one included.
        start: When the run began.
    """

    def __init__(self, seconds: float, settings: int, start: float) -> None:
        self._seconds, self._settings, self._start = seconds, settings, start
        self._begun = time.perf_counter()

    def left(self, setting: str) -> float:
        """Seconds to time for, now that the setting is prepared; 0 for no limit.

        The settings behind it are taken to need as long a preparation. Warns when none are left.
        """
        if not self._seconds:
            return 0.0
        now = time.perf_counter()
        later = (now - self._begun) * (self._settings - 1)
        left = (self._seconds - (now - self._start) - later) / self._settings
        if left <= 0:
            warnings.warn(
                f"{setting}: --time-budget {self._seconds:g} is spent on preparation "
                f"({now - self._start:.0f} s so far); every arm is timed once, and no more",
                stacklevel=2,
            )
        return max(left, 1e-9)


def _seconds_before(before: Results | None) -> float:
    """Seconds of the answers that earlier starts recorded; what else they did left no clock."""
    if before is None:
        return 0.0
    return sum(t.wall for t in before.times) + sum(p.seconds for p in before.passes.values())


def _overall(reasons: Sequence[str]) -> str:
    """Why the run ended: the reason that cut most short."""
    return min(reasons, key=("time-budget", "pairs", "until-ci").index)
