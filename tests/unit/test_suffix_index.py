"""The suffix automaton and the trees drawn from it, against brute force."""

from __future__ import annotations

import random
import time
from collections import Counter
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.sources.suffix_draft import Limits, View, draft_tree
from specdec.sources.suffix_index import NO_MATCH, SuffixIndex

Text = list[int]
TOKEN = st.integers(0, 2)
TEXT = st.lists(TOKEN, min_size=1, max_size=30)
TEXTS = st.lists(TEXT, min_size=1, max_size=4)
EVERYTHING = 10**6


def indexed(texts: list[Text], count_links: int = EVERYTHING, cut: int = 3) -> SuffixIndex:
    """An index of all texts, the last one live, appended in pieces."""
    index = SuffixIndex(count_links)
    for number, text in enumerate(texts):
        if number:
            index.separate()
        for start in range(0, len(text), cut):
            index.extend(text[start : start + cut])
    return index


def ends_of(texts: list[Text], context: Text) -> set[tuple[int, int]]:
    """(text, position after it) of every occurrence."""
    size = len(context)
    return {
        (number, end)
        for number, text in enumerate(texts)
        for end in range(size, len(text) + 1)
        if text[end - size : end] == context
    }


def followers(texts: list[Text], context: Text) -> Counter[int]:
    """What followed a context, how often."""
    ends = ends_of(texts, context)
    return Counter(texts[text][end] for text, end in ends if end < len(texts[text]))


def longest_match(texts: list[Text]) -> int:
    """Length of the live text's longest suffix that also ends somewhere else."""
    live = texts[-1]
    lengths = range(len(live), 0, -1)
    return next((n for n in lengths if len(ends_of(texts, live[-n:])) > 1), 0)


def nested(texts: list[Text], text: Text, length: int) -> list[Text]:
    """Suffixes of `text`, from `length` tokens down: the longest one for each set of ends."""
    found: list[Text] = []
    for size in range(length, 0, -1):
        context = text[len(text) - size :]
        if not found or ends_of(texts, context) != ends_of(texts, found[-1]):
            found.append(context)
    return found


@given(TEXT, st.integers(1, 7))
def test_the_longest_match_of_one_text(text: Text, cut: int) -> None:
    assert indexed([text], cut=cut).match().length == longest_match([text])


@given(TEXTS)
def test_the_longest_match_among_several_texts(texts: list[Text]) -> None:
    """Contexts do not reach across the border between two texts."""
    index = indexed(texts)
    assert index.match().length == longest_match(texts)
    assert len(index) == sum(map(len, texts))


@given(TEXTS)
def test_counts_are_exact(texts: list[Text]) -> None:
    """For every context of the live text, and for every one below it in the chain of links."""
    index = indexed(texts)
    match = index.match()
    live = texts[-1]
    wanted = nested(texts, live, match.length)
    found = list(index.contexts(match))
    assert [context.length for context in found] == [len(context) for context in wanted]
    for context, tokens in zip(found, wanted, strict=True):
        total, children = index.children(context.state)
        assert {child.token: child.times for child in children} == followers(texts, tokens)
        assert total == followers(texts, tokens).total()


@given(TEXTS)
def test_latest_positions(texts: list[Text]) -> None:
    index = indexed(texts)
    starts = [sum(map(len, texts[:number])) for number in range(len(texts))]
    live = texts[-1]
    for context in index.contexts(index.match()):
        for child in index.children(context.state)[1]:
            tokens = [*live[len(live) - context.length :], child.token]
            ends = [starts[text] + end for text, end in ends_of(texts, tokens)]
            assert child.latest == max(ends)


@given(TEXTS, TEXT, st.integers(0, 5))
def test_following_a_text_that_is_not_indexed(texts: list[Text], query: Text, cut: int) -> None:
    """The longest suffix that occurs; also when the index has grown in between."""
    index = indexed(texts[:1])
    match = index.follow(NO_MATCH, query[:cut])
    for text in texts[1:]:
        index.separate()
        index.extend(text)
    before = [n for n in range(cut + 1) if n == 0 or ends_of(texts[:1], query[:cut][-n:])]
    match = index.follow(match, query[cut:])
    # What matched before may only have grown token by token; new texts do not lengthen it.
    known = query[max(len(query[:cut]) - max(before, default=0), 0) :]
    lengths = range(len(known), 0, -1)
    wanted = next((n for n in lengths if ends_of(texts, known[-n:])), 0)
    assert match.length == wanted
    for context in index.contexts(match):
        tokens = query[len(query) - context.length :]
        children = index.children(context.state)[1]
        assert {child.token: child.times for child in children} == followers(texts, tokens)


def test_a_place_stays_right_when_its_contexts_come_apart() -> None:
    """At first 1 and 0 1 end at the same places; the second text tells them apart."""
    index = indexed([[0, 1, 5]])
    match = index.follow(NO_MATCH, [1])
    index.separate()
    index.extend([2, 1, 5, 7])
    index.separate()
    index.extend([2, 1, 6])
    (context,) = index.contexts(match)
    followed = {child.token: child.times for child in index.children(context.state)[1]}
    assert followed == {5: 2, 6: 1}
    assert index.follow(match, [5, 7]).length == 3


@given(TEXT, st.integers(1, 3))
def test_capped_counts_are_never_too_high(text: Text, links: int) -> None:
    index = indexed([text], count_links=links)
    for context in index.contexts(index.match()):
        exact = followers([text], text[len(text) - context.length :])
        for child in index.children(context.state)[1]:
            assert child.times <= exact[child.token]


