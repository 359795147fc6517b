"""Which target an artefact was made for: a few facts that must not change under it.

Prepared data, recorded features and draft heads carry one. Token ids and hidden states of another
target have the same shapes and mean nothing, so a mismatch is refused before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from specdec.artifacts.tokenizers import tokenizer_fingerprint
from specdec.errors import ConfigError

_LARGEST = 2**31 - 1  # of a size that is believed
_LONGEST_NAME = 200  # of a model type, in characters


@dataclass(frozen=True)
class TargetFingerprint:
    """What is compared.

    Attributes:
        model_type: As Hugging Face names the architecture, of the text part.
        hidden_size: Width of the hidden states.
        num_hidden_layers: Decoder layers.
        vocab_size: Token ids that the target scores, padding included.
        tokenizer: `tokenizers.tokenizer_fingerprint`, or None where there was none.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    tokenizer: str | None = None

    @classmethod
    def of(cls, model_config: Any, tokenizer: Any | None = None) -> TargetFingerprint:
        """The fingerprint of a model's configuration and its tokenizer.

        Args:
            model_config: A Hugging Face configuration; of a composite one, the text part counts.
            tokenizer: What turned text into ids, or None when only ids are at hand.

        Raises:
            ConfigError: The configuration lacks a size, or the tokenizer a vocabulary.
        """
        text = model_config.get_text_config()
        facts: dict[str, Any] = {}
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            facts[name] = getattr(text, name, None)
        facts["tokenizer"] = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        return cls.from_dict(facts)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> TargetFingerprint:
        """Reads what `to_dict` wrote, and trusts none of it.

        Raises:
            ConfigError: A field is missing, unknown, or not what it should be.
        """
        if not isinstance(facts, Mapping):
            raise ConfigError(f"a target fingerprint is an object, got {type(facts).__name__}")
        names = [field.name for field in fields(cls)]
        unknown = sorted(str(name) for name in facts if name not in names)
        if unknown:
            raise ConfigError(f"target fingerprint has an unknown field {unknown[0]!r}")
        for name in names:
            _check(name, facts.get(name))
        return cls(**{name: facts.get(name) for name in names})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def differences(self, other: TargetFingerprint) -> list[str]:
        """One phrase for each field that differs, with both values; empty when they agree.

        A tokenizer that one of the two does not know is not compared.
        """
        found = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name == "tokenizer":
                if mine is None or theirs is None:
                    continue
                mine, theirs = mine[:12], theirs[:12]
            if getattr(self, field.name) != getattr(other, field.name):
                found.append(f"{field.name}: {mine} and {theirs}")
        return found


def _check(name: str, value: Any) -> None:
    """Raises `ConfigError` when a field cannot be right."""
    if name == "model_type":
        fits = isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME
        wanted = "a name"
    elif name == "tokenizer":
        fits = value is None or (isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME)
        wanted = "a hash or null"
    else:
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = whole and 0 < value <= _LARGEST
        wanted = "a whole number above 0"
    if not fits:
        raise ConfigError(f"{name} of a target fingerprint must be {wanted}, got {value!r}")
