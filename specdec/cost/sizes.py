"""Picks sizes of a method that pay here, by what its class says that they emit (`priors`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specdec.cost.curve import CostCurve
from specdec.registry import methods

_MIN_GAIN = 1.05  # predicted speed-up below which speculation is not worth its variance


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with its options, and the speed-up that it was chosen for."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    predicted: float = 1.0


def choose_sizes(curve: CostCurve, method: str) -> Choice:
    """The sizes of `method` with the best predicted speed-up, or `none` when none pays.

    The prediction divides the tokens per forward of the method's `priors` by the measured cost; it
    knows nothing about the user's text.
    """
    best = Choice("none")
    for options, tokens in methods.priors(method):
        nodes = methods.create(method, options).max_nodes
        predicted = tokens / curve.ratio(nodes + 1)
        if predicted > max(best.predicted, _MIN_GAIN):
            best = Choice(method, options, predicted)
    return best
