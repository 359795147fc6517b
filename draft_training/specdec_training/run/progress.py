"""What a run shows and writes down: progress bar, step log, TensorBoard, the table at the end."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from specdec.artifacts.atomic_files import replace_file
from specdec.artifacts.terminal import bold, columns, dim
from specdec.errors import ConfigError
from specdec_training.run.evaluate import Acceptance

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"
MODES = ("chain_t0", "tree_t0", "chain_t1", "tree_t1")
"""Measured ways to draft, in the order of tables."""


class StepLog:
    """A file with one JSON line for every step; a resumed run cuts it where its checkpoint stood.

    Args:
        size: Bytes that are kept of it.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._stream = path.open("a+b")
        if self._stream.tell() < size:  # it has lost its end, perhaps in the middle of a line
            self._stream.seek(0)
            size = self._stream.read().rfind(b"\n") + 1
            warnings.warn(
                f"{path} is shorter than when the checkpoint was written; steps are missing in it",
                stacklevel=2,
            )
        self._stream.truncate(size)
        self._stream.seek(size)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        self._stream.flush()
        return self._stream.tell()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a line."""
        self._stream.write(json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class Progress:
    """The progress bar; silent in processes that do not lead.

    Args:
        total: Steps, or None when the clock decides.
        done: Steps of earlier sessions.
        leads: Whether this process speaks.
        events: Folder for TensorBoard, or None.

    Raises:
        ConfigError: TensorBoard was asked for and is not installed.
    """

    def __init__(self, total: int | None, done: int, leads: bool, events: Path | None) -> None:
        self._writer = _writer(events) if events is not None and leads else None
        self._bar = tqdm(
            total=total, initial=done, disable=not leads, desc="training", unit="step",
            dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def advance(self) -> None:
        """Counts a step."""
        self._bar.update(1)

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows the newest step beside the bar."""
        accuracy = "/".join(f"{value:.2f}" for value in record["accuracy"])
        self._bar.set_postfix_str(
            f"loss {record['loss']:.3f}, accuracy {accuracy}, {record['tokens_per_second']:,.0f} "
            f"tokens/s, {record['memory_gb']:.2f} GB",
            refresh=False,
        )

    def note(self, text: str) -> None:
        """Writes a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def event(self, step: int, values: Mapping[str, Any], group: str) -> None:
        """Hands numbers to TensorBoard, if it is on."""
        if self._writer is None:
            return
        for name, value in values.items():
            parts = value if isinstance(value, list) else [value]
            for number, part in enumerate(parts):
                label = f"{group}/{name}" + (f"_{number}" if isinstance(value, list) else "")
                if isinstance(part, int | float):
                    self._writer.add_scalar(label, part, step)


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as problem:
        raise ConfigError(
            "--tensorboard needs the package tensorboard: pip install tensorboard"
        ) from problem
    return SummaryWriter(str(folder))


def memory_gb(device: torch.device) -> float:
    """Largest memory used so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def write_metrics(path: Path, history: Sequence[Acceptance], baselines: Mapping[str, Any]) -> None:
    """Writes `metrics.json`: the best measurement, what it is compared with, and all of them."""
    best = max(history, key=lambda found: found.score)
    content = {
        "acceptance_length": dict(best.acceptance_length),
        "step": best.step,
        "text_identical": all(found.text_identical for found in history),
        **baselines,
        "history": [
            {"step": found.step, **found.acceptance_length, "text_identical": found.text_identical}
            for found in history
        ],
    }
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def summary(history: Sequence[Acceptance], baselines: Mapping[str, Any], colour: bool) -> list[str]:
    """Lines of the table at the end of a run: acceptance length at the start, best, at the end."""
    if not history:
        return ["no measurement of the acceptance length was made"]
    best = max(history, key=lambda found: found.score)
    named = [("start", history[0]), ("best", best), ("end", history[-1])]
    rows: list[tuple[str, ...]] = [
        ("acceptance length", "step", "chain", "tree", "chain T=1", "tree T=1")
    ]
    for name, found in named:
        figures = [f"{found.acceptance_length[mode]:.2f}" for mode in MODES]
        rows.append((name, str(found.step), *figures))
    lookup = baselines.get("prompt_lookup_t0")
    if lookup is not None:
        rows.append(("prompt lookup", "", f"{lookup:.2f}", "", "", ""))
    lines = columns(rows)
    lines[0] = bold(lines[0], colour)
    if colour:
        lines[2] = f"{_GREEN}{lines[2]}{_RESET}"
    same = all(found.text_identical for found in history)
    lines.append(
        dim("every text was that of plain generate", colour)
        if same
        else bold("some text differed from plain generate", colour)
    )
    return lines
