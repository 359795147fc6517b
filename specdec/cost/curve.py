"""Measures what a forward over q tokens costs here, and picks lookahead sizes that pay.

The verification cost is the whole question on a given device: a GPU or a bf16 CPU verifies many
tokens at the price of one, an fp32 CPU does not.
"""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from specdec.caches.tree_cache import TreeCache
from specdec.hf.compat import input_device
from specdec.round.tree import TokenTree, TreeBatch
from specdec.targets.prompts import Prompt
from specdec.targets.self_test import evaluating
from specdec.targets.tree_target import HFTarget

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
_PREFIX = 64
_MIN_GAIN = 1.05  # predicted speed-up below which speculation is not worth its variance

LOOKAHEAD_PRIORS: Mapping[tuple[int, int, int], float] = {
    (1, 2, 1): 1.25,
    (1, 3, 1): 1.39,
    (2, 3, 2): 1.55,
    (3, 3, 3): 1.69,
    (2, 4, 2): 1.74,
    (3, 4, 3): 1.83,
    (5, 4, 5): 2.07,
    (7, 5, 7): 2.21,
    (10, 5, 10): 2.47,
    (15, 5, 15): 2.55,
}
"""Tokens per forward by (window, ngram, guesses), measured with a 260K-parameter story model on
openings as in docs/benchmarks.md#recipes: fluent prose that repeats itself little, so a cautious
guess."""


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Median seconds of a target forward over q tokens, at batch 1 and a short prefix."""

    seconds: Mapping[int, float]

    def ratio(self, nodes: int) -> float:
        """Cost of verifying `nodes` tokens relative to one, linear between measured sizes."""
        sizes = sorted(self.seconds)
        right = min(max(bisect.bisect_left(sizes, nodes), 1), len(sizes) - 1)
        low, high = sizes[right - 1], sizes[right]
        slope = (self.seconds[high] - self.seconds[low]) / (high - low)
        return (self.seconds[low] + slope * (nodes - low)) / self.seconds[1]


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with its options, and the speed-up that it was chosen for."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    predicted: float = 1.0


@torch.no_grad()
def measure_cost(model: Any, seconds: float = 1.0) -> CostCurve:
    """Times tree forwards of growing size on the model's device, for about `seconds`.

    Sizes are interleaved, so that a busy machine slows all of them alike; the model's cache and
    generator are left alone.
    """
    config, device = model.config.get_text_config(), input_device(model)
    longest = _PREFIX + max(_SIZES)
    positions = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    prefix = min(_PREFIX, positions // 2)
    ids = torch.arange(prefix, device=device)[None] % config.vocab_size
    cache = TreeCache(1, device, capacity=longest)
    target = HFTarget(model, Prompt(ids, None, [prefix]), cache)
    trees = {
        q: TreeBatch.from_rows([TokenTree.chain(0, [0] * (q - 1))], device, size=q)
        for q in _SIZES
        if prefix + q <= positions
    }
    times: dict[int, list[float]] = {q: [] for q in trees}
    with evaluating(model):
        target.prefill()
        start = time.perf_counter()
        while len(times[1]) < 3 or time.perf_counter() - start < seconds:
            for q, tree in trees.items():
                if q > 2 and time.perf_counter() - start > 2 * seconds:
                    break  # a slow model: the curve goes on linearly from what there is
                begin = time.perf_counter()
                target.forward_tree(tree).logits.argmax(-1).tolist()  # waits for the device
                times[q].append(time.perf_counter() - begin)
    # The first run of a size warms up.
    return CostCurve({q: statistics.median(t[1:] or t) for q, t in times.items() if t})


def choose_lookahead(curve: CostCurve) -> Choice:
    """The lookahead sizes with the best predicted speed-up, or `none` when none pays.

    The prediction divides the acceptance length of `LOOKAHEAD_PRIORS` by the measured cost; it
    knows nothing about the user's text.
    """
    best = Choice("none")
    for (window, ngram, guesses), acceptance in LOOKAHEAD_PRIORS.items():
        nodes = (window + guesses) * (ngram - 1)
        predicted = acceptance / curve.ratio(nodes)
        if predicted > max(best.predicted, _MIN_GAIN):
            options = {"window": window, "ngram": ngram, "guesses": guesses}
            best = Choice("lookahead", options, predicted)
    return best
