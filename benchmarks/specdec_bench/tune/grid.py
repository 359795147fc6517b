"""What the tuner may choose from: methods, the sizes of each, and how it moves among them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.errors import ConfigError
from specdec.registry import methods

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method with its sizes; hashable, for results are kept by it.

    Attributes:
        method: Drafting method.
        options: (name, value) pairs, in the order of the grid.
    """

    method: str
    options: Options = ()

    @property
    def mapping(self) -> dict[str, Any]:
        """The options by name."""
        return dict(self.options)

    def __str__(self) -> str:
        """As arms are written: "recycling:nodes=8,top_k=4"."""
        text = ",".join(f"{name}={value}" for name, value in self.options)
        return f"{self.method}:{text}" if text else self.method


@dataclass(frozen=True)
class Grid:
    """The sizes of one method.

    Attributes:
        method: Its name.
        axes: Option -> its values, in rising order.
        starts: Where climbs begin: indices into the axes.
    """

    method: str
    axes: Mapping[str, Sequence[Any]]
    starts: Sequence[Sequence[int]]

    def at(self, place: Sequence[int]) -> Candidate:
        """The candidate at these indices."""
        pairs = zip(self.axes.items(), place, strict=True)
        return Candidate(self.method, tuple((name, values[i]) for (name, values), i in pairs))

    def candidates(self) -> list[Candidate]:
        """All points that the method accepts and that are not the same as another."""
        places = itertools.product(*(range(len(values)) for values in self.axes.values()))
        found = (self.at(place) for place in places)
        return [candidate for candidate in found if _makes_sense(candidate)]

    def steps(self) -> list[tuple[int, ...]]:
        """One step along every axis, both ways."""
        axes = range(len(self.axes))
        return [tuple(by if i == axis else 0 for i in axes) for axis in axes for by in (-1, 1)]

    def moved(self, place: Sequence[int], step: Sequence[int]) -> tuple[int, ...] | None:
        """The place one step further; None beyond the end of an axis."""
        there = tuple(at + by for at, by in zip(place, step, strict=True))
        sizes = map(len, self.axes.values())
        inside = all(0 <= at < size for at, size in zip(there, sizes, strict=True))
        return there if inside else None


_GRIDS: Mapping[str, Grid] = {
    grid.method: grid
    for grid in (
        Grid(
            "lookahead",
            {
                "window": (0, 1, 2, 3, 5, 7, 10, 15),
                "ngram": (2, 3, 4, 5),
                "guesses": (1, 2, 3, 5, 7, 10, 15),
            },
            ((1, 1, 1), (5, 3, 4)),
        ),
        Grid(
            "prompt_lookup",
            {
                "max_ngram": (2, 3, 4, 6),
                "min_ngram": (1, 2, 3),
                "num_draft_tokens": (1, 2, 3, 5, 7, 10, 16, 24),
                "tokens_per_match": (1, 2, 3, 5, 10),
            },
            ((2, 0, 5, 2), (2, 1, 3, 1)),
        ),
        Grid(
            "suffix",
            {
                "max_nodes": (2, 4, 7, 11, 16, 32, 64),
                "nodes_per_match": (0.5, 1.0, 2.0, 4.0, 8.0),
                "extra_nodes": (0, 1, 2, 4, 8),
                "min_probability": (0.05, 0.1, 0.2, 0.35, 0.5, 0.7),
            },
            ((5, 3, 3, 1), (2, 2, 1, 3)),
        ),
        Grid(
            "recycling",
            {"nodes": (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 80), "top_k": (2, 4, 8)},
            ((4, 1), (8, 2)),
        ),
        Grid(
            "jacobi",
            {"block": (1, 2, 3, 5, 8, 16, 32), "recycle": (0, 2, 4), "ngram": (3, 4, 8)},
            ((2, 1, 1), (5, 2, 2)),
        ),
        Grid(
            "draft_model",
            {"num_draft_tokens": (1, 2, 3, 4, 5, 7, 10), "top_k": (1, 2, 4)},
            ((2, 0), (4, 0)),
        ),
        Grid(
            "eagle3",
            {
                "depth": (1, 2, 3, 4, 5, 6, 8, 10, 12),
                "top_k": (1, 2, 3, 4, 6, 8, 10),
                "beam": (1, 2, 10),
                "nodes": (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63),
                "confidence_threshold": (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
            },
            ((6, 0, 2, 10, 3), (3, 2, 0, 4, 0), (3, 2, 2, 4, 2), (4, 5, 2, 9, 0)),
        ),
    )
}


def grid_of(method: str, on_cpu: bool) -> Grid:
    """The grid of a method.

    Args:
        method: Its name.
        on_cpu: Options that only work there are left out elsewhere.

    Raises:
        ConfigError: There is none.
    """
    if method not in _GRIDS:
        raise ConfigError(f"nothing to tune in method {method!r}; tuned are {', '.join(_GRIDS)}")
    grid = _GRIDS[method]
    if method == "eagle3" and not on_cpu:
        axes = {**grid.axes, "confidence_threshold": (0.0,)}
        return Grid(method, axes, [(*start[:-1], 0) for start in grid.starts])
    return grid


def tunable() -> list[str]:
    """Methods that have a grid."""
    return list(_GRIDS)


def climb(
    grid: Grid, value: Callable[[Candidate], float | None], most: int
) -> dict[Candidate, float]:
    """Values of the candidates on the way to a best one, from every start of the grid.

    A step that helps is taken at once, and again for as long as it helps: to look all around before
    every step takes about twice as many looks.

    Args:
        grid: Where to look.
        value: The higher the better; None when a candidate cannot run. Asked once for each.
        most: Candidates to ask about, over all starts.
    """
    found: dict[Candidate, float] = {}
    asked: set[Candidate] = set()

    def look(place: tuple[int, ...]) -> float:
        candidate = grid.at(place)
        if candidate not in asked and len(asked) < most and _makes_sense(candidate):
            asked.add(candidate)
            known = value(candidate)
            if known is not None:
                found[candidate] = known
        return found.get(candidate, float("-inf"))

    for start in grid.starts:
        here, helped = tuple(start), True
        best = look(here)
        while helped:
            helped = False
            for step in grid.steps():
                while (there := grid.moved(here, step)) is not None and look(there) > best:
                    here, best, helped = there, look(there), True
    return found


def _makes_sense(candidate: Candidate) -> bool:
    """Whether the method takes the options, and no smaller ones mean the same."""
    options = candidate.mapping
    if candidate.method == "eagle3":
        depth, width, nodes = options["depth"], options["top_k"], options["nodes"]
        beam, axes = options["beam"], _GRIDS[candidate.method].axes
        if depth == 1 and options["confidence_threshold"]:  # there is nothing deeper to leave out
            return False
        # A chain has no other nodes than its levels: the largest value stands for "all of them".
        if width == 1:
            return bool(nodes == axes["nodes"][-1] and beam == axes["beam"][-1])
        # So it does for nodes that are continued: no level of a tree has more of them than top_k.
        if beam >= width and beam != axes["beam"][-1]:
            return False
        return bool(depth <= nodes <= width + (depth - 1) * min(beam, width) * width)
    if candidate.method == "draft_model":  # its draft is added when it runs
        return True
    try:
        methods.configure(candidate.method, options)
    except ConfigError:
        return False
    return True
