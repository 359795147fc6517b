"""What `specdec inspect` and `specdec convert` can be told; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from specdec.artifacts.arguments import Flag, N, arg, each

_Settings = Annotated[tuple[str, ...], *each("NAME=VALUE", "none")]


@dataclass(frozen=True)
class InspectOptions:
    """Show what a draft head checkpoint is: dialect, sizes, flags, what had to be assumed."""

    head: Annotated[tyro.conf.Positional[str], arg("HEAD")]
    """Folder or hub id of the draft head; demo is the bundled one."""
    target: Annotated[str | None, arg("NAME")] = None
    """Folder or hub id of the target, to compare with; demo is the bundled toy."""
    probe: Flag = False
    """Try the flags that a checkpoint may leave unsaid, on the target's own text."""
    prompts: Annotated[Path | None, arg("FILE", "a few built-in ones")] = None
    """Prompts of --probe: a line each, or JSON Lines with "prompt" or "text"."""
    set: _Settings = ()
    """Flag of the head that wins over the checkpoint, for example norm_before_residual=true."""
    new_tokens: Annotated[int, N] = 48
    """Tokens of the target's own text that --probe compares with, for each prompt."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    """Arithmetic of --probe; auto takes the target's own."""
    device: str = "auto"
    """Torch device of --probe; auto takes a CUDA device where there is one."""
    no_colour: Flag = False
    """Never colour. Also when NO_COLOR is set or the output is no terminal."""


@dataclass(frozen=True)
class ConvertOptions:
    """Write a draft head in another dialect, or for a serving engine."""

    source: Annotated[tyro.conf.Positional[str], arg("SOURCE")]
    """Folder or hub id of the draft head, or demo; the one command that reads a legacy .bin."""
    destination: Annotated[tyro.conf.Positional[Path], arg("FOLDER")]
    """Where the new head goes: a new folder, or with --overwrite one that specdec wrote."""
    to: Literal["specforge", "safeailab", "speculators", "modelopt", "nemo"] = "specforge"
    """Dialect to write; specforge is what SGLang and vLLM both load."""
    engine: Annotated[Literal["any", "sglang", "vllm"], arg("sglang|vllm", "no promise")] = "any"
    """Engine that is to load it; refuses what that engine would compute in another way."""
    target: Annotated[str | None, arg("NAME")] = None
    """Folder or hub id of the target, for what the head leaves unsaid; demo is the bundled toy."""
    set: _Settings = ()
    """Flag of the head that wins over the checkpoint, for example norm_before_residual=true."""
    overwrite: Flag = False
    """Replace a head that specdec wrote to FOLDER before; never the one that is read."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto keeps them as they are."""
    no_colour: Flag = False
    """Never colour. Also when NO_COLOR is set or the output is no terminal."""
