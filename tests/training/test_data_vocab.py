"""The draft vocabulary: most frequent first, always the same, and its two maps agree."""

from __future__ import annotations

import pytest
import torch
from data_helpers import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import ConfigError
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary
from specdec_training.data import draft_vocab

COUNTS = st.lists(st.integers(0, 5), min_size=2, max_size=60)


@settings(deadline=None, max_examples=200)
@given(COUNTS, st.data())
def test_properties(numbers: list[int], data: st.DataObject) -> None:
    counts = torch.tensor(numbers)
    vocabulary = len(numbers)
    size = data.draw(st.integers(1, vocabulary - 1))
    always = data.draw(st.sets(st.integers(0, vocabulary - 1), max_size=size))
    found = draft_vocab.build(counts, size, always)
    ids = found.ids.tolist()
    assert (len(ids), found.size, found.is_whole) == (size, vocabulary, False)
    assert ids == sorted(set(ids)) == found.mask.nonzero().flatten().tolist()
    maps = found.tensors()
    assert (maps["d2t"].dtype, maps["t2d"].dtype) == (torch.int64, torch.bool)
    assert DraftVocabulary.read(maps["d2t"], maps["t2d"], size, vocabulary) == found
    assert always <= set(ids)
    # Whoever is left out is not more frequent than a free choice, and loses ties by its id.
    free = [token for token in ids if token not in always]
    left = [token for token in range(vocabulary) if token not in ids]
    if free and left:
        worst = max((-numbers[token], token) for token in free)
        assert worst < min((-numbers[token], token) for token in left)
    share = draft_vocab.coverage(counts, found)
    total = sum(numbers)
    assert share == pytest.approx(sum(numbers[t] for t in ids) / total if total else 0.0)


def test_the_whole_vocabulary_needs_no_maps() -> None:
    counts = torch.tensor([3, 0, 1])
    for size in (3, 4, 10**9):
        found = draft_vocab.build(counts, size)
        assert found == DraftVocabulary.whole(3)
        assert found.tensors() == {}
    assert draft_vocab.coverage(counts, found) == 1.0


def test_too_few_seen_tokens_are_padded_with_unseen_ones() -> None:
    counts = torch.zeros(20, dtype=torch.int64)
    counts[7] = 4
    assert draft_vocab.build(counts, 5, [19]).ids.tolist() == [0, 1, 2, 7, 19]


@pytest.mark.parametrize(
    ("size", "always", "message"),
    [(0, [], "at least 1"), (-3, [], "at least 1"), (2, [0, 1, 2], "too small"),
     (2, [50], "outside"), (2, [-1], "outside")],
)  # fmt: skip
def test_refusals(size: int, always: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draft_vocab.build(torch.ones(10, dtype=torch.int64), size, always)


@pytest.mark.parametrize(
    "counts",
    [
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(4),
        torch.tensor([1, -1]),
        torch.ones(0).long(),
    ],
)
def test_odd_counts(counts: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="counts"):
        draft_vocab.build(counts, 1)


def test_what_always_belongs_to_it() -> None:
    tokenizer = byte_tokenizer()
    eos, bos, start, end = (
        tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens
    )
    used = torch.zeros(300, dtype=torch.int64)
    assert draft_vocab.always_ids(tokenizer, [end], used, 20) == sorted([eos, bos, end])
    used[start] = 1
    assert draft_vocab.always_ids(tokenizer, [end], used, 20) == sorted([eos, bos, start, end])
    used[start] = 0
    assert draft_vocab.always_ids(tokenizer, [], used, 64) == sorted([eos, bos, start, end])
    assert draft_vocab.always_ids(tokenizer, [299, 300], used, 20) == sorted([eos, bos, 299])
