"""Rotary parameters in a configuration: one `rope_parameters`, or `rope_theta` and `rope_scaling`.

Transformers 5 writes the first and older serving stacks read the second, so both are read and
both are written; where both are there, they must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specdec.errors import ConfigError
from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.layer import RotaryTable

_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_OTHER_NAMES = {"mrope": "default", "su": "longrope"}  # mrope turns text as the default does
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
_FULL = "full_attention"
_MOST_FIELDS, _MOST_FACTORS = 24, 4096
_DEFAULT_THETA = 10_000.0


def read_rope(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rotary parameters of a configuration, or None where it says nothing.

    Raises:
        ConfigError: They contradict each other, or no such rotary embedding is known.
    """
    new, old = _object(raw, "rope_parameters"), _object(raw, "rope_scaling")
    theta = raw.get("rope_theta")
    if new is None and old is None and theta is None:
        return None
    if theta is None and new is not None:
        theta = new.get("rope_theta")  # which older writers left out of rope_scaling
    found = None
    for name, given in (("rope_parameters", new), ("rope_scaling", old)):
        if given is None:
            continue
        rope = _normal(given, theta, name)
        if found is not None and rope != found:
            raise ConfigError(
                f"rope_parameters {found!r:.150} and rope_scaling {rope!r:.150} contradict each "
                "other; remove the wrong one from config.json"
            )
        found = rope
    return found or _normal({}, theta, "rope_theta")


def of_one_layer(raw: Mapping[str, Any], dialect: str) -> tuple[dict[str, Any], str]:
    """Rotary fields as the one layer of a head has them, and a sentence on what was left out.

    Targets keep what a head has no use for, and some trainers copy it: parameters by type of layer
    (Gemma), a share of each head that is rotated (Phi, Gemma), scaling that the trainer's own layer
    does not know. The sentence is empty where nothing was.

    Args:
        raw: The configuration of the layer.
        dialect: Whose trainer wrote it.
    """
    found = {n: raw.get(n) for n in ("rope_parameters", "rope_scaling", "rope_theta")}
    left: list[str] = []
    for name in ("rope_parameters", "rope_scaling"):
        given = found[name]
        if not isinstance(given, dict):
            continue
        types = {kind: one for kind, one in given.items() if one is not None}
        if types and all(isinstance(one, dict) for one in types.values()):
            kind = _FULL if _FULL in types else next(iter(types))
            if any(one != types[kind] for one in types.values()):
                left.append(f"{name} has an entry for each type of layer, of which {kind} is taken")
            given = types[kind]
            found["rope_theta"] = given.get("rope_theta", found["rope_theta"])
        found[name] = given = dict(given)
        if given.get("rope_type", given.get("type")) == "proportional":
            given["rope_type"] = "default"  # the default turn, of a share of each head
        if dialect == "nemo" and given.get("rope_type", given.get("type")) in ("longrope", "su"):
            left.append("rope_type longrope is left out, which NeMo's layer does not know")
            found[name] = given = {"rope_theta": given.get("rope_theta")}
        share = given.pop("partial_rotary_factor", None)
        left += [] if share in (None, 1) else [f"partial_rotary_factor {share!r:.20} is left out"]
    share = raw.get("partial_rotary_factor")
    left += [] if share in (None, 1) else [f"partial_rotary_factor {share!r:.20} is left out"]
    if not left:
        return found, ""
    said = "; ".join(dict.fromkeys(left))
    return found, f"rope: {said}; the head's layer turns whole heads by one set of parameters"


def write_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """All three fields for these parameters."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_parameters": dict(rope),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }


def check_rope(config: Eagle3Config) -> None:
    """Raises `ConfigError` when no rotary table can be made of a head's parameters."""
    try:
        cos, sin = RotaryTable(config)(slice(2), 2, torch.empty(0))
        if not bool(torch.isfinite(cos).all() and torch.isfinite(sin).all()):
            raise ConfigError("its frequencies are no finite numbers")
    except Exception as problem:
        text = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise ConfigError(f"rope {dict(config.rope)!r:.200} cannot be used: {text}") from problem


def _object(raw: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    found = raw.get(name)
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{name} must be an object, got {found!r:.80}")
    return found


def _normal(given: dict[str, Any], theta: Any, name: str) -> dict[str, Any]:
    if len(given) > _MOST_FIELDS:
        raise ConfigError(f"{name} has {len(given)} fields")
    skipped = ("type", *_OF_IMAGES)
    rope = {key: value for key, value in given.items() if value is not None and key not in skipped}
    kind = given.get("rope_type", given.get("type", "default"))
    kind = _OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in _TYPES:
        raise ConfigError(
            f"rope_type in {name} must be one of {', '.join(_TYPES)}, got {kind!r:.60}"
        )
    base = rope.get("rope_theta", _DEFAULT_THETA if theta is None else theta)
    if theta is not None and base != theta:
        raise ConfigError(f"rope_theta is {theta!r:.40} and in {name} {base!r:.40}")
    rope |= {"rope_type": kind, "rope_theta": base}
    for key, value in rope.items():
        if key != "rope_type":
            rope[key] = _checked(key, value, name)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor in {name} must be 1, which rotates whole heads")
    return rope


def _checked(key: str, value: Any, name: str) -> Any:
    """A number of a size that is believed, a flag, or a list of such numbers."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and 0 <= value <= 1e12:
        return value if key.endswith("position_embeddings") else float(value)
    if isinstance(value, list) and 0 < len(value) <= _MOST_FACTORS:
        return [_checked(key, one, name) for one in value if not isinstance(one, list)]
    raise ConfigError(f"{key} in {name} must be a number from 0 to 1e12, got {value!r:.60}")