def brute_force_tree(
    texts: list[Text], depth: int, least: float, novelty: float
) -> dict[tuple[int, ...], float]:
    """Path -> highest estimated probability, from the definition."""
    live, found = texts[-1], dict[tuple[int, ...], float]()

    def grow(context: Text, path: tuple[int, ...], probability: float) -> None:
        while context and not followers(texts, context):
            context = context[1:]
        if not context or len(path) == depth:
            return
        counts = followers(texts, context)
        for token, times in counts.items():
            product = probability * times / (counts.total() + novelty / len(context))
            if product >= least:
                longer = (*path, token)
                found[longer] = max(found.get(longer, 0.0), product)
                grow([*context, token], longer, product)

    for context in nested(texts, live, longest_match(texts))[:4]:
        grow(context, (), 1.0)
    return found


def paths_of(draft_tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    """The path to each node."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(draft_tokens, parents, strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


@given(TEXTS, st.integers(1, 5), st.sampled_from([0.02, 0.1, 0.3]), st.sampled_from([1.0, 2.0]))
def test_trees_are_what_the_definition_says(
    texts: list[Text], depth: int, least: float, novelty: float
) -> None:
    index = indexed(texts)
    view = View(index, index.match(), novelty=novelty)
    draft = draft_tree([view], Limits(EVERYTHING, depth, least))
    found = dict(zip(paths_of(draft.tokens, draft.parents), draft.scores, strict=True))
    # A node at exactly the least probability is on either side, by rounding: the index adds
    # logarithms where the definition multiplies.
    certain = brute_force_tree(texts, depth, least * (1 + 1e-9), novelty)
    possible = brute_force_tree(texts, depth, least * (1 - 1e-9), novelty)
    assert certain.keys() <= found.keys() <= possible.keys()
    assert found == {path: pytest.approx(log(possible[path])) for path in found}
    assert len(found) == len(draft.tokens)  # equal children are one node


@given(TEXTS, st.integers(1, 12))
def test_the_best_nodes_come_first(texts: list[Text], room: int) -> None:
    index = indexed(texts)
    view = View(index, index.match())
    everything = draft_tree([view], Limits(EVERYTHING, 8, 0.02))
    some = draft_tree([view], Limits(room, 8, 0.02))
    assert some.scores == everything.scores[:room]
    assert sorted(everything.scores, reverse=True) == pytest.approx(everything.scores)


@given(TEXT)
def test_every_path_has_occurred(text: Text) -> None:
    """After the last token at least, up to where it runs into the end of the text."""
    index = indexed([text])
    draft = draft_tree([View(index, index.match())], Limits(60, 8, 0.02))
    for path, _ in draft.paths():
        whole = [text[-1], *path]
        starts = [n for n in range(len(text) - 1) if text[n] == whole[0]]
        assert any(
            text[start : start + len(whole)] == whole[: len(text) - start] for start in starts
        )


@given(TEXTS, st.integers(1, 10))
def test_a_chain_is_one_path_of_the_tree(texts: list[Text], room: int) -> None:
    index = indexed(texts)
    view = View(index, index.match())
    chain = draft_tree([view], Limits(room, 10, 0.1, chain=True))
    assert chain.parents == list(range(len(chain.tokens)))
    tree = draft_tree([view], Limits(EVERYTHING, 10, 0.1))
    assert set(paths_of(chain.tokens, chain.parents)) <= set(paths_of(tree.tokens, tree.parents))
    assert chain.tokens[:1] == tree.tokens[:1]


def test_two_sources_share_nodes_and_the_first_one_wins_a_tie() -> None:
    own, other = indexed([[1, 2, 3, 1, 2]]), indexed([[1, 2, 3], [1, 2, 4]])
    there = other.follow(NO_MATCH, [1, 2])
    views = [View(own, own.match(), 0), View(other, there, 1)]
    draft = draft_tree(views, Limits(10, 1, 0.1))
    assert draft.tokens == [3, 4]
    assert draft.sources == [0, 1]


def test_the_latest_of_equals_comes_first() -> None:
    index = indexed([[5, 1, 7, 5, 2, 8, 5]])
    draft = draft_tree([View(index, index.match())], Limits(1, 1, 0.1))
    assert draft.tokens == [2]


def test_a_loop_goes_on_past_the_end_of_the_text() -> None:
    index = indexed([[9, 1, 2, 3] * 4])
    draft = draft_tree([View(index, index.match())], Limits(40, 12, 0.1))
    assert draft.paths()[0][0] == [9, 1, 2, 3] * 3


@pytest.mark.parametrize(("nodes", "depth"), [(0, 4), (4, 0)])
def test_no_room_is_an_empty_draft(nodes: int, depth: int) -> None:
    index = indexed([[1, 2, 1]])
    assert draft_tree([View(index, index.match())], Limits(nodes, depth, 0.1)).tokens == []
    assert draft_tree([View(SuffixIndex(), NO_MATCH)], Limits(4, 4, 0.1)).tokens == []


TOKENS = 100_000
LONG = {
    "one token": lambda: [7] * TOKENS,
    "a period": lambda: list(range(50)) * (TOKENS // 50),
    "noise": lambda: random.Random(0).choices(range(4), k=TOKENS),
}


@pytest.mark.parametrize("kind", LONG)
def test_long_texts_take_linear_time_and_memory(kind: str) -> None:
    """Quadratic work would be 10,000,000,000 steps: hours instead of seconds."""
    text = LONG[kind]()
    begin = time.process_time()
    index = SuffixIndex()
    index.extend(text)
    assert time.process_time() - begin < 20
    assert index.nbytes() < 600 * TOKENS
    if kind != "noise":
        draft = draft_tree([View(index, index.match())], Limits(30, 24, 0.1, chain=True))
        assert draft.tokens == (text * 2)[TOKENS : TOKENS + 24]
