"""What lies in the folder of a run: looked at before anything is written there."""

from __future__ import annotations

import json
from pathlib import Path

from specdec.errors import ConfigError

OWN_FILES = frozenset(
    {
        "run.lock", "provenance.json", "log.jsonl", "metrics.json", "bad_batches.jsonl", "head",
        "checkpoints", "tensorboard",
    }
)  # fmt: skip
"""Names that a run gives."""

_AGAIN = "choose another --output, or delete the folder to start again"


def check_run_folder(folder: Path) -> None:
    """Refuses a folder that holds something else.

    Raises:
        ConfigError: It is the current one, no folder, or not that of a run.
    """
    if folder in (Path(), Path.cwd()):
        raise ConfigError("--output is the current folder; give the run a folder of its own")
    try:
        if not folder.is_dir():
            if folder.exists() or folder.is_symlink():
                raise ConfigError(f"--output {str(folder)!r} is no folder; name a new one")
            return
        names = {path.name for path in folder.iterdir()}
    except OSError as problem:
        raise ConfigError(f"cannot look into --output {str(folder)!r}: {problem}") from problem
    others = sorted(name for name in names - OWN_FILES if not name.startswith("."))
    if others and "provenance.json" not in names:
        raise ConfigError(
            f"--output {str(folder)!r} holds other things ({others[0]!r:.80}); name a new folder"
        )


def refuse_lost_run(folder: Path, damaged: bool) -> None:
    """For a folder without a usable checkpoint: refuses to write over a run that had got further.

    A run that was killed before its first checkpoint has measured nothing but its beginning, and
    may start again.

    Args:
        folder: Of the run.
        damaged: Whether there are checkpoints that cannot be used.

    Raises:
        ConfigError: The measurements, the head or the log are of a later step, or not of a run.
    """
    metrics, head = folder / "metrics.json", folder / "head"
    if damaged or _last_measured(metrics) != 0 or _head_step(head) != 0:
        raise ConfigError(
            f"{folder} holds a run, and no checkpoint of it can be used; restore one, or {_AGAIN}"
        )
    log = folder / "log.jsonl"
    if log.exists() and not _is_log(log):
        raise ConfigError(f"{log} is not the log of a run; {_AGAIN}")


def _last_measured(path: Path) -> int | None:
    """Step of the last measurement; 0 where there is none, None when the file is not as written."""
    if not path.exists():
        return 0
    try:
        steps = [found["step"] for found in json.loads(path.read_bytes())["history"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return max(steps, default=0) if all(type(step) is int for step in steps) else None


def _head_step(folder: Path) -> int | None:
    """Step at which the head was kept; 0 where there is none, None when it does not say."""
    if not folder.exists():
        return 0
    try:
        step = json.loads((folder / "specdec_config.json").read_bytes())["facts"]["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def _is_log(path: Path) -> bool:
    """Whether a file is empty or begins like a log."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return False
    return not start or start.startswith(b'{"step": ')
