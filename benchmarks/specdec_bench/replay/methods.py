"""Which methods can be replayed.

A recorded answer says what the target wrote and nothing else: not what it would have written after
a rejected draft, nor what it nearly wrote. So only methods that draft from text can be replayed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from specdec.drafters.row import RowDrafter
from specdec.errors import ConfigError
from specdec.registry import methods
from specdec_bench.arm_names import ArmSpec, parse_arm

SPACE = "replay"
"""Part of a store that replays use."""


def create(spec: ArmSpec, store: Path | None = None, fingerprint: str = "") -> RowDrafter:
    """A fresh drafter for one answer.

    Args:
        spec: A method that drafts in rows.
        store: Folder of its store, where it has one.
        fingerprint: Of the tokenizer.
    """
    options = dict(spec.options)
    if store is not None:  # replay itself adds answers, when their prompt is done
        options |= {"store": store, "space": SPACE, "tokenizer": fingerprint}
        options["store_update"] = False
    return cast(RowDrafter, methods.create(spec.method, options))


def parse_methods(specs: Sequence[str]) -> list[ArmSpec]:
    """Reads `prompt_lookup:max_ngram=3`, `suffix+store` and the like; commas may join several.

    Args:
        specs: As the user wrote them; empty for all methods that can be replayed.

    Raises:
        ConfigError: A method is unknown, cannot be replayed (says why), or an option is wrong.
    """
    # A comma begins a new method, unless what follows is one more option.
    parts = [part for spec in specs for part in re.split(r",(?![^,:]*=)", spec)]
    found = [parse_arm(part) for part in parts or _replayable()]
    names = [spec.name for spec in found]
    for spec in found:
        if names.count(spec.name) > 1:
            raise ConfigError(f"method {spec.name!r} is named twice")
        reason = _why_not(spec)
        if reason:
            known = ", ".join(_replayable())
            raise ConfigError(
                f"method {spec.name!r} cannot be replayed: {reason}; those that can be are {known}"
            )
    return found


def _replayable() -> list[str]:
    found = []
    for name in methods.names():
        with suppress(ConfigError):  # it has to be told more, or is foreign and cannot be loaded
            found += [] if _why_not(ArmSpec(name, name)) else [name]
    return found


def _why_not(spec: ArmSpec) -> str:
    if not spec.is_ours:
        return "it is none of specdec's drafting methods"
    if spec.needs_draft:
        return "it needs forwards of a model"
    drafter = create(spec)
    if drafter.needs.node_topk:
        return "it needs the target's next best candidates, which no answer records"
    if not isinstance(drafter, RowDrafter) or drafter.needs.taps:
        return "it reads more of the target than its text"
    if not drafter.max_nodes:
        return "it drafts nothing: one token a step"
    if drafter.needs.node_picks:
        return "it guesses with what the target says at places that no answer records"
    return ""
