"""Measures what a forward over q tokens costs here.

The verification cost is the whole question on a given device: a GPU or a bf16 CPU verifies many
tokens at the price of one, an fp32 CPU does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec.caches.tree_cache import TreeCache
from specdec.hf.compat import input_device
from specdec.round.tree import TokenTree, TreeBatch
from specdec.targets.prompts import Prompt
from specdec.targets.self_test import evaluating
from specdec.targets.tree_target import HFTarget
from specdec_kernels import Backend

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Tokens a row at which t(q) is measured: those that trees are padded to."""
_PREFIX = 64
_ALWAYS = 2  # sizes up to this one are measured however slow the model is
_WARMING, _WARMING_SECONDS = 8, 0.1  # the first that is reached
_IN_A_ROW = 4
_TICK = 1e-9  # seconds; no clock tells less


@dataclass(frozen=True, slots=True)
class CostCurve:
    """t(q): typical seconds of a target forward over q tokens a row, by q."""

    seconds: Mapping[int, float]

    def ratio(self, size: float) -> float:
        """t(size) / t(1): linear between measured sizes, and on beyond the last two.

        1 where fewer than two sizes were measured. A wider forward is never taken to be cheaper
        than the widest that was measured: the slope of two like times is noise.
        """
        points = sorted(self.seconds.items())
        if len(points) < 2 or points[0][0] != 1 or points[0][1] <= 0:
            return 1.0
        right = next((i for i, (q, _) in enumerate(points) if q >= size), len(points) - 1)
        (low, t_low), (high, t_high) = points[max(right, 1) - 1], points[max(right, 1)]
        at_size = t_low + (t_high - t_low) * (size - low) / (high - low)
        if size > high:
            at_size = max(at_size, t_low, t_high)
        return at_size / points[0][1]


class CurveMeter:
    """Times target forwards over growing trees, a little at a time.

    Sizes take turns, and the measurement can be spread over other work, so that a busy machine
    slows all alike. On a CPU with one thread the clock is processor time, which waiting for the
    processor does not lengthen. The model's own cache and generator are left alone.

    Args:
        model: The target; verified by trees (`specdec.targets.self_test(model).mode == "tree"`).
        batch: Rows.
        prefix: Tokens of each row before the forward, as far as the model has room for them.
        backend: What runs tree attention, as the self-test found; None for dense masks.
    """

    def __init__(
        self,
        model: Any,
        batch: int = 1,
        prefix: int = _PREFIX,
        backend: Backend | None = None,
    ) -> None:
        self._model, self._batch = model, batch
        self._target, self.prefix, room = _prefilled_parts(model, batch, prefix, backend)
        self._times: dict[int, list[float]] = {q: [] for q in SIZES if q <= room}
        self._read = False
        self._clock = time.perf_counter
        if input_device(model).type == "cpu" and torch.get_num_threads() == 1:
            self._clock = time.process_time

    @torch.no_grad()
    def measure(self, seconds: float) -> None:
        """Goes on for about so long; a slow model takes longer, but skips the larger sizes."""
        start = time.perf_counter()
        late = start + 2 * seconds
        with evaluating(self._model):
            if not self._read:
                self._target.prefill()
                self._read = True
            while True:
                for q, taken in self._times.items():
                    if q > _ALWAYS and time.perf_counter() > late:
                        break
                    # All sizes once, before any is looked at closely: models can be slow.
                    taken += self._in_a_row(q, late if taken else start)
                if time.perf_counter() - start >= seconds:
                    return

    def curve(self) -> CostCurve:
        """Medians of what was measured."""
        return CostCurve({q: _typical(taken) for q, taken in self._times.items() if taken})

    def _in_a_row(self, size: int, late: float) -> list[float]:
        """Seconds of forwards of one size that follow others of the same size; one when it is late.

        As in a decoding loop, where every tree brings its own masks. After a larger size it takes
        a small model several forwards until the processor's caches hold what they hold then.
        """
        device = input_device(self._model)
        times: list[float] = []
        began, warming = time.perf_counter(), 0
        while not times or (len(times) < _IN_A_ROW and time.perf_counter() < late):
            rows = [TokenTree.chain(0, [0] * (size - 1))] * self._batch
            tree = TreeBatch.from_rows(rows, device, size)
            begin = self._clock()
            self._target.forward_tree(tree).logits.argmax(-1).tolist()  # waits for the device
            taken = self._clock() - begin
            spent = time.perf_counter() - began
            if spent > _WARMING_SECONDS or warming >= _WARMING:
                times.append(taken)
            warming += 1
        return times


def _typical(seconds: Sequence[float]) -> float:
    """The median, or the mean where most forwards are shorter than a tick of the clock."""
    return statistics.median(seconds) or max(statistics.fmean(seconds), _TICK)


def _prefilled_parts(
    model: Any, batch: int, prefix: int, backend: Backend | None
) -> tuple[HFTarget, int, int]:
    """A target over a prompt that is still to be run, its length, and the positions after it."""
    config, device = model.config.get_text_config(), input_device(model)
    longest = prefix + max(SIZES)
    positions = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    prefix = min(prefix, max(positions - max(SIZES), positions // 2))
    ids = torch.arange(prefix, device=device)[None].expand(batch, -1) % config.vocab_size
    cache = TreeCache(batch, device, capacity=longest)
    prompt = Prompt(ids, None, [prefix] * batch)
    return HFTarget(model, prompt, cache, backend=backend), prefix, positions - prefix


def measure_cost(
    model: Any, seconds: float = 1.0, batch: int = 1, backend: Backend | None = None
) -> CostCurve:
    """t(q) behind a short prefix, measured all at once for about `seconds`; see `CurveMeter`."""
    meter = CurveMeter(model, batch, backend=backend)
    meter.measure(seconds)
    return meter.curve()
