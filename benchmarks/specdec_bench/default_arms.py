"""What `specdec bench run` measures when no arms are named, but for those without their draft."""

from __future__ import annotations

_LOOKAHEAD, _HEAD = "lookahead:window=1,ngram=3,guesses=1", "eagle3:depth=3,top_k=1"

SMOKE_ARMS = ("hf", "prompt_lookup", _LOOKAHEAD, _HEAD)
"""A short run."""
ARMS = (
    "hf",
    "hf_prompt_lookup",
    "prompt_lookup",
    "suffix",
    _LOOKAHEAD,
    _HEAD,
    "hf_assisted",
    "draft_model:num_draft_tokens=3",
)
"""What a user would pick without specdec, and methods at sizes that pay on small models."""
