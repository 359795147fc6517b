"""What the installed transformers calls the KV cache, and whether it is a release that was tested.

transformers 5.24 renamed `past_key_values` and `cache_params` to `cache`: in forwards, prepared
calls and outputs. Only this file knows the names; it looks at what is installed, not at a version.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import transformers
from packaging.version import Version
from transformers.generation import utils as generation_utils

from specdec.errors import UntestedVersionWarning

_OLD_NAMES = ("past_key_values", "cache_params")  # attention; Mamba, whose classes had their own
_TESTED = ("5.16", "5.24")  # oldest and newest minor release of `make compat`

_RENAMED = "cache" in generation_utils.ALL_CACHE_NAMES
CACHE = "cache" if _RENAMED else "past_key_values"
"""Argument and output of a forward that holds the KV cache."""

CACHE_INPUTS = ("cache",) if _RENAMED else _OLD_NAMES
"""Names under which `generate` may hand a cache to a decoding loop."""


def cache_argument(kwargs: Mapping[str, Any]) -> tuple[str, Any]:
    """(name, cache) of a prepared call; the name is `CACHE` and the cache None where there is none.

    Old models have names of their own (RWKV, XLNet, Reformer).
    """
    for name in dict.fromkeys((*CACHE_INPUTS, *generation_utils.ALL_CACHE_NAMES)):
        if kwargs.get(name) is not None:
            return name, kwargs[name]
    return CACHE, None


def users_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache that the user gave to `generate`, under its name or a deprecated one; else None."""
    given = (kwargs.get(name) for name in dict.fromkeys((CACHE, *_OLD_NAMES)))
    return next((held for held in given if held is not None), cache_argument(kwargs)[1])


def counts_slots(name: str, held: Any) -> bool:
    """Whether plain `generate` asks a cache for its length, and goes on behind it.

    It does not ask caches that hold states alone: its first forward takes the ids as given.
    """
    linear = getattr(held, "is_linear", [])
    return name == CACHE and not (_RENAMED and linear and all(linear))


def cache_of(output: Any) -> Any:
    """The cache that a forward returned."""
    held = getattr(output, CACHE, None)
    return getattr(output, "cache_params", None) if held is None and not _RENAMED else held


def tested_range() -> str:
    """Releases of transformers that the library was tested with, and the installed one's place."""
    place = "newer than those" if _is_untested() else "one of those"
    return f"{_TESTED[0]} to {_TESTED[1]}; {transformers.__version__} is {place}"


def _is_untested() -> bool:
    """Whether a newer minor release is installed; patches of a tested one count as tested."""
    return Version(transformers.__version__).release[:2] > Version(_TESTED[1]).release


@cache
def warn_when_untested() -> None:
    """Says once a process that the installed transformers is newer than any that was tested."""
    if _is_untested():
        warnings.warn(
            f"specdec: transformers {transformers.__version__} is newer than {_TESTED[1]}, the "
            "newest that this version of specdec was tested with. A model still has to pass a "
            "self-test before it is speculated on; where calls fall back to plain generate, "
            f"pip install 'transformers=={_TESTED[1]}.*' or a newer specdec",
            UntestedVersionWarning,
            stacklevel=3,
        )
