"""What the drafters that need no model propose, said once more in plain Python.

Each class decodes one text, or one batch of them, with a function of the whole text in place of the
target. A hypothesis is the tuple of tokens behind the text's last one. Written from the papers and
from what the drafters' docstrings promise; everything is counted and searched anew in every step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from helpers.reference_lookahead import LatestGrams, Model, Path, verified
from helpers.toy_target import Ranks


@dataclass
class ReferenceJacobi:
    """Jacobi decoding (arXiv 2305.10427) with recycled n-grams, as `jacobi` says.

    The block's tokens are replaced by the model's choices before them, those behind the accepted
    ones move up, and the end is filled with tokens of the text. Kept are, of every hypothesis, the
    last first, the model's choices as far as they are hypotheses themselves, then the text's
    n-grams. `chain`: the latest n-grams one after the other, then the block from that depth on.
    """

    model: Model
    text: list[int]
    block: int
    recycle: int
    ngram: int
    seed: int = 0
    chain: bool = False
    guesses: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random, self.pool = random.Random(self.seed), LatestGrams(self.recycle)
        self.pool.keep_text(self.text, self.ngram, len(self.text))

    def step(self, budget: int | None = None) -> tuple[list[Path], list[int]]:
        """(hypotheses in their order, emitted tokens)."""
        most = self.block + self.recycle * (self.ngram - 1)
        budget = most if budget is None else budget
        length = budget if self.chain else -(-budget * self.block // most)  # a share of it
        length = min(length, self.block)
        path = self._latest(length) if self.chain else []
        for depth in range(len(path), length):
            known = depth < len(self.guesses)
            path.append(self.guesses[depth] if known else self.random.choice(self.text))
        found = {tuple(path[:depth]): None for depth in range(1, len(path) + 1)}
        if not self.chain:
            self.pool.grow(self.text[-1], found, min(budget, most), 2 * (self.ngram - 1))
        emitted = verified(self.model, self.text, found)
        after = {path: self.model([*self.text, *path]) for path in [(), *found]}
        self.guesses = [after[tuple(path[:depth])] for depth in range(len(emitted), length + 1)]
        for start in reversed(after):
            run: list[int] = []
            while (*start, *run) in after and len(run) < self.ngram - 1:
                run.append(after[(*start, *run)])
            self.pool.keep([*self.text[-1:], *start][-1], tuple(run))
        self.text += emitted
        self.pool.keep_text(self.text, self.ngram, len(emitted))
        return list(found), emitted

    def _latest(self, length: int) -> list[int]:
        path: list[int] = []
        while len(path) < length and self.recycle:
            grams = self.pool.grams.get([*self.text[-1:], *path][-1])
            if not grams:
                break
            path += grams[-1]
        return path[:length]


def copied(text: Sequence[int], longest: int, shortest: int, most: int, trust: int) -> list[int]:
    """What prompt lookup proposes (Saxena 2023): what followed the longest suffix of the text that
    occurred before, where it did so last; `trust` tokens for each token of that suffix, `most` at
    all, and what is copied may be copied again.
    """
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if list(text[end - size : end]) == list(text[len(text) - size :]):
                known = list(text)
                for at in range(end, end + min(most, trust * size)):
                    known.append(known[at])
                return known[len(text) :]
    return []


@cache
def likeliest_ranks(nodes: int, depth: int, width: int) -> list[Path]:
    """Token Recycling's static tree as paths of ranks: the heaviest ones, parents before children.

    The first candidate weighs a half, candidate r 0.08 / r, a path the product; of equals the one
    below the earlier node.
    """
    found: list[Path] = [()]
    weights: dict[Path, float] = {(): 1.0}
    while len(found) <= nodes:
        options = []
        for order, path in enumerate(found):
            for rank in range(width if len(path) < depth else 0):
                if (*path, rank) not in weights:
                    weight = weights[path] * (0.08 / rank if rank else 0.5)
                    options.append((-weight, order, rank))
        if not options:
            break
        weight, order, rank = min(options)
        found.append((*found[order], rank))
        weights[found[-1]] = -weight
    return found[1:]


@dataclass
class ReferenceRecycling:
    """Token Recycling (arXiv 2408.08696): the candidates of every token, and a static tree of them.

    All rows share the candidates, which begin with what followed a token in the prompts, the latest
    first. After a step they are the model's at the first node that carried the token.
    """

    ranks: Ranks
    texts: list[list[int]]
    top_k: int
    nodes: int
    depth: int
    prompts: Sequence[Sequence[int]] = ()
    chain: bool = False
    known: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for text in self.prompts:
            for token, after in pairwise(text):
                others = [other for other in self.known.get(token, []) if other != after]
                self.known[token] = [after, *others]
        self.known = {token: found[: self.top_k] for token, found in self.known.items()}

    def step(
        self, active: Sequence[bool], budget: int | None = None
    ) -> list[tuple[list[Path], list[int]]]:
        """(hypotheses in their order, emitted tokens) of every row."""
        nodes = self.nodes if budget is None else min(budget, self.nodes)
        tree = likeliest_ranks(nodes, self.depth, 1 if self.chain else self.top_k)
        steps: list[tuple[list[Path], list[int]]] = []
        learnt: dict[int, list[int]] = {}
        for text, on in zip(self.texts, active, strict=True):
            if not on:
                steps.append(([], []))
                continue
            tokens: dict[Path, Path] = {(): ()}  # of the ranks that lead somewhere
            for path in tree:
                above = tokens.get(path[:-1])
                if above is not None:
                    candidates = self.known.get([text[-1], *above][-1], [])
                    if path[-1] < len(candidates):
                        tokens[path] = (*above, candidates[path[-1]])
            hypotheses = list(tokens.values())
            for path in hypotheses:
                candidates = list(self.ranks([*text, *path])[: self.top_k])
                learnt.setdefault([text[-1], *path][-1], candidates)
            steps.append((hypotheses[1:], verified(self._choice, text, hypotheses)))
        for text, (_, emitted) in zip(self.texts, steps, strict=True):
            text += emitted
        self.known |= learnt
        return steps

    def _choice(self, text: Sequence[int]) -> int:
        return self.ranks(text)[0]


_Option = tuple[float, int, Path, list[int]]  # minus probability and last place, path, context


@dataclass
class ReferenceSuffix:
    """SuffixDecoding (arXiv 2411.04975) over one text, every occurrence counted anew.

    A context is a suffix of the text that occurred before; one of L tokens that went on n times
    gives a token that followed it t times the probability t / (n + 1 / L). The longest four of
    those that differ in where they occurred grow one tree, the likeliest node first, of equals the
    one seen last; at the end of the text it goes on as behind a shorter context.
    """

    text: list[int]
    nodes: int
    depth: int
    least: float
    per_match: float
    extra: int
    chain: bool = False

    def draft(self, budget: int | None = None) -> dict[Path, float]:
        """Path -> its probability, in the order in which they are found."""
        text = self.text
        sizes = [n for n in range(1, len(text)) if len(self._ends(text[len(text) - n :])) > 1]
        matched, contexts = max(sizes, default=0), list[list[int]]()
        for size in range(matched, 0, -1):
            context = text[len(text) - size :]
            if not contexts or self._ends(context) != self._ends(contexts[-1]):
                contexts.append(context)
        room = min(self.nodes, int(self.per_match * matched) + self.extra)
        room = room if budget is None else min(room, budget)
        waiting: list[_Option] = []
        for context in contexts[:4]:
            self._offer(waiting, context, (), 1.0)
        found: dict[Path, float] = {}
        while waiting and room > 0:
            best = min(waiting, key=lambda option: option[:2])  # the first of equals
            waiting.remove(best)
            path, context = best[2:]
            if path not in found:
                if len(found) >= room:
                    break
                if self.chain and len(path) != len(found) + 1:
                    continue
                if self.chain and path[:-1] not in {(), *found}:
                    continue
                found[path] = -best[0]
            if len(path) < self.depth:
                self._offer(waiting, context, path, -best[0])
        return found

    def _ends(self, context: Sequence[int]) -> list[int]:
        size = len(context)
        return [end for end in range(size, len(self.text) + 1)
                if self.text[end - size : end] == list(context)]  # fmt: skip

    def _offer(
        self,
        waiting: list[_Option],
        context: list[int],
        path: Path,
        probability: float,
    ) -> None:
        ends = self._ends(context)
        while context and not [end for end in ends if end < len(self.text)]:
            context = context[1:]
            ends = self._ends(context)
        if not context:
            return
        latest = {self.text[end]: end + 1 for end in ends if end < len(self.text)}
        times = Counter(self.text[end] for end in ends if end < len(self.text))
        weight = probability / (times.total() + 1 / len(context))
        for token, count in times.items():
            if weight * count >= self.least:
                place = (-weight * count, -latest[token])
                waiting.append((*place, (*path, token), [*context, token]))
