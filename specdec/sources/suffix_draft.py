"""Grows a token tree, most probable node first, from what followed the text's suffix before.

SuffixDecoding (arXiv 2411.04975) scores a path by the product of its tokens' frequencies and lets
the size follow the match. Here all contexts, long and short and of several indexes, grow one tree:
a context that was seen n times and is L tokens long keeps weight `novelty / L` for a token that
never followed it, against n for those that did. So a long match is believed at its first occurrence
and a short one only where it repeats, and shorter contexts fill the nodes that longer ones leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from math import log
from typing import NamedTuple

from specdec.sources.suffix_index import Match, SuffixIndex

_CONTEXTS = 4  # of a match; measured: more of them add work and no accepted tokens


@dataclass(frozen=True, slots=True)
class View:
    """A text's place in an index.

    Attributes:
        index: The automaton that the text is followed in.
        match: The longest suffix of the text in it.
        source: Number of the index, for statistics; among equals the lower one goes first.
        novelty: Weight of the unseen; higher for texts that are less like this one.
    """

    index: SuffixIndex
    match: Match
    source: int = 0
    novelty: float = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a draft ends.

    Attributes:
        nodes: Most nodes of a draft, the root not counted.
        depth: Deepest level.
        min_probability: Least estimated probability of a node, its path included.
        chain: Whether only one path may grow.
    """

    nodes: int
    depth: int
    min_probability: float
    chain: bool = False


class Draft(NamedTuple):
    """A tree without its root, which is node 0: parents are numbered from it.

    Attributes:
        tokens: Token of nodes 1, 2, ...
        parents: Node above each token; 0 is the root.
        scores: Log-probability of the path to them.
        sources: Number of the index that each token comes from.
    """

    tokens: list[int]
    parents: list[int]
    scores: list[float]
    sources: list[int]

    def paths(self) -> list[tuple[list[int], float]]:
        """(tokens, log-probability) of every path from the root to a leaf, best first."""
        found = []
        for leaf in sorted(set(range(1, len(self.tokens) + 1)) - set(self.parents)):
            node, path = leaf, []
            while node:
                path.append(self.tokens[node - 1])
                node = self.parents[node - 1]
            found.append((path[::-1], self.scores[leaf - 1]))
        return sorted(found, key=lambda entry: -entry[1])


# A node that may be added. In the order of preference: minus its probability, number of its source,
# minus its latest position, a running number that ends every comparison. Then what it is: view,
# match, parent, depth, token.
_Candidate = tuple[float, int, int, int, View, Match, int, int, int]


class _Growth:
    """A tree in the making."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._heap: list[_Candidate] = []
        self._made = 0
        self._nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        self.draft = Draft([], [], [], [])

    def offer(self, view: View, match: Match, parent: int, depth: int, probability: float) -> None:
        """Makes candidates of what followed a context, for the level `depth`."""
        index = view.index
        least = self._limits.min_probability / probability
        total, children = index.children(match.state, least)
        while not total and match.length:
            # The end of a text: on with what followed its suffix before, as in a loop.
            match = index.shorter(match.state)
            total, children = index.children(match.state, least) if match.length else (0, [])
        if not children:
            return
        weight = probability / (total + view.novelty / match.length)
        for token, times, latest, state in children:
            if weight * times >= self._limits.min_probability:
                self._made += 1
                after = Match(match.length + 1, state)
                preference = (-weight * times, view.source, -latest, self._made)
                heappush(self._heap, (*preference, view, after, parent, depth, token))

    def run(self) -> Draft:
        """Adds the best candidate until there is none, or no room."""
        tokens, parents, scores, sources = self.draft
        while self._heap:
            minus_probability, source, _, _, view, match, parent, depth, token = heappop(self._heap)
            node = self._nodes.get((parent, token))
            if node is None:
                if len(tokens) >= self._limits.nodes:
                    break
                if self._limits.chain and parent != len(tokens):
                    continue  # a sibling of a node of the path
                tokens.append(token)
                parents.append(parent)
                scores.append(log(-minus_probability))
                sources.append(source)
                node = self._nodes[parent, token] = len(tokens)
            if depth < self._limits.depth:
                self.offer(view, match, node, depth + 1, -minus_probability)
        return self.draft


def draft_tree(views: Sequence[View], limits: Limits) -> Draft:
    """The most probable continuations of a text, by all `views` of it.

    Equal paths become one, with the score of the context that believes most in it. A path that runs
    into the end of a text goes on as that text's own suffix did; all others occurred as they are.
    """
    growth = _Growth(limits)
    if limits.nodes > 0 and limits.depth > 0:
        for view in views:
            for match in islice(view.index.contexts(view.match), _CONTEXTS):
                growth.offer(view, match, parent=0, depth=1, probability=1.0)
    return growth.run()
