"""What a user says of a head, checked before its files are read: it wins over whatever they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from specdec.errors import ConfigError
from specdec.heads.checkpoints.rope import read_rope
from specdec.heads.checkpoints.sidecar import check_flags
from specdec.heads.eagle3.config import MOST, Eagle3Config, check_size


def chosen_settings(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Eagle3Config` as it keeps them.

    Raises:
        ConfigError: There is no such field, or a value is none that it can have.
    """
    known = [one.name for one in fields(Eagle3Config)]
    found: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in known:
            raise ConfigError(f"there is no flag {name!r:.60} to set; known are {', '.join(known)}")
        if name in MOST:
            check_size(name, value, MOST[name])
        if name == "rope":
            value = read_rope({"rope_parameters": value})
        found[name] = tuple(value) if isinstance(value, list) else value
    check_flags(found)
    return found
