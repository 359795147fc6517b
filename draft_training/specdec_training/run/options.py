"""What `specdec train` can be told: one frozen dataclass.

Field docstrings are the help texts. Imports nothing heavy, so that the help answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from specdec.artifacts.arguments import Flag, N, X, arg, check_numbers, each, flag_of
from specdec.errors import ConfigError

FREE_ON_RESUME = frozenset(
    {
        "output", "data", "keep", "log_every", "tensorboard", "no_colour", "threads",
        "max_bad_steps", "max_steps", "patience",
    }
)  # fmt: skip
"""Options that a resumed run may change: they do not touch what a step computes. The data are known
by their hash, wherever they lie."""


_TOY_WIDTH, _WIDE = 1024, 2048  # hidden sizes


@dataclass(frozen=True)
class TrainOptions:
    """Train an EAGLE-3 draft head for a target."""

    target: Annotated[str, arg("NAME", "the bundled toy")] = "demo"
    """Folder or hub id of the target; demo is the bundled toy."""
    data: Annotated[Path | None, arg("FOLDER", "required")] = None
    """What `specdec data prepare` wrote."""
    output: Annotated[Path | None, arg("FOLDER", "required")] = None
    """Folder of the run; a run that was stopped goes on from its newest checkpoint."""
    features: Annotated[Path | None, arg("FOLDER", "computed by the target as needed")] = None
    """Hidden states that `specdec data features` recorded."""
    init_from: Annotated[str | None, arg("HEAD", "a new head")] = None
    """Folder or hub id of a head to start from, or demo; its shape replaces the shape's options."""

    steps: Annotated[int | None, arg("N", "1000 when --minutes is not given")] = None
    """Optimiser steps."""
    minutes: Annotated[float | None, arg("X")] = None
    """Time budget instead of --steps, evaluations included; the schedule follows the clock."""
    max_steps: Annotated[int | None, arg("N", "none")] = None
    """Stop after this many steps, whatever the schedule; 0 checks everything and trains nothing."""

    intermediate_size: Annotated[int | None, arg("N", "the target's")] = None
    """Width of the head's MLP."""
    taps: Annotated[tuple[int, ...], *each("N", "a low, the middle and a high one")] = ()
    """Target layers, from 0, whose output the head reads; -1 stands for the embeddings."""
    fc_norm: Flag = False
    """Norm each of those layers before they are joined (EAGLE-3.1)."""
    feed_post_norm: Flag = False
    """Later steps read the state after the final norm (EAGLE-3.1)."""
    norm_before_residual: Flag = False
    """The residual is the normed feature."""

    ttt_steps: Annotated[int | None, arg("N", "7, and 5 for a toy target")] = None
    """Training-time test steps: how deep the head learns to draft on its own output."""
    loss: Literal["ce", "kl", "tv", "lk"] = "ce"
    """Soft-target cross-entropy, Kullback-Leibler, total variation, or LK (arXiv 2602.23881)."""
    step_decay: Annotated[float, X] = 0.8
    """Weight of a TTT step relative to the one before it."""
    reduction: Literal["valid", "all"] = "valid"
    """Average over the tokens with a loss, or over all slots as SpecForge does."""
    noise: Annotated[float, X] = 0.0
    """Uniform noise on the features: its largest value, in their standard deviations."""

    max_length: Annotated[int | None, arg("N", "2048, and 512 for a toy target")] = None
    """Width of a row; documents are packed into rows, and longer ones are cut."""
    batch_rows: Annotated[int, N] = 1
    """Rows that a process works on at a time."""
    accumulate: Annotated[int, N] = 1
    """Such batches of an optimiser step."""

    lr: Annotated[float | None, arg("X", "1e-4 from hidden size 2048 on, more below")] = None
    """Peak learning rate."""
    warmup: Annotated[float, X] = 0.015
    """Share of the run over which the learning rate rises."""
    final_lr: Annotated[float, X] = 0.05
    """Share of the peak at which the cosine ends."""
    betas: Annotated[tuple[float, float], tyro.conf.arg(metavar="X X")] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: Annotated[float, X] = 0.0
    """Of AdamW, on matrices."""
    clip: Annotated[float, X] = 0.5
    """Largest norm of the gradient."""
    max_bad_steps: Annotated[int, N] = 10
    """Stop after this many steps in a row whose loss or gradient was not finite."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Products of the head and of an fp32 target's features; the head's weights are fp32 always.
    auto: bf16 where it is faster."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    """Arithmetic of the target."""
    recompute: Flag = False
    """Keep no activations inside a TTT step: less memory, more time."""
    device: str = "auto"
    """Torch device; several are a matter of `accelerate launch` or `torchrun`."""
    target_device_map: Annotated[str | None, arg("MAP", "the head's device")] = None
    """auto spreads a target that is too large for one device over all of them."""
    deepspeed: Annotated[Path | None, arg("FILE", "no DeepSpeed")] = None
    """DeepSpeed configuration (JSON) with ZeRO stage 1 or 2."""
    threads: Annotated[int | None, arg("N", "torch's choice")] = None
    """Torch threads."""
    seed: Annotated[int, N] = 0
    """Seed of everything that is drawn."""

    eval_every: Annotated[int | None, arg("N", "eight times, or a fifth of --minutes")] = None
    """Steps between measurements of the acceptance length; 0 for none."""
    eval_prompts: Annotated[int, N] = 16
    """Held-out prompts of a measurement."""
    eval_tokens: Annotated[int, N] = 48
    """New tokens for each."""
    depth: Annotated[int, N] = 5
    """Levels that the measured drafts have."""
    top_k: Annotated[int, N] = 8
    """Children of a node in the measured trees."""
    nodes: Annotated[int, N] = 48
    """Nodes of the measured trees."""
    patience: Annotated[int, N] = 5
    """Stop after this many measurements without a gain; 0 never does."""

    save_every: Annotated[int | None, arg("N", "at every measurement, or eight")] = None
    """Steps between checkpoints."""
    keep: Annotated[int, N] = 2
    """Checkpoints to keep."""
    log_every: Annotated[int, N] = 10
    """Steps between lines on the terminal; the log file has every step."""
    tensorboard: Flag = False
    """Also write TensorBoard events."""
    no_colour: Flag = False
    """Never colour the summary. Also when NO_COLOR is set or the output is no terminal."""

    def check(self) -> None:
        """Raises `ConfigError` as `check_train_options`."""
        check_train_options(self)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the provenance and for comparison on resume."""
        return {
            name: str(value) if isinstance(value, Path) else _plain(value)
            for name, value in asdict(self).items()
        }

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """One phrase for each option that a resumed run must not change, but does."""
        now = self.to_json()
        names = sorted((set(now) | set(before)) - FREE_ON_RESUME)
        return [
            f"{flag_of(name)}: {before.get(name)} before, {now.get(name)} now"
            for name in names
            if now.get(name) != before.get(name)
        ]


