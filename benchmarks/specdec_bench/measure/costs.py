"""What a target forward over q tokens costs here, t(q), and the speed-up that it predicts.

The prediction knows nothing of the timed answers. With tau tokens a round,

    S = (prefill + rounds0 * (forward0 + rest0))
        / (prefill + rounds * (draft + v * forward0 + rest))

where `forward0` and `rest0` are the baseline's, rounds is rounds0 / tau for the same text, and v is
the mean of t(q) / t(1) over the sizes that the method's forwards really had. Without the prefill
this is the familiar tau / (v + draft + rest). What the measured speed-up lacks of it is the
residual: costs that neither the curve nor the timers of the loop see.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec.caches.tree_cache import TreeCache
from specdec.hf.compat import input_device
from specdec.round.tree import TokenTree, TreeBatch
from specdec.targets.prompts import Prompt
from specdec.targets.self_test import evaluating
from specdec.targets.tree_target import HFTarget
from specdec_bench.results.records import CurveRecord, PassRecord

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Tokens a row at which t(q) is measured: those that trees are padded to."""

_PREFIX = 128
_ALWAYS = 2  # sizes up to this one are measured however slow the model is
_WARMING, _WARMING_SECONDS = 8, 0.1  # the first that is reached
_IN_A_ROW = 4
_TICK = 1e-9  # seconds; no clock tells less
_FORWARD, _VERIFY = "forward", "verify"
_REST = ("verify", "commit", "observe")


class CurveMeter:
    """Times target forwards over growing trees, a little at a time.

    Sizes take turns, and a run spreads the measurement over its length, so that a busy machine
    slows all alike. On a CPU with one thread the clock is processor time, which waiting for the
    processor does not lengthen. The model's own cache and generator are left alone.

    Args:
        model: The target; verified by trees (`specdec.targets.self_test(model).mode == "tree"`).
        dtype: Name of its dtype, for the record.
        batch: Rows.
        prefix: Tokens of each row before the forward, as far as the model has room for them.
        prompt_tokens: Longest prompt of the settings that it is for, for the record.
    """

    def __init__(
        self, model: Any, dtype: str, batch: int, prefix: int = _PREFIX, prompt_tokens: int = 0
    ) -> None:
        self._model, self._dtype, self._batch = model, dtype, batch
        self._target, self._prefix, room = _prefilled_parts(model, batch, prefix)
        self._prompt_tokens = prompt_tokens
        self._times: dict[int, list[float]] = {q: [] for q in SIZES if q <= room}
        self._read = False
        self._clock = time.perf_counter
        if input_device(model).type == "cpu" and torch.get_num_threads() == 1:
            self._clock = time.process_time

    @torch.no_grad()
    def measure(self, seconds: float) -> None:
        """Goes on for about so long; a slow model takes longer, but skips the larger sizes."""
        start = time.perf_counter()
        with evaluating(self._model):
            if not self._read:
                self._target.prefill()
                self._read = True
            while True:
                for q, taken in self._times.items():
                    if q > _ALWAYS and time.perf_counter() - start > 2 * seconds:
                        break
                    taken += self._in_a_row(q)
                if time.perf_counter() - start >= seconds:
                    return

    def record(self) -> CurveRecord:
        """Medians of what was measured."""
        found = {str(q): _typical(taken) for q, taken in self._times.items() if taken}
        return CurveRecord(self._dtype, self._batch, found, self._prompt_tokens, self._prefix)

    def _in_a_row(self, size: int) -> list[float]:
        """Seconds of forwards of one size that follow others of the same size.

        As in a decoding loop, where every tree brings its own masks. After a larger size it takes
        a small model several forwards until the processor's caches hold what they hold then.
        """
        device = input_device(self._model)
        times: list[float] = []
        began, warming = time.perf_counter(), 0
        while len(times) < _IN_A_ROW:
            rows = [TokenTree.chain(0, [0] * (size - 1))] * self._batch
            tree = TreeBatch.from_rows(rows, device, size=len(rows[0]))
            begin = self._clock()
            self._target.forward_tree(tree).logits.argmax(-1).tolist()  # waits for the device
            taken = self._clock() - begin
            if warming and (warming >= _WARMING or time.perf_counter() - began > _WARMING_SECONDS):
                times.append(taken)
            warming += 1
        return times


