"""Target fingerprints: what they hold, how they differ, and what they refuse to read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from data_helpers import byte_tokenizer
from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, SiglipVisionConfig

from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.artifacts.tokenizers import tokenizer_fingerprint
from specdec.errors import ConfigError

PRINT = TargetFingerprint("llama", 64, 2, 300, "a" * 64)


def test_of_a_model() -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300)
    tokenizer = byte_tokenizer()
    found = TargetFingerprint.of(config, tokenizer)
    assert found == replace(PRINT, tokenizer=tokenizer_fingerprint(tokenizer))
    assert TargetFingerprint.of(config) == replace(PRINT, tokenizer=None)
    assert TargetFingerprint.from_dict(found.to_dict()) == found


def test_of_a_composite_model() -> None:
    text = Gemma3TextConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300)
    config = Gemma3Config(text_config=text, vision_config=SiglipVisionConfig())
    found = TargetFingerprint.of(config)
    assert (found.hidden_size, found.num_hidden_layers, found.vocab_size) == (64, 2, 300)


def test_differences_name_the_field_and_both_values() -> None:
    other = replace(PRINT, hidden_size=128, tokenizer="b" * 64)
    assert PRINT.differences(PRINT) == []
    assert PRINT.differences(other) == [
        "hidden_size: 64 and 128",
        f"tokenizer: {'a' * 12} and {'b' * 12}",
    ]
    assert PRINT.differences(replace(PRINT, tokenizer=None)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0}, {"hidden_size": True}, {"hidden_size": "64"}, {"vocab_size": 2**40},
        {"vocab_size": None}, {"model_type": ""}, {"model_type": None}, {"model_type": "x" * 500},
        {"tokenizer": 3}, {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="target fingerprint"):
        TargetFingerprint.from_dict(PRINT.to_dict() | changes)


@pytest.mark.parametrize("facts", [None, [], "llama", {}])
def test_no_object_is_refused(facts: Any) -> None:
    with pytest.raises(ConfigError):
        TargetFingerprint.from_dict(facts)
