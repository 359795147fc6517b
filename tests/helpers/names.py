"""The KV cache under the name that the installed transformers has for it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import LlamaForCausalLM

OLD = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else OLD
RENAMED = CACHE != OLD


def cache_of(output: Any) -> Any:
    """The cache that a forward or a call returned; Mamba had a name of its own for it."""
    held = getattr(output, CACHE, None)
    return output.cache_params if held is None and not RENAMED else held