def _typical(seconds: Sequence[float]) -> float:
    """The median, or the mean where most forwards are shorter than a tick of the clock."""
    return statistics.median(seconds) or max(statistics.fmean(seconds), _TICK)


def measure_curve(
    model: Any, dtype: str, batch: int, seconds: float = 1.0, prefix: int = _PREFIX
) -> CurveRecord:
    """t(q), measured all at once for about `seconds`; see `CurveMeter`."""
    meter = CurveMeter(model, dtype, batch, prefix)
    meter.measure(seconds)
    return meter.record()


def _prefilled_parts(model: Any, batch: int, prefix: int) -> tuple[HFTarget, int, int]:
    """A target over a prompt that is still to be run, its length, and the positions after it."""
    config, device = model.config.get_text_config(), input_device(model)
    longest = prefix + max(SIZES)
    positions = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    prefix = min(prefix, max(positions - max(SIZES), positions // 2))
    ids = torch.arange(prefix, device=device)[None].expand(batch, -1) % config.vocab_size
    cache = TreeCache(batch, device, capacity=longest)
    return HFTarget(model, Prompt(ids, None, [prefix] * batch), cache), prefix, positions - prefix


def cost_ratio(curve: CurveRecord, size: float) -> float:
    """t(size) / t(1): linear between measured sizes, and on beyond the last two.

    Args:
        curve: Measured.
        size: Tokens a row, at least 1.
    """
    points = sorted((int(q), seconds) for q, seconds in curve.seconds.items())
    if len(points) < 2 or points[0][0] != 1 or points[0][1] <= 0:
        return 1.0
    right = next((i for i, (q, _) in enumerate(points) if q >= size), len(points) - 1)
    right = max(right, 1)
    (low, t_low), (high, t_high) = points[right - 1], points[right]
    at_size = t_low + (t_high - t_low) * (size - low) / (high - low)
    return at_size / points[0][1]


@dataclass(frozen=True)
class RoundCosts:
    """The instrumented passes of one arm in one setting, summed up.

    Attributes:
        rounds: Target forwards after the prefill.
        prefill: Seconds until the first token.
        stages: Seconds by stage of the loop, the prefill left out.
        sizes: Tokens a row of a forward -> how often.
    """

    rounds: int
    prefill: float
    stages: Mapping[str, float]
    sizes: Mapping[int, int]

    @classmethod
    def of(cls, passes: Iterable[PassRecord]) -> RoundCosts:
        """Sums over units."""
        rounds, prefill = 0, 0.0
        stages, sizes = Counter[str](), Counter[int]()
        for found in passes:
            rounds += found.rounds
            prefill += found.first_token
            stages.update({k: v for k, v in found.stages.items() if k != "prefill"})
            sizes.update({int(q): count for q, count in found.sizes.items()})
        return cls(rounds, prefill, dict(stages), dict(sizes))

    def per_round(self, *names: str) -> float:
        """Seconds a round of these stages; 0 without rounds."""
        return sum(self.stages.get(name, 0.0) for name in names) / max(self.rounds, 1)

    def relative_forward(self, curve: CurveRecord) -> float:
        """Mean of t(q) / t(1) over its forwards."""
        count = sum(self.sizes.values())
        total = sum(cost_ratio(curve, q) * times for q, times in self.sizes.items())
        return total / count if count else 1.0


def predict(
    arm: RoundCosts, baseline: RoundCosts, curve: CurveRecord, on_device: bool = False
) -> float | None:
    """The speed-up over the baseline that theory gives, see the top of this module.

    Args:
        arm: Instrumented passes of the arm.
        baseline: Those of the baseline on the same units.
        curve: t(q) of the same dtype and batch.
        on_device: On a GPU. There the host runs ahead and waits in the verify stage, so forward and
            verify are one.

    Returns:
        None where rounds or stages are missing, as for arms that do not count them.
    """
    if not arm.rounds or not baseline.rounds or not arm.stages or not baseline.stages:
        return None
    scaled = (_FORWARD, _VERIFY) if on_device else (_FORWARD,)
    rest = tuple(name for name in _REST if name not in scaled)
    forward = baseline.per_round(*scaled)
    of_baseline = forward + baseline.per_round("draft", *rest)
    verification = arm.relative_forward(curve) * forward
    of_arm = arm.per_round("draft", *rest) + verification
    plain = baseline.prefill + baseline.rounds * of_baseline
    return plain / (arm.prefill + arm.rounds * of_arm)