def resolved(options: TrainOptions, hidden_size: int) -> TrainOptions:
    """The options with what depends on the target's width filled in.

    A toy target, narrower than 1024, gets small batches and many steps: it learns from few tokens.
    """
    toy = hidden_size < _TOY_WIDTH
    lr = 1e-4 * max(1.0, _WIDE / hidden_size) ** 1.5
    return replace(
        options,
        ttt_steps=options.ttt_steps or (5 if toy else 7),
        max_length=options.max_length or (512 if toy else 2048),
        lr=options.lr or lr,
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_LEAST = {
    "ttt_steps": 1, "max_length": 8, "batch_rows": 1, "accumulate": 1, "eval_prompts": 1,
    "eval_tokens": 1, "depth": 1, "top_k": 1, "nodes": 1, "patience": 0, "keep": 1,
    "log_every": 1, "max_bad_steps": 1, "seed": 0, "steps": 1, "max_steps": 0, "eval_every": 0,
    "save_every": 1, "threads": 1, "intermediate_size": 1,
}  # fmt: skip
_SHARES = ("warmup", "final_lr", "step_decay")
_POSITIVE = ("lr", "clip", "minutes")
_MOST = {"depth": 4095, "top_k": 4095, "nodes": 4095, "ttt_steps": 64}
_MOST_NOISE = 100.0
_SHAPE = (
    "intermediate_size", "taps", "fc_norm", "feed_post_norm", "norm_before_residual",
)  # fmt: skip


def check_train_options(options: TrainOptions) -> None:
    """Refuses what can be seen to be wrong without loading anything.

    Raises:
        ConfigError: Names the option, its value, and what it may be.
    """
    for name in ("data", "output"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name} is missing; give a folder")
    if options.steps is not None and options.minutes is not None:
        raise ConfigError("give --steps or --minutes, not both")
    check_numbers(options, _LEAST, _MOST)
    for field in fields(options):
        value = getattr(options, field.name)
        if value is not None:
            _check_value(field.name, value)
    named = [name for name in _SHAPE if getattr(options, name)]
    if options.init_from is not None and named:
        raise ConfigError(
            f"--init-from brings the shape of the head; leave out {flag_of(named[0])}"
        )
    if any(not 0 <= beta < 1 for beta in options.betas):
        raise ConfigError(f"--betas must be two numbers from 0 to below 1, got {options.betas}")
    if options.target_device_map not in (None, "auto", "balanced", "sequential"):
        raise ConfigError(
            f"--target-device-map must be auto, balanced or sequential, got "
            f"{options.target_device_map!r}"
        )


def _check_value(name: str, value: Any) -> None:
    flag = flag_of(name)
    if name in _SHARES and not 0 <= value <= 1:
        raise ConfigError(f"{flag} must be from 0 to 1, got {value}")
    if name in _POSITIVE and not 0 < value < float("inf"):
        raise ConfigError(f"{flag} must be above 0 and finite, got {value}")
    if name == "noise" and not 0 <= value <= _MOST_NOISE:
        raise ConfigError(f"{flag} must be from 0 to {_MOST_NOISE:.0f}, got {value}")
    if name == "weight_decay" and not 0 <= value < float("inf"):
        raise ConfigError(f"{flag} must be at least 0 and finite, got {value}")
