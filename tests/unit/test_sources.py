"""The n-gram sources against brute force."""

from hypothesis import given
from hypothesis import strategies as st

from specdec.sources.ngram_index import NgramIndex
from specdec.sources.ngram_pool import NgramPool

TEXT = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def brute_force_match(text: list[int], longest: int, shortest: int) -> tuple[int, int]:
    """(position after the match, length) of the longest suffix's latest earlier occurrence."""
    for size in range(min(longest, len(text)), shortest - 1, -1):
        suffix = text[len(text) - size :]
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == suffix:
                return end, size
    return 0, 0


@given(TEXT, st.integers(1, 4), st.integers(1, 7))
def test_index_finds_the_latest_longest_match(text: list[int], longest: int, cut: int) -> None:
    index = NgramIndex(longest)
    for start in range(0, len(text), cut):
        index.extend(text[start : start + cut])
    assert index.match() == brute_force_match(text, longest, 1)


def test_index_respects_the_shortest_match() -> None:
    index = NgramIndex(max_ngram=3, min_ngram=2)
    index.extend([7, 1, 2, 9, 2])
    assert index.paths(4) == []
    index.extend([7, 1])
    assert index.paths(3) == [([2, 9, 2], 2.0)]


def test_a_match_at_the_end_goes_on_periodically() -> None:
    index = NgramIndex(max_ngram=2)
    index.extend([5, 6, 5, 6])
    assert index.paths(5) == [([5, 6, 5, 6, 5], 2.0)]


def test_pool_keeps_the_newest_guesses() -> None:
    pool = NgramPool(guesses=2)
    for followers in ((1, 2), (3, 4), (1, 2), (5, 6)):
        pool.add(0, followers)
    assert [gram for gram, _ in pool.guesses(0)] == [(5, 6), (1, 2)]
    assert pool.paths([9, 0])[0][0] == [5, 6]
    assert pool.paths([9]) == []
    assert len(pool) == 2


def test_pool_slides_over_text_and_keeps_tails() -> None:
    pool = NgramPool(guesses=4)
    pool.add_text([1, 2, 3, 4], ngram=3, origin=1)
    assert pool.guesses(1) == [((2, 3), 1)]
    assert pool.guesses(2) == [((3, 4), 1)]
    pool.add_text([1, 2, 3, 4, 5], ngram=3, start=4)
    assert pool.guesses(3) == [((4, 5), 0)]
    pool.add_with_tails(7, (8, 9, 1))
    assert pool.guesses(7) == [((8, 9, 1), 0)]
    assert pool.guesses(8) == [((9, 1), 0)]
    assert pool.guesses(9) == [((1,), 0)]
