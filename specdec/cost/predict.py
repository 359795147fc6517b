"""The speed-up that theory gives, from what a forward over q tokens costs and what rounds emitted.

The prediction knows nothing of timed answers. With tau tokens a round,

    S = (prefill + rounds0 * (forward0 + rest0))
        / (prefill + rounds * (draft + v * forward0 + rest))

where `forward0` and `rest0` are those of the loop without speculation, rounds is rounds0 / tau for
the same text, and v is the mean of t(q) / t(1) over the sizes that the method's forwards had.
Without the prefill this is the familiar tau / (v + draft + rest). What a measured speed-up lacks of
it is the residual: costs that neither the curve nor the timers of the loop see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specdec.cost.curve import CostCurve

_FORWARD, _VERIFY = "forward", "verify"
_REST = ("verify", "commit", "observe")


@dataclass(frozen=True)
class RoundCosts:
    """The rounds of one method, summed over some answers.

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

    def per_round(self, *names: str) -> float:
        """Seconds a round of these stages; 0 without rounds."""
        return sum(self.stages.get(name, 0.0) for name in names) / max(self.rounds, 1)

    def relative_forward(self, curve: CostCurve) -> float:
        """Mean of t(q) / t(1) over its forwards."""
        count = sum(self.sizes.values())
        total = sum(curve.ratio(q) * times for q, times in self.sizes.items())
        return total / count if count else 1.0


def predict(
    arm: RoundCosts, baseline: RoundCosts, curve: CostCurve, on_device: bool = False
) -> float | None:
    """The speed-up over the baseline that theory gives, see the top of this module.

    Args:
        arm: Rounds of the method.
        baseline: Those of the loop without speculation, on the same texts.
        curve: t(q) of the same dtype and batch.
        on_device: On a GPU. There the host runs ahead and waits in the verify stage, so forward and
            verify are one.

    Returns:
        None where rounds or stages are missing.
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
