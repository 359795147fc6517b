"""What the command line can be told: one frozen dataclass per subcommand.

Field docstrings are the help texts. `tests/cli/test_cli.py` freezes the list of options. Imports
nothing heavy, so that `specdec --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from specdec.artifacts.arguments import Flag, N, arg, each, flag_of
from specdec.errors import ConfigError

_MOST = {  # more than these, torch or a token tree cannot take
    "threads": 1024, "seed": 2**64 - 1, "budget": 4096,
}  # fmt: skip
_MOST_OF_OTHERS = 2**31 - 1


@dataclass(frozen=True)
class DemoOptions:
    """Plain generate against every method, on the toy model that comes with specdec."""

    max_new_tokens: Annotated[int, N] = 96
    """New tokens for each prompt."""
    prompts: Annotated[int, N] = 6
    """How many of the prompts to run."""
    repetitions: Annotated[int, N] = 3
    """Timed runs of each prompt and method."""
    sample: Flag = False
    """Sample at temperature 0.8, with the same seed for every method, instead of greedy."""
    seed: Annotated[int, N] = 0
    """Seed of --sample."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Arithmetic. In bfloat16 identical text is not promised: larger forwards round differently."""
    device: str = "cpu"
    """Torch device."""
    threads: Annotated[int, N] = 1
    """Torch threads; the toy is too small to gain from more."""
    no_colour: Flag = False
    """Never colour the tokens. Also when NO_COLOR is set or the output is no terminal."""


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt or a file, or chat, with streamed output."""

    model: Annotated[str | None, arg("NAME", "the bundled toy")] = None
    """Folder or Hugging Face hub id of a decoder-only model."""
    prompt: Annotated[str | None, arg("TEXT")] = None
    """Text to continue."""
    file: Annotated[Path | None, arg("FILE")] = None
    """File with the text to continue; - reads standard input."""
    chat: Flag = False
    """Chat with the model in a loop, through its tokenizer's chat template."""
    max_new_tokens: Annotated[int | None, arg("N", "128, or what the model's context leaves")] = (
        None
    )
    """Limit of new tokens."""
    sample: Flag = False
    """Sample instead of taking the likeliest token."""
    temperature: Annotated[float | None, arg("X", "the model's own")] = None
    """Sampling temperature, above 0."""
    top_p: Annotated[float | None, arg("X", "the model's own")] = None
    """Nucleus sampling: smallest set with this probability, above 0 and at most 1."""
    top_k: Annotated[int | None, arg("N", "the model's own")] = None
    """Sample among the k likeliest tokens; 0 for all."""
    seed: Annotated[int | None, arg("N", "0")] = None
    """Seed of the sampling; the same seed gives the same text with every method."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    """Arithmetic; auto takes the checkpoint's own, and float32 for the bundled toy."""
    device: str = "auto"
    """Torch device; auto takes a CUDA device where there is one."""
    method: Annotated[str | None, arg("NAME", "chosen by a cost probe of a second")] = None
    """Drafting method, see `specdec doctor`."""
    budget: Annotated[int | None, arg("N", "the method's own size")] = None
    """Drafted nodes that a round may verify."""
    option: Annotated[tuple[str, ...], *each("NAME=VALUE", "none")] = ()
    """Option of the method, for example window=7."""
    kernels: Literal["auto", "triton", "reference", "off"] = "auto"
    """What computes the attention of token trees: fused kernels (Triton, or their reference in
    torch), or dense masks; auto is Triton on a CUDA device and off elsewhere."""
    stats: Flag = False
    """Afterwards, say on standard error what the speculation did."""
    compare: Flag = False
    """Afterwards, say on standard error how fast plain generate is on the same text, and whether it
    writes the same."""


@dataclass(frozen=True)
class DoctorOptions:
    """Show versions, devices and methods; with --model, how that model would be verified."""

    model: Annotated[str | None, arg("NAME")] = None
    """Folder or hub id of a model to test; demo is the bundled toy."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    """Arithmetic to test the model in."""
    device: str = "auto"
    """Torch device to test the model on."""
    kernels: Literal["auto", "triton", "reference", "off"] = "auto"
    """What should compute the attention of token trees, see `specdec generate --help`."""


@dataclass(frozen=True)
class DataOptions:
    """Training data: prepare, regenerate, doctor, features."""


@dataclass(frozen=True)
class BenchOptions:
    """Measured speed-up: run, replay, tune, report, gate."""


def check_ranges(options: Any) -> None:
    """Refuses what holds for no command: numbers too large for torch, and a device without data.

    Raises:
        ConfigError: Names the option.
    """
    for option in fields(options):
        value = getattr(options, option.name)
        most = _MOST.get(option.name, _MOST_OF_OTHERS)
        if isinstance(value, int) and value > most:
            raise ConfigError(f"{flag_of(option.name)} must be at most {most}, got {value}")
    if getattr(options, "device", "").partition(":")[0] == "meta":
        raise ConfigError("--device meta cannot be used: it holds shapes and no numbers")
