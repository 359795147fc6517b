"""What `specdec bench tune` can be told: one frozen dataclass.

Field docstrings are the help texts. Imports nothing heavy, so that the help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from specdec.errors import ConfigError
from specdec_bench.output_files import check_replaceable

_Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
_N = tyro.conf.arg(metavar="N")
_TOY = "demo"
_METHODS = "lookahead,prompt_lookup,suffix,recycling"


def _arg(metavar: str, default: str = "") -> Any:
    """How a value is called in the help, and what leaving it out means."""
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True)
class TuneOptions:
    """Choose method and sizes for a target on this device; `augment(model, tuned=...)` reads it."""

    target: Annotated[str, _arg("NAME", "the bundled toy")] = _TOY
    """Folder or hub id of the target; demo is the bundled toy."""
    methods: Annotated[str | None, _arg("NAMES", _METHODS + ", and eagle3 with a head")] = None
    """Methods to choose from, with commas."""
    head: Annotated[str | None, _arg("HEAD", "the bundled one, for demo")] = None
    """Draft head of eagle3: a folder, a hub id, or demo: the bundled one."""
    draft: Annotated[str | None, _arg("NAME", "none")] = None
    """Draft model of draft_model: a folder, a hub id, or demo: the bundled toy."""
    output: Annotated[Path | None, _arg("FILE", "required")] = None
    """File of the choice."""
    overwrite: _Flag = False
    """Replace that file."""

    tasks: Annotated[tuple[str, ...], tyro.conf.UseAppendAction,
                     _arg("TASK", "smoke; repeatable")] = ()  # fmt: skip
    """Prompts like those that you will have: smoke, spec_bench, mt_bench, humaneval, gsm8k, a JSONL
    file, or a folder."""
    data: Annotated[Path | None, _arg("FOLDER")] = None
    """Where the named files lie."""
    limit: Annotated[int, _N] = 12
    """Prompts in all, balanced over categories."""
    max_new_tokens: Annotated[int, _N] = 96
    """New tokens of a prompt, at most; less where plain's text ends or begins to loop."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    """Arithmetic of the target; auto takes the checkpoint's own, and float32 for demo."""
    batches: Annotated[tuple[int, ...], tyro.conf.UseAppendAction,
                       _arg("N", "1; repeatable")] = ()  # fmt: skip
    """Prompts decoded together; each batch size gets a choice of its own."""

    candidates: Annotated[int, _N] = 8
    """Candidates to time, the best by prediction."""
    seed: Annotated[int, _N] = 0
    """Of the choice of prompts."""
    device: str = "auto"
    """Torch device; auto takes a CUDA device where there is one."""
    threads: Annotated[int | None, _arg("N", "1 on a CPU")] = None
    """Torch threads; tune with as many as you will run with."""

    def check(self) -> None:
        """Raises `ConfigError` as `check_tune_options`."""
        check_tune_options(self)

    @property
    def method_list(self) -> tuple[str, ...]:
        """What was asked for, or all that needs no training, and eagle3 where a head is given."""
        if self.methods is not None:
            return tuple(name.strip() for name in self.methods.split(",") if name.strip())
        head = ("eagle3",) if self.head is not None or self.target == _TOY else ()
        draft = ("draft_model",) if self.draft is not None else ()
        return (*_METHODS.split(","), *head, *draft)


_LEAST = {"limit": 1, "max_new_tokens": 16, "candidates": 1, "seed": 0, "threads": 1}
_MOST = {"threads": 1024, "candidates": 100}


def check_tune_options(options: TuneOptions) -> None:
    """Refuses what can be seen to be wrong without loading anything.

    Raises:
        ConfigError: Names the option, its value, and what it may be.
    """
    if options.output is None:
        raise ConfigError("--output is missing; give a file")
    where = options.output.expanduser()
    if where.is_dir():
        raise ConfigError(f"--output {where} is a folder; give a file")
    if where.exists() and not options.overwrite:
        raise ConfigError(f"--output {where} exists; give another name, or --overwrite")
    check_replaceable(where, "--output", b'"specdec-tuned"')
    _check_numbers(options)
    named = options.method_list
    if not named:
        raise ConfigError(f"--methods {options.methods!r} names no method")
    for values, flag in ((options.batches, "--batches"), (named, "--methods")):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"{flag} names {twice!r} twice")
    if "eagle3" in named and options.head is None and options.target != _TOY:
        raise ConfigError("eagle3 needs --head: a folder or hub id")
    if "draft_model" in named and options.draft is None:
        raise ConfigError("draft_model needs --draft: a folder or hub id")


def _check_numbers(options: TuneOptions) -> None:
    for name, least in _LEAST.items():
        value, most = getattr(options, name), _MOST.get(name, 2**31 - 1)
        if value is not None and not least <= value <= most:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be from {least} to {most}, got {value}")
    for batch in options.batches:
        if not 1 <= batch <= 4096:
            raise ConfigError(f"--batches must be from 1 to 4096, got {batch}")
