"""`specdec_config.json`: what we write beside a head, because no dialect says all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from specdec.artifacts.atomic_files import to_json
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec.heads.checkpoints.aux_layers import check_layers
from specdec.heads.checkpoints.read_dialects import DIALECTS
from specdec.heads.checkpoints.strict_files import inside, read_object
from specdec.heads.eagle3.config import Eagle3Config

NAME = "specdec_config.json"
"""Its file name."""

_FORMAT, _VERSION = "specdec-eagle3", 1
_KEYS = {
    "format", "version", "dialect", "engine", "num_target_layers", "config", "fingerprint", "facts",
}  # fmt: skip
_MOST_LAYERS = 4096
_NOTHING: Mapping[str, Any] = {}
_LATER = ("output_bias", "mlp_bias")  # fields that older files lack, and are written only when on


@dataclass(frozen=True)
class Sidecar:
    """Everything about a head.

    Attributes:
        config: Its shape and flags.
        dialect: How the files beside it are written.
        engine: Which engine they were written for, or None.
        num_target_layers: Layers of its target.
        fingerprint: Of its target, or None.
        facts: Where it comes from; nothing depends on it.
    """

    config: Eagle3Config
    dialect: str
    engine: str | None
    num_target_layers: int
    fingerprint: TargetFingerprint | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file.

        Raises:
            ConfigError: `facts` holds what JSON cannot.
        """
        config = {n: v for n, v in asdict(self.config).items() if v or n not in _LATER}
        config["aux_output_layers"] = list(self.config.aux_output_layers)
        found = {
            "format": _FORMAT,
            "version": _VERSION,
            "dialect": self.dialect,
            "engine": self.engine,
            "num_target_layers": self.num_target_layers,
            "config": config,
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
            "facts": dict(self.facts),
        }
        plain = json.loads(to_json(found, NAME))  # tuples and the like are lists now
        return json.dumps(plain, indent=2).encode("ascii") + b"\n"


def read_sidecar(folder: Path, chosen: Mapping[str, Any] = _NOTHING) -> Sidecar | None:
    """The file in this folder, or None where there is none.

    Args:
        folder: A checkpoint.
        chosen: Fields of the configuration that win over the file's, however wrong those are.

    Raises:
        ConfigError: It makes no sense; names the field.
    """
    if not (folder / NAME).exists():
        return None
    raw = read_object(inside(folder, NAME))
    unknown = sorted(set(raw) ^ _KEYS)
    if unknown:
        raise ConfigError(f"{NAME} must have just the keys {sorted(_KEYS)}; see {unknown[0]!r:.60}")
    if raw["format"] != _FORMAT or raw["version"] != _VERSION or isinstance(raw["version"], bool):
        raise ConfigError(
            f"format and version in {NAME} must be {_FORMAT!r} and {_VERSION}, got "
            f"{raw['format']!r:.40} and {raw['version']!r:.40}; a newer specdec may have written it"
        )
    if raw["dialect"] not in DIALECTS:
        raise ConfigError(
            f"dialect in {NAME} must be one of {DIALECTS}, got {raw['dialect']!r:.40}"
        )
    if raw["engine"] not in (None, "sglang", "vllm"):
        raise ConfigError(
            f"engine in {NAME} must be sglang, vllm or null, got {raw['engine']!r:.40}"
        )
    layers = raw["num_target_layers"]
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= _MOST_LAYERS:
        raise ConfigError(
            f"num_target_layers in {NAME} must be from 1 to {_MOST_LAYERS}, got {layers!r:.40}"
        )
    if not isinstance(raw["facts"], dict):
        raise ConfigError(f"facts in {NAME} must be an object, got {raw['facts']!r:.40}")
    config = config_of(raw["config"], chosen)
    check_layers(config.aux_output_layers, layers, f"aux_output_layers in {NAME}")
    return Sidecar(
        config, raw["dialect"], raw["engine"], layers, _fingerprint(raw, layers), raw["facts"]
    )


def config_of(given: Any, chosen: Mapping[str, Any] = _NOTHING) -> Eagle3Config:
    """A configuration from plain values, each of them checked.

    Args:
        given: Every field, by name.
        chosen: Those that win over them.

    Raises:
        ConfigError: A field is missing, unknown or out of range.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"config in {NAME} must be an object, got {given!r:.60}")
    given = {**given, **chosen}
    known = {one.name for one in fields(Eagle3Config)}
    unknown, missing = sorted(set(given) - known), sorted(known - set(given) - {*_LATER})
    if unknown or missing:
        raise ConfigError(f"config in {NAME} lacks or does not know {(unknown + missing)[0]!r:.60}")
    check_flags(given)
    return Eagle3Config(**given)


def check_flags(settings: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for a flag that is no bool, or an activation that is no name."""
    for one in fields(Eagle3Config):
        value = settings.get(one.name, one.default)
        if one.type == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{one.name} must be true or false, got {value!r:.60}")
    activation = settings.get("hidden_act", "silu")
    if not isinstance(activation, str):
        raise ConfigError(f"hidden_act must be a name, got {activation!r:.60}")


def _fingerprint(raw: Mapping[str, Any], layers: int) -> TargetFingerprint | None:
    if raw["fingerprint"] is None:
        return None
    found = TargetFingerprint.from_dict(raw["fingerprint"])
    if found.num_hidden_layers != layers:
        raise ConfigError(
            f"num_target_layers in {NAME} is {layers}, and its fingerprint says "
            f"{found.num_hidden_layers}"
        )
    return found
