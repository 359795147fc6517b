"""A model's self-test that does not go stale: repeated when what it depended on has changed.

A model changes under an augmentation: it is sent to training mode, quantised in place, given hooks
or adapters. Before every call its state is compared with those that were tested; the newest few
verdicts are kept, so that going back and forth tests once.
"""

from __future__ import annotations

from collections import Counter
from threading import RLock
from typing import Any

from specdec.config import Kernels
from specdec.targets.attention_choice import with_attention
from specdec.targets.model_state import ModelState
from specdec.targets.randomness import why_random
from specdec.targets.self_test import Capability, probe

_KEPT = 4  # verdicts
_HARMLESS = 3  # changes of a module's values without another verdict, after which they are its own


def self_test(model: Any) -> Capability:
    """How the model, as it stands, can be verified; "plain" while its forward is random."""
    reason = why_random(model)
    return probe(model) if reason is None else Capability("plain", reason)


class WatchedTest:
    """The self-test of one model."""

    def __init__(self) -> None:
        self._verdicts: list[tuple[ModelState, Capability]] = []  # the newest first
        self._harmless: Counter[int] = Counter()
        self._lock = RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedTest:
        """A copy of the model is what the model is."""
        twin = WatchedTest()
        twin._verdicts, twin._harmless = list(self._verdicts), Counter(self._harmless)
        return twin

    def __reduce__(self) -> tuple[type[WatchedTest], tuple[()]]:
        """What is loaded may be another release's; it is tested anew."""
        return WatchedTest, ()

    def verdict(self, model: Any, kernels: Kernels = "off") -> Capability:
        """The model's capability as it stands now; tests it where that is not known.

        Args:
            model: Under test.
            kernels: What a call wants to compute its attention; tested, too, and in the reason.

        Raises:
            ConfigError: `kernels` cannot run where the model is.
        """
        with self._lock:
            return with_attention(model, self._verdict(model), kernels)

    def _verdict(self, model: Any) -> Capability:
        state = ModelState.of(model)
        passing = {index for index, n in self._harmless.items() if n >= _HARMLESS}
        for index, (known, found) in enumerate(self._verdicts):
            if known.same_as(state, passing):
                self._verdicts.insert(0, self._verdicts.pop(index))
                return found
        found = self_test(model)
        self._learn(state, ModelState.of(model), found)
        return self.assume(model, found)

    def assume(self, model: Any, found: Capability) -> Capability:
        """Takes `found` as what is known of the model as it stands."""
        self._verdicts.insert(0, (ModelState.of(model), found))
        del self._verdicts[_KEPT:]
        return found

    def _learn(self, before: ModelState, tested: ModelState, found: Capability) -> None:
        """Learns which modules change their own values: as they run, or with no consequence."""
        if before.facts == tested.facts:
            for index in before.noted_otherwise(tested):
                self._harmless[index] = _HARMLESS
        if not self._verdicts:
            return
        last, verdict = self._verdicts[0]
        if last.facts == before.facts and (verdict.mode, verdict.reason) == (
            found.mode,
            found.reason,
        ):
            self._harmless.update(last.noted_otherwise(before))
