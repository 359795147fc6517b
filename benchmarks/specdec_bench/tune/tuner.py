"""`tune`: from a target and prompts to the method and sizes that pay here, or to none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from specdec.api import capability
from specdec.artifacts.atomic_files import make_folder
from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL, Kind, locate
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.cost.tuned_file import TunedFile, conditions, write_tuned
from specdec.errors import ConfigError, SpecdecError
from specdec.loading import check_model, load_tokenizer
from specdec.registry import methods
from specdec_bench.contracts import Unit, Workbench
from specdec_bench.measure.loaded import Loaded, head_of, is_on_cpu, torch_threads
from specdec_bench.measure.options import RunOptions
from specdec_bench.measure.units import Maker
from specdec_bench.results.provenance import provenance
from specdec_bench.results.records import Setting
from specdec_bench.tasks import Prompt, load_tasks
from specdec_bench.tune.grid import Grid
from specdec_bench.tune.options import TuneOptions
from specdec_bench.tune.search import Search


def tune(options: TuneOptions, say: Callable[[str], object] = lambda _: None) -> dict[int, Search]:
    """Tunes, and writes the file.

    Args:
        options: Target, methods, prompts and where to.
        say: Told what goes on, a line at a time.

    Returns:
        How the choices were found, by batch size.

    Raises:
        SpecdecError: An option, the model, the prompts or the file is wrong.
    """
    options.check()
    grids = grids_of(options)
    check_model(options.target)
    _make_room(options.where)
    tasks = options.tasks or ("smoke",)
    prompts = load_tasks(tasks, options.data, options.limit, options.seed)
    with torch_threads(options.device, options.threads):
        loaded = Loaded(_as_run(options), options.dtype)
        model, tokenizer = loaded.model, load_tokenizer(options.target)
        if capability(model).mode == "plain":
            raise SpecdecError(
                f"{options.target} cannot be sped up: {capability(model).reason}; nothing to tune"
            )
        dtype, searches = str(model.dtype).removeprefix("torch."), {}
        for batch in options.batches or (1,):
            bench = Workbench(model, tokenizer, Setting(dtype, batch))
            units = _units(bench, loaded.ends, prompts, options.max_new_tokens)
            searches[batch] = Search(bench, units, grids, options.seed, say)
            searches[batch].run(options.candidates)
        facts = provenance(
            model, prompts, target=options.target, tasks=list(tasks),
            max_new_tokens=options.max_new_tokens,
        )  # fmt: skip
        tuned = TunedFile(
            target=TargetFingerprint.of(model.config, tokenizer),
            choices={batch: search.choice for batch, search in searches.items()},
            details={
                "provenance": facts,
                "methods": list(grids),
                "batches": {
                    str(batch): {
                        "candidates": list(search.table().values()),
                        "skipped": search.skipped,
                        "failed": search.failed,
                        "seconds": search.seconds,
                    }
                    for batch, search in searches.items()
                },
            },
            **conditions(model),
        )
    write_tuned(options.where, tuned)
    return searches


def grids_of(options: TuneOptions) -> dict[str, Grid]:
    """What to choose from: the methods that were named, or all that declare sizes and can run.

    Raises:
        ConfigError: One that was named has no sizes, or no draft.
    """
    drafts, found, on_cpu = _drafts(options), {}, is_on_cpu(options.device)
    for method in options.named or _that_load():
        kind = methods.draft_kind(method)
        grid = Grid(method, None if kind is None else drafts.get(kind), on_cpu)
        if not grid.missing:
            found[method] = grid
        elif options.named:
            raise ConfigError(f"nothing to tune in method {method!r}: {grid.missing}")
    return found


def _that_load() -> list[str]:
    """All methods but those of installed packages that are broken."""
    found = []
    for method in methods.names():
        with suppress(ConfigError):
            methods.load(method)
            found.append(method)
    return found


def located(name: str, kind: Kind) -> str:
    """A folder by its whole path, so that the file can be used from elsewhere; hub ids stay."""
    place = locate(name, kind)
    return str(Path(place.name).resolve()) if place.is_folder else place.name


def _drafts(options: TuneOptions) -> dict[Kind, str]:
    """Folders or hub ids of drafts, which the file will name."""
    named = {DRAFT_HEAD: head_of(_as_run(options)), DRAFT_MODEL: options.draft}
    return {kind: located(name, kind) for kind, name in named.items() if name is not None}


def _as_run(options: TuneOptions) -> RunOptions:
    """What `bench run` would be told about models."""
    return RunOptions(
        target=options.target, head=options.head, draft=options.draft, device=options.device
    )


def _units(
    bench: Workbench, ends: frozenset[int], prompts: Sequence[Prompt], new_tokens: int
) -> list[Unit]:
    maker = Maker(bench.model, bench.tokenizer, bench.setting, bench.sampling(), new_tokens, ends,
                  only_counted=True)  # fmt: skip
    units, left_out = maker.make(0, prompts)
    if len(units) < 2:
        raise ConfigError(
            f"tuning for batch {bench.setting.batch} needs two batches of prompts with texts of 16 "
            f"tokens, and has {len(units)} ({left_out.short} texts were too short); take "
            "other prompts, a larger --limit or --max-new-tokens"
        )
    return units


def _make_room(output: Path) -> None:
    """Makes the file's folder: what cannot be written is better known before than after."""
    try:
        make_folder(output.parent)
    except OSError as problem:
        raise ConfigError(f"cannot write --output {output}: {problem.strerror}") from problem
