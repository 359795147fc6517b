"""Lookahead decoding, to hold the drafter against: a page of plain Python after the paper.

Fu et al., arXiv 2402.02057. A hypothesis is the tuple of tokens behind the text's last one, and a
hypothesis is right when it is the greedy text. The model is a function of the whole text, asked
again for every token; there is no tree, no mask and no cache.

As in the paper and its code: a window of W columns and N - 1 levels, filled by N - 2 warm-up steps
out of W + N - 3 tokens drawn from the prompt; every step, the deepest level of every column gives a
new token, the window moves by one level, however many tokens were accepted, and W n-grams go into
a pool that keeps the G latest of every first token; the n-grams of the current token are verified.

Other than in the paper, and meant to be:
 - the window's own tokens are hypotheses too, so one of them may be accepted;
 - a hypothesis that is accepted as a whole is followed by the model's next token;
 - n-grams are verified from the first step on, those that begin alike as one, so that G (N - 1)
   tokens hold more of them, the latest first; `extend`: where room is left, the n-grams of the last
   token of an n-gram follow it, up to twice its length, breadth first;
 - `harvest`: also kept are the model's next token after every hypothesis, in their order and before
   the window's n-grams, and the ends of those n-grams, right after each;
 - `from_prompt`: also kept are the n-grams of the text, after the window's;
 - a budget too small for the window takes its last columns away, and a large one begins it anew;
 - `chain`, for targets that verify one hypothesis alone: the first of the longest of the pool, or,
   where the pool has none, W tokens: the model's choices behind what was accepted of the last such
   hypothesis, then tokens drawn from the text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

Model = Callable[[Sequence[int]], int]
Path = tuple[int, ...]


class LatestGrams:
    """What followed a token, the latest last: `most` n-grams of every first token.

    Attributes:
        grams: First token -> n-grams without it.
    """

    def __init__(self, most: int) -> None:
        self.grams: dict[int, list[Path]] = {}
        self._most = most

    def keep(self, key: int, gram: Path) -> None:
        others = [other for other in self.grams.get(key, []) if other != gram]
        self.grams[key] = [*others, gram][max(0, len(others) + 1 - self._most) :]

    def keep_text(self, text: Sequence[int], ngram: int, count: int) -> None:
        """The n-grams that end with one of the last `count` tokens."""
        for end in range(max(ngram, len(text) - count + 1), len(text) + 1):
            gram = text[end - ngram : end]
            self.keep(gram[0], tuple(gram[1:]))

    def grow(self, current: int, found: dict[Path, None], room: int, deepest: int) -> None:
        """Adds paths to `found` up to `room` of them: the latest n-grams, breadth first."""
        ends: list[Path] = [()]
        for start in ends:  # which grows
            for gram in reversed(self.grams.get([current, *start][-1], [])):
                whole = (*start, *gram)
                if len(whole) > deepest:
                    continue
                for length in range(len(start) + 1, len(whole) + 1):
                    if len(found) >= room and whole[:length] not in found:
                        return
                    found.setdefault(whole[:length])
                if whole not in ends:
                    ends.append(whole)


def verified(model: Model, text: Sequence[int], hypotheses: Container[Path]) -> list[int]:
    """The tokens that are emitted: those of the longest right hypothesis, and the next one."""
    emitted = [model(text)]
    while tuple(emitted) in hypotheses:
        emitted.append(model([*text, *emitted]))
    return emitted


@dataclass
class ReferenceLookahead:
    """Lookahead decoding of one text, step by step.

    Attributes:
        model: The greedy choice after a text.
        text: Prompt, and what has been emitted; the decoding begins with one emitted token.
        window: W.
        ngram: N.
        guesses: G.
        seed: Of the tokens that are drawn.
        pool: The n-grams that are kept.
        levels: The window, level by level; level 0 without the current token.
    """

    model: Model
    text: list[int]
    window: int
    ngram: int
    guesses: int
    seed: int = 0
    from_prompt: bool = True
    extend: bool = True
    harvest: bool = True
    chain: bool = False
    levels: list[list[int]] = field(default_factory=list)
    columns: int = 0
    behind: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = LatestGrams(self.guesses)
        self.random = random.Random(self.seed)
        self.begin_window()
        if self.from_prompt:
            self.pool.keep_text(self.text, self.ngram, len(self.text))

    def step(self, budget: int | None = None) -> tuple[list[Path], list[int]]:
        """One step: (hypotheses in the order in which they are made, emitted tokens)."""
        full = (self.window + self.guesses) * (self.ngram - 1) - 1
        budget = full if budget is None else budget
        if self.chain:
            hypotheses = self._one(budget)
        else:
            if self.columns < self.window and budget >= full:
                self.begin_window()
            while self.columns and sum(map(len, self.levels)) > budget:
                self.columns -= 1
                self.levels = [level[:-1] for level in self.levels] if self.columns else []
            hypotheses = self._from_pool(budget - sum(map(len, self.levels)))
            for level, tokens in enumerate(self.levels):
                for column in range(len(tokens)):
                    hypotheses.setdefault(self._place(level, column))
        emitted = verified(self.model, self.text, hypotheses)
        self._learn(list(hypotheses), len(emitted) - 1)
        self.text += emitted
        if self.from_prompt:
            self.pool.keep_text(self.text, self.ngram, len(emitted))
        return list(hypotheses), emitted

    def begin_window(self) -> None:
        self.columns = self.window
        if self.window:
            length = self.window + self.ngram - 3
            self.levels = [[self.random.choice(self.text) for _ in range(length)]]

    def _place(self, level: int, column: int) -> Path:
        """What stands between the current token and this one, itself included."""
        if level == 0:
            return tuple(self.levels[0][: column + 1])
        down = [self.levels[deeper][column] for deeper in range(1, level + 1)]
        return (*self.levels[0][:column], *down)

    def _learn(self, hypotheses: list[Path], accepted: int) -> None:
        after = {path: self.model([*self.text, *path]) for path in [(), *hypotheses]}
        if self.harvest:
            for path, token in after.items():
                self.pool.keep([*self.text[-1:], *path][-1], (token,))
        if self.chain:
            self.behind = list(after.values())[accepted + 1 :]
        elif self.levels:
            self._move_window()

    def _move_window(self) -> None:
        newest = len(self.levels) - 1
        if newest < self.ngram - 2:  # warming up
            columns = range(len(self.levels[newest]))
            new = [self.model([*self.text, *self._place(newest, column)]) for column in columns]
            self.levels = [level[1:] for level in self.levels]
            self.levels.append(new[1:] if newest else new)
            return
        current, new = [self.text[-1], *self.levels[0]], []
        for column, key in enumerate(current):
            down = [level[column] for level in self.levels[1:]]
            new.append(self.model([*self.text, *self.levels[0][:column], *down]))
            gram = [*down, new[-1]]
            self.pool.keep(key, tuple(gram))
            for end in range(1, len(gram) if self.harvest else 0):
                self.pool.keep(gram[end - 1], tuple(gram[end:]))
        self.levels = [*self.levels[1:], new]
        self.levels[0] = self.levels[0][1:]

    def _from_pool(self, room: int) -> dict[Path, None]:
        found: dict[Path, None] = {}
        deepest = (self.ngram - 1) * (1 + self.extend)
        self.pool.grow(self.text[-1], found, room, deepest)
        return found

    def _one(self, budget: int) -> dict[Path, None]:
        paths = list(self._from_pool(budget))
        if not paths:
            missing = self.window - len(self.behind)
            drawn = [self.random.choice(self.text) for _ in range(missing)]
            paths = [tuple([*self.behind, *drawn][:budget])]
        longest = max(paths, key=len)
        return {longest[:length]: None for length in range(1, len(longest) + 1)}
