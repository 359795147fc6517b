"""The fingerprint of a tokenizer: equal where ids are equal, different where they may differ."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from specdec.artifacts.tokenizers import tokenizer_fingerprint
from specdec.errors import ConfigError

VOCABULARY = {"[PAD]": 0, "a": 1, "b": 2, "ab": 3, "ba": 4}


def backend(vocabulary: dict[str, int] = VOCABULARY, first: str = "ab") -> Tokenizer:
    merges = [("a", "b"), ("b", "a")]
    return Tokenizer(models.BPE(vocabulary, merges if first == "ab" else merges[::-1]))


def test_equal_tokenizers_have_equal_fingerprints() -> None:
    found = tokenizer_fingerprint(backend())
    assert len(found) == 64
    assert int(found, 16)
    shuffled = dict(reversed(VOCABULARY.items()))
    assert tokenizer_fingerprint(backend(shuffled)) == found
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend(), pad_token="[PAD]")
    before = tokenizer_fingerprint(wrapped)
    wrapped("ab", padding="max_length", max_length=9, truncation=True)
    assert tokenizer_fingerprint(wrapped) == before
    assert tokenizer_fingerprint(copy.deepcopy(wrapped)) == before


def test_it_is_the_same_in_every_process() -> None:
    """Stores outlive processes: the value may not change."""
    known = hashlib.sha256(b'[[0,"a"],[1,"b"]]').hexdigest()
    assert tokenizer_fingerprint(Words({"b": 1, "a": 0})) == known


class Words:
    """A tokenizer without a fast backend."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def normalised(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def split(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def extended(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens(["c"])


@pytest.mark.parametrize("change", [normalised, split, extended])
def test_what_changes_ids_changes_the_fingerprint(change: Any) -> None:
    changed = backend()
    change(changed)
    assert tokenizer_fingerprint(changed) != tokenizer_fingerprint(backend())


def test_vocabulary_and_merges_count() -> None:
    swapped = {**VOCABULARY, "a": 2, "b": 1}
    found = {
        tokenizer_fingerprint(backend(v, f)) for v in (VOCABULARY, swapped) for f in ("ab", "")
    }
    assert len(found) == 4


def templated(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[PAD] $A", special_tokens=[("[PAD]", 0)]
    )


def decoded(tokenizer: Tokenizer) -> None:
    tokenizer.decoder = decoders.ByteLevel()


@pytest.mark.parametrize("change", [templated, decoded])
def test_templates_and_decoders_do_not_count(change: Any) -> None:
    changed = backend()
    change(changed)
    assert tokenizer_fingerprint(changed) == tokenizer_fingerprint(backend())


def test_a_processor_that_holds_a_tokenizer() -> None:
    class Processor:
        tokenizer = backend()

    assert tokenizer_fingerprint(Processor()) == tokenizer_fingerprint(backend())


@pytest.mark.parametrize("value", [None, "gpt2", 3, object()])
def test_what_is_no_tokenizer(value: Any) -> None:
    with pytest.raises(ConfigError, match="is no tokenizer"):
        tokenizer_fingerprint(value)
