"""What `specdec bench tune` can be told: one frozen dataclass.

Field docstrings are the help texts. Imports nothing heavy, so that the help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from specdec.artifacts.arguments import Flag, N, arg, check_numbers, check_repeats, each
from specdec.errors import ConfigError
from specdec_bench.output_files import check_replaceable

_LEAST = {
    "limit": 1, "max_new_tokens": 16, "candidates": 1, "seed": 0, "threads": 1, "batches": 1,
}  # fmt: skip
_MOST = {"threads": 1024, "candidates": 100, "batches": 4096}


@dataclass(frozen=True)
class TuneOptions:
    """Choose method and sizes for a target on this device; `augment(model, tuned=...)` reads it."""

    target: Annotated[str, arg("NAME", "the bundled toy")] = "demo"
    """Folder or hub id of the target; demo is the bundled toy."""
    methods: Annotated[str | None, arg("NAMES", "all that need no draft, or have one here")] = None
    """Methods to choose from, with commas; one of your own is module:Class."""
    head: Annotated[str | None, arg("HEAD", "the bundled one, for demo")] = None
    """Draft head, for methods with one: a folder, a hub id, or demo: the bundled one."""
    draft: Annotated[str | None, arg("NAME", "none")] = None
    """Draft model, for methods with one: a folder, a hub id, or demo: the bundled toy."""
    output: Annotated[Path | None, arg("FILE", "required")] = None
    """File of the choice."""
    overwrite: Flag = False
    """Replace that file."""

    tasks: Annotated[tuple[str, ...], *each("TASK", "smoke")] = ()
    """Prompts like those that you will have: smoke, spec_bench, mt_bench, humaneval, gsm8k, a JSONL
    file, or a folder."""
    data: Annotated[Path | None, arg("FOLDER")] = None
    """Where the named files lie."""
    limit: Annotated[int, N] = 12
    """Prompts in all, balanced over categories."""
    max_new_tokens: Annotated[int, N] = 96
    """New tokens of a prompt, at most; less where plain's text ends or begins to loop."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    """Arithmetic of the target; auto takes the checkpoint's own, and float32 for demo."""
    batches: Annotated[tuple[int, ...], *each("N", "1")] = ()
    """Prompts decoded together; each batch size gets a choice of its own."""

    candidates: Annotated[int, N] = 6
    """Sizes of every method to begin with: its defaults, and others spread over all that it can be
    set to. More take longer and miss less."""
    seed: Annotated[int, N] = 0
    """Of the choice of prompts, and of the sizes to begin with."""
    device: str = "auto"
    """Torch device; auto takes a CUDA device where there is one."""
    threads: Annotated[int | None, arg("N", "1 on a CPU")] = None
    """Torch threads; tune with as many as you will run with."""

    def check(self) -> None:
        """Refuses what can be seen to be wrong without loading anything.

        Raises:
            ConfigError: Names the option, its value, and what it may be.
        """
        where = self.where
        if where.is_file() and not self.overwrite:
            raise ConfigError(f"--output {where} exists; give another name, or --overwrite")
        check_replaceable(where, "--output", b'"specdec-tuned"')
        check_numbers(self, _LEAST, _MOST)
        check_repeats(self)
        named = self.named
        if self.methods is not None and not named:
            raise ConfigError(f"--methods {self.methods!r} names no method")
        twice = next((name for name in named if named.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"--methods names {twice!r} twice")

    @property
    def where(self) -> Path:
        """The file; raises `ConfigError` without one."""
        if self.output is None:
            raise ConfigError("--output is missing; give a file")
        return self.output.expanduser()

    @property
    def named(self) -> tuple[str, ...]:
        """The methods that were asked for; none where all are meant."""
        return tuple(name.strip() for name in (self.methods or "").split(",") if name.strip())
