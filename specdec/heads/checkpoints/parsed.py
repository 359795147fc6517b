"""What was found in a head's configuration: values, which are stated, and which were assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specdec.errors import ConfigError
from specdec.heads.eagle3.config import MOST

_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Context:
    """What is known besides the checkpoint.

    Attributes:
        num_layers: Layers of the target, or None.
        model_type: The target's class by Hugging Face's name, or None.
        for_sglang: The checkpoint was written for SGLang, whose count depends on the class.
        layers_given: Somebody else says which layers it reads, if the checkpoint does not.
        chosen: Fields of `Eagle3Config` that a user says; they win over the checkpoint.
    """

    num_layers: int | None = None
    model_type: str | None = None
    for_sglang: bool = False
    layers_given: bool = False
    chosen: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)


@dataclass
class Parsed:
    """What a configuration says.

    Attributes:
        dialect: One of `specdec.heads.checkpoints.read_dialects.DIALECTS`.
        settings: Fields of `Eagle3Config`; `aux_output_layers` is left out when nobody knows them.
        stated: Those that the checkpoint itself states.
        assumed: Field -> a sentence on what was assumed, and why.
        lm_head_optional: The dialect lets a head use the target's output matrix.
    """

    dialect: str
    settings: dict[str, Any]
    stated: set[str]
    assumed: dict[str, str] = field(default_factory=dict)
    lm_head_optional: bool = False

    def state(self, name: str, value: Any) -> None:
        """Takes a value that the checkpoint says."""
        self.settings[name] = value
        self.stated.add(name)

    def assume(self, name: str, value: Any, sentence: str) -> None:
        """Takes a value that the checkpoint does not say, or says for another model."""
        self.settings[name] = value
        self.assumed[name] = sentence


def whole(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """The size of this name in `config.json`.

    Raises:
        ConfigError: It is missing, no whole number above 0, or larger than is believed.
    """
    found = fields.get(name)
    if found is None and default is not None:
        return default
    if found is None:
        raise ConfigError(f"{name} is missing from config.json")
    most = MOST.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ConfigError(
            f"{name} in config.json must be a whole number above 0, got {found!r:.60}"
        )
    if most is not None and found > most:
        raise ConfigError(f"{name} in config.json must be at most {most}, got {found!r:.60}")
    return found


def flag(fields: Mapping[str, Any], name: str) -> bool | None:
    """The flag of this name in `config.json`, or None where it is not said.

    Raises:
        ConfigError: It is neither true nor false.
    """
    found = fields.get(name)
    if found is not None and not isinstance(found, bool):
        raise ConfigError(f"{name} in config.json must be true or false, got {found!r:.60}")
    return found
