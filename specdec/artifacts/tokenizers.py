"""What makes two tokenizers the same: a fingerprint over vocabulary and splitting rules.

Token ids mean nothing without the tokenizer that made them. Knows tokenizers by what they can do,
not by their classes, so that nothing of transformers is imported.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from specdec.errors import ConfigError

# What turns text into ids. Padding and truncation change with every call, and templates and
# decoders differ between models that share their ids.
_RULES = ("model", "normalizer", "pre_tokenizer")


def tokenizer_in(holder: Any) -> Any:
    """The tokenizer itself: `holder`, or what a processor holds.

    Raises:
        ConfigError: There is no vocabulary.
    """
    tokenizer = holder if hasattr(holder, "get_vocab") else getattr(holder, "tokenizer", None)
    if not hasattr(tokenizer, "get_vocab"):
        raise ConfigError(
            f"{type(holder).__name__} is no tokenizer: it has no get_vocab(); pass what "
            "AutoTokenizer.from_pretrained returns"
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """64 hexadecimal digits that are equal for tokenizers that give the same ids.

    The SHA-256 of the vocabulary, sorted by id, with added tokens; and, where there is a fast
    backend, of its model with the merges, its normalizer and its pre-tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer, a processor with one, or a `tokenizers.Tokenizer`.

    Raises:
        ConfigError: The object has no vocabulary.
    """
    tokenizer = tokenizer_in(tokenizer)
    digest = hashlib.sha256()
    vocabulary = sorted((int(i), str(token)) for token, i in tokenizer.get_vocab().items())
    digest.update(_canonical(vocabulary))
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        digest.update(_canonical([rules.get(name) for name in _RULES]))
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    """JSON that depends on nothing but the value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
