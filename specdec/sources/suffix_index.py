"""Finds every earlier occurrence of the text's longest suffix, and what followed it how often.

An online suffix automaton (Blumer et al. 1985, "The smallest automaton recognizing the subwords of
a text") with occurrence counts. Drafting from suffix counts is SuffixDecoding's idea (arXiv
2411.04975), keeping them in an automaton SAM decoding's (arXiv 2411.10666).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ROOT = 0
"""State of the empty context."""


class Match(NamedTuple):
    """A place in the automaton: the last `length` tokens of some text occur in the index."""

    length: int
    state: int


NO_MATCH = Match(0, ROOT)
"""Nothing matches."""


class Child(NamedTuple):
    """A token that followed a context.

    Attributes:
        token: Its id.
        times: How often it did.
        latest: Where it last did, as a position in the index.
        state: State of the context with the token appended.
    """

    token: int
    times: int
    latest: int
    state: int


class SuffixIndex:
    """Suffix automaton over growing texts; appending a token takes constant time on average.

    A state stands for all contexts that end at the same positions. Its suffix link leads to the
    longest shorter context that ends at more of them.

    Args:
        count_links: Contexts counted per appended token, from the longest one down. All contexts of
            a text are nested in one chain of links, which gets long only where a text is close to
            periodic; there it would make the work quadratic. The contexts left out are the shortest
            ones, all inside a longer context that is counted, so drafts hardly look at them.
    """

    def __init__(self, count_links: int = 64) -> None:
        self._count_links = count_links
        self._size = 0
        self._last = ROOT
        self._is_new = False  # whether the live text has never occurred before as a whole
        self._length, self._link = array("i", [0]), array("i", [-1])
        self._count, self._latest = array("i", [0]), array("i", [0])
        # Most states have one way on: it lives in these arrays, and a dictionary holds the others.
        self._token, self._next = array("q", [0]), array("i", [0])
        self._ways: dict[int, dict[int, int]] = {}

    def __len__(self) -> int:
        """Tokens appended so far, of all texts."""
        return self._size

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the live text."""
        link, count, latest = self._link, self._count, self._latest
        for token in tokens:
            self._append(token)
            self._size += 1
            state, position = self._last, self._size
            for _ in range(self._count_links):
                if state <= ROOT:
                    break
                count[state] += 1
                latest[state] = position
                state = link[state]

    def separate(self) -> None:
        """Ends the live text; no context reaches across."""
        self._last, self._is_new = ROOT, False

    def match(self) -> Match:
        """The longest suffix of the live text that also ends at an earlier position."""
        state = self._link[self._last] if self._is_new else self._last
        return Match(self._length[state], state) if state > ROOT else NO_MATCH

    def follow(self, match: Match, tokens: Sequence[int]) -> Match:
        """The longest suffix of (matched text + tokens) that occurs in the index."""
        length, state = match.length, self._owner(match)
        for token in tokens:
            following = self._step(state, token)
            while not following and state != ROOT:
                state = self._link[state]
                length = self._length[state]
                following = self._step(state, token)
            if following:
                state, length = following, length + 1
        return Match(length, state)

    def contexts(self, match: Match) -> Iterator[Match]:
        """The match and its ever shorter suffixes that occur more often; not the empty one."""
        length, state = match.length, self._owner(match)
        while state > ROOT:
            yield Match(length, state)
            state = self._link[state]
            length = self._length[state]

    def shorter(self, state: int) -> Match:
        """The longest suffix of a state's contexts that occurs more often."""
        state = self._link[state]
        return Match(self._length[state], state) if state > ROOT else NO_MATCH

    def children(self, state: int, min_share: float = 0.0) -> tuple[int, list[Child]]:
        """(how often a context went on, the tokens that followed in at least that share of it)."""
        count, latest = self._count, self._latest
        ways = self._ways.get(state)
        if ways is None:
            token, after = self._token[state], self._next[state]
            found = [Child(token, count[after], latest[after], after)] if after else []
            return sum(child.times for child in found), found
        total = sum(map(count.__getitem__, ways.values()))
        least = min_share * total
        return total, [
            Child(token, count[after], latest[after], after)
            for token, after in ways.items()
            if count[after] >= least
        ]

    def nbytes(self) -> int:
        """Memory of the arrays and dictionaries, roughly."""
        arrays = (self._length, self._link, self._count, self._latest, self._token, self._next)
        ways = sum(ways.__sizeof__() + 32 * len(ways) for ways in self._ways.values())
        return sum(a.itemsize * len(a) for a in arrays) + self._ways.__sizeof__() + ways

    def _owner(self, match: Match) -> int:
        """State of the match today: appending may have given short contexts a state of theirs."""
        state = match.state
        while state > ROOT and self._length[self._link[state]] >= match.length:
            state = self._link[state]
        return state

    def _step(self, state: int, token: int) -> int:
        """State after `token`, or 0."""
        if self._next[state] and self._token[state] == token:
            return self._next[state]
        ways = self._ways.get(state)
        return ways.get(token, 0) if ways is not None else 0

    def _lead(self, state: int, token: int, to: int) -> None:
        """Makes `token` lead from `state` to `to`."""
        if not self._next[state] or self._token[state] == token:
            self._token[state], self._next[state] = token, to
            if state in self._ways:
                self._ways[state][token] = to
            return
        ways = self._ways.get(state)
        if ways is None:
            ways = self._ways[state] = {self._token[state]: self._next[state]}
        ways[token] = to

    def _add_state(self, length: int) -> int:
        self._length.append(length)
        self._link.append(ROOT)
        self._count.append(0)
        self._latest.append(0)
        self._token.append(0)
        self._next.append(0)
        return len(self._length) - 1

    def _append(self, token: int) -> None:
        """One step of the construction: makes the live text's new state `_last`."""
        before = self._last
        known = self._step(before, token)
        if known:  # only at the beginning of a text that begins like another one
            self._last, self._is_new = self._exactly(before, token, known), False
            return
        self._last = self._add_state(self._length[before] + 1)
        self._is_new = True
        link, state = self._link, before
        while state >= ROOT:
            known = self._step(state, token)
            if known:
                link[self._last] = self._exactly(state, token, known)
                return
            self._lead(state, token, self._last)
            state = link[state]

    def _exactly(self, state: int, token: int, known: int) -> int:
        """The state of (longest context of `state` + token) alone, split off `known` if need be."""
        if self._length[state] + 1 == self._length[known]:
            return known
        clone = self._add_state(self._length[state] + 1)
        for column in (self._link, self._count, self._latest, self._token, self._next):
            column[clone] = column[known]
        if known in self._ways:
            self._ways[clone] = dict(self._ways[known])
        self._link[known] = clone
        while state >= ROOT and self._step(state, token) == known:
            self._lead(state, token, clone)
            state = self._link[state]
        return clone
