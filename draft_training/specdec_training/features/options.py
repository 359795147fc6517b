"""What `specdec data features` can be told.

Field docstrings are the help texts. Imports nothing heavy, so that the help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from specdec.artifacts.arguments import Flag, N, arg, each


@dataclass(frozen=True)
class DataFeaturesOptions:
    """Record the target's hidden states, so that training need not compute them each epoch."""

    data: Annotated[Path | None, arg("FOLDER", "required")] = None
    """What `specdec data prepare` wrote."""
    target: Annotated[str, arg("NAME", "the bundled toy")] = "demo"
    """Folder or hub id of the target; demo is the bundled toy."""
    output: Annotated[Path | None, arg("FOLDER", "required")] = None
    """Folder to write; one that was left unfinished is continued."""
    taps: Annotated[tuple[int, ...], *each("N", "a low, the middle and a high one")] = ()
    """Target layers, from 0, whose output the head reads; -1 stands for the embeddings."""
    keep_as: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type that hidden states are kept in."""
    shard_tokens: Annotated[int, N] = 32_768
    """Tokens of a file, which is held in memory while it is filled."""
    yes: Flag = False
    """Write more than 20 GB without being asked."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    """Arithmetic of the target; auto takes the checkpoint's own, and float32 for the toy."""
    device: str = "auto"
    """Torch device of the target; auto takes a CUDA device where there is one."""
    target_device_map: Annotated[str | None, arg("MAP", "one device")] = None
    """auto, balanced or sequential spread a target that is too large for one device."""
    threads: Annotated[int | None, arg("N", "torch's own choice")] = None
    """Torch threads."""
