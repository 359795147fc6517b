"""What `specdec bench tune` found, as a file: method and sizes by batch size, and where it holds.

`augment(model, tuned=...)` reads it. A choice is worth something on the target, device, arithmetic
and number of threads that it was measured with: another target is refused, the rest is warned of.
The file is data from outside, and nothing in it is believed before it was looked at.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specdec.artifacts.atomic_files import from_json, make_folder, read_small, replace_file, to_json
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec.hf.compat import input_device

FORMAT, VERSION = "specdec-tuned", 1
_LARGEST = 16 << 20  # bytes
_LONGEST = 1000  # characters of a name, a path or an option's text
_MOST = 1e100  # of any number
_MOST_BATCHES = 64
_CPU_FACTS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class TunedChoice:
    """What to do with a batch size.

    Attributes:
        method: Drafting method; "none" where speculation does not pay.
        options: Of the method: numbers, booleans and text.
        predicted: Speed-up over decoding without speculation by what came before it was measured.
        measured: The measured one with its 95 % interval [value, low, high]; None for "none".
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    predicted: float = 1.0
    measured: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class TunedFile:
    """Choices, and where they were measured.

    Attributes:
        target: What identifies the model that was tuned for.
        device: As `describe_device` names it.
        dtype: Of the target, for example "float32".
        threads: Torch threads; they matter on a CPU.
        choices: Batch size -> method and sizes.
        details: For people: versions, prompts, cost curves, all candidates. Not looked at here.
    """

    target: TargetFingerprint
    device: str
    dtype: str
    threads: int
    choices: Mapping[int, TunedChoice]
    details: Mapping[str, Any] = field(default_factory=dict)

    def check(self, model: Any) -> None:
        """Refuses another target, and warns of other conditions.

        Args:
            model: A Hugging Face model.

        Raises:
            ConfigError: The model is not the one that was tuned for.
        """
        differences = self.target.differences(TargetFingerprint.of(model.config))
        if differences:
            raise ConfigError(
                f"this file was tuned for another target ({'; '.join(differences)}); run `specdec "
                "bench tune` for this one"
            )
        here = conditions(model)
        changed = [
            f"{name} {there!r} there, {here[name]!r} here"
            for name, there in (("device", self.device), ("dtype", self.dtype))
            if there != here[name]
        ]
        if here["device"].startswith("cpu") and self.threads != here["threads"]:
            changed.append(f"{self.threads} threads there, {here['threads']} here")
        if changed:
            warnings.warn(
                f"tuned elsewhere: {'; '.join(changed)}. The text is the same; whether the choice "
                "still pays, `specdec bench tune` can tell",
                UserWarning,
                stacklevel=4,
            )


def conditions(model: Any) -> dict[str, Any]:
    """Device, dtype and threads that a model would run with now."""
    return {
        "device": describe_device(input_device(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def describe_device(device: torch.device) -> str:
    """Kind and name of a device, for example "cuda NVIDIA H200" or "cpu x86_64, ..."."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    name = ""
    try:
        lines = _CPU_FACTS.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines
                     if line.startswith("model name")), "")  # fmt: skip
    except OSError:
        pass  # no Linux
    return f"cpu {platform.machine()}, {name or platform.processor() or 'unknown'}"[:_LONGEST]


def write_tuned(path: Path, tuned: TunedFile) -> None:
    """Writes the file, whole or not at all.

    Raises:
        ConfigError: It cannot be written, or `details` hold what JSON does not.
    """
    content = to_json(
        {
            "format": FORMAT,
            "version": VERSION,
            "target": tuned.target.to_dict(),
            "device": tuned.device,
            "dtype": tuned.dtype,
            "threads": tuned.threads,
            "choices": {
                str(batch): {
                    "method": choice.method,
                    "options": dict(choice.options),
                    "predicted": choice.predicted,
                    "measured": None if choice.measured is None else list(choice.measured),
                }
                for batch, choice in tuned.choices.items()
            },
            "details": dict(tuned.details),
        },
        "the tuned file",
    )
    try:
        make_folder(path.parent)
        replace_file(path, content)
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror or problem}") from problem


def read_tuned(path: str | Path) -> TunedFile:
    """Reads a tuned file.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise ConfigError(f"tuned= takes the path of a file, got {path!r:.80}")
    where = Path(path).expanduser()
    try:
        facts = from_json(read_small(where, _LARGEST))
    except OSError as problem:
        raise ConfigError(f"cannot read {where}: {problem.strerror or problem}") from problem
    except ValueError as problem:
        raise ConfigError(f"{where} is no tuned file: {problem}") from problem
    try:
        return _parse(facts)
    except ConfigError as problem:
        raise ConfigError(f"{where} is no tuned file of this version: {problem}") from problem


def _parse(facts: Mapping[str, Any]) -> TunedFile:
    version = facts.get("version")
    if facts.get("format") != FORMAT or version is True or version != VERSION:
        raise ConfigError(
            f"it says format {facts.get('format')!r:.40}, version {version!r:.40}; "
            f"wanted are {FORMAT!r} and {VERSION}"
        )
    details = facts.get("details", {})
    if not isinstance(details, Mapping):
        raise ConfigError("details must be an object")
    return TunedFile(
        target=TargetFingerprint.from_dict(facts.get("target", {})),
        device=_text(facts, "device"),
        dtype=_text(facts, "dtype"),
        threads=_whole(facts.get("threads"), "threads"),
        choices=_choices(facts.get("choices")),
        details=details,
    )


def _choices(found: Any) -> dict[int, TunedChoice]:
    if not isinstance(found, Mapping) or not 0 < len(found) <= _MOST_BATCHES:
        raise ConfigError(f"choices must be an object of 1 to {_MOST_BATCHES} batch sizes")
    choices = {}
    for key, choice in found.items():
        plain_digits = key.isascii() and key.isdigit() and len(key) < 10
        batch = _whole(int(key) if plain_digits else key, "a batch size")
        if not isinstance(choice, Mapping):
            raise ConfigError(f"the choice for batch {batch} must be an object")
        choices[batch] = _choice(choice)
    return choices


def _choice(choice: Mapping[str, Any]) -> TunedChoice:
    options = choice.get("options")
    if not isinstance(options, Mapping):
        raise ConfigError("the options of a choice must be an object")
    for name, value in options.items():
        known = value is None or isinstance(value, bool | int | str) or _is_number(value)
        if not known or (isinstance(value, str) and len(value) > _LONGEST):
            raise ConfigError(f"option {name!r:.40} has a value that no option takes")
    measured, predicted = choice.get("measured"), choice.get("predicted")
    if not isinstance(predicted, int | float) or not _is_number(predicted) or predicted <= 0:
        raise ConfigError(f"predicted must be a number above 0, got {predicted!r:.40}")
    if measured is not None and not (
        isinstance(measured, list)
        and len(measured) == 3
        and all(map(_is_number, measured))
        and 0 < measured[1] <= measured[0] <= measured[2]
    ):
        raise ConfigError("measured must be null, or a value above 0 with its low and high")
    interval = None if measured is None else (measured[0], measured[1], measured[2])
    return TunedChoice(_text(choice, "method"), dict(options), float(predicted), interval)


def _text(facts: Mapping[str, Any], name: str) -> str:
    value = facts.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST:
        raise ConfigError(f"{name} must be text, got {value!r:.40}")
    return value


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"{what} must be a whole number above 0, got {value!r:.40}")
    return value


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_MOST < value < _MOST  # compares integers of any size, and refuses NaN
