"""What lies in the folder of a run: looked at before anything is written there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from specdec.artifacts.atomic_files import replace_file, to_json
from specdec.artifacts.run_lock import LOCKS
from specdec.errors import ConfigError
from specdec_training.run.evaluate import Acceptance, Selection
from specdec_training.run.progress import write_metrics

_SAVED = "saved.json"
OWN_FILES = frozenset(
    {
        *LOCKS, "provenance.json", "log.jsonl", "metrics.json", "bad_batches.jsonl", "head",
        "checkpoints", "tensorboard", _SAVED,
    }
)  # fmt: skip
"""Names that a run gives."""

_AGAIN = "choose another --output, or delete the folder to start again"


def check_run_folder(folder: Path) -> None:
    """Refuses a folder that holds something else.

    Raises:
        ConfigError: It is no folder, not that of a run, or the current one.
    """
    try:
        if not folder.is_dir():
            if folder.exists() or folder.is_symlink():
                raise ConfigError(f"--output {str(folder)!r} is no folder; name a new one")
            return
        names = {path.name for path in folder.iterdir()}
        is_here = folder.resolve() == Path.cwd()
    except OSError as problem:
        raise ConfigError(f"cannot look into --output {str(folder)!r}: {problem}") from problem
    if "provenance.json" in names:
        return
    if is_here:
        raise ConfigError("--output is the current folder; give the run a folder of its own")
    others = sorted(name for name in names - OWN_FILES if not name.startswith("."))
    if others:
        raise ConfigError(
            f"--output {str(folder)!r} holds other things ({others[0]!r:.80}); name a new folder"
        )


def note_saved(folder: Path, step: int) -> None:
    """Writes down, outside of the checkpoints, that there is one.

    Args:
        step: Of the newest checkpoint.
    """
    replace_file(folder / _SAVED, to_json({"step": step}, _SAVED) + b"\n")


def refuse_lost_run(folder: Path, damaged: bool) -> None:
    """For a folder without a usable checkpoint: refuses to write over a run that had one.

    A run that was killed before its first checkpoint may start again.

    Args:
        damaged: Whether there are checkpoints that cannot be used.

    Raises:
        ConfigError: There were checkpoints, or the log is not that of a run.
    """
    if damaged or (folder / _SAVED).exists():
        raise ConfigError(
            f"{folder} holds a run, and no checkpoint of it can be used; restore one, or {_AGAIN}"
        )
    log = folder / "log.jsonl"
    if log.exists() and not _is_log(log):
        raise ConfigError(f"{log} is not the log of a run; {_AGAIN}")


def restore_results(
    folder: Path,
    step: int,
    selection: Selection,
    baselines: Mapping[str, Any],
    save_head: Callable[[Acceptance | None], None],
) -> None:
    """Makes the results of a resumed run again when they were deleted, as far as that can be done.

    Args:
        step: At which it goes on.
        selection: What the resumed checkpoint knew of earlier measurements.
        baselines: What they are compared with.
        save_head: Writes the head that is being trained.
    """
    best, head = selection.best, folder / "head"
    if best is None:
        return
    if not (folder / "metrics.json").exists():
        write_metrics(folder / "metrics.json", selection.history, baselines)
    for aside in sorted(folder.glob(".head.*.old")):  # killed between two names
        if not head.exists():
            aside.rename(head)
    if not head.is_dir():
        save_head(best if best.step == step else None)
        warnings.warn(
            f"{head}, the head of step {best.step}, was gone; it is now that of step {step}",
            stacklevel=2,
        )


def _is_log(path: Path) -> bool:
    """Whether a file is empty or begins like a log."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return False
    return not start or start.startswith(b'{"step": ')
