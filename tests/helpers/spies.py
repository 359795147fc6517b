"""Looks into a running call: its loop objects, and its cache against a fresh prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from specdec import hf_generate, loop
from specdec.drafters.base import Drafter, RoundResult
from specdec.loop import Call
from specdec.stats import RoundRecord
from specdec.target import HFTarget
from specdec.tree_cache import TreeCache

# Inside, these compute in float32 whatever the model's dtype: norms, rotary angles, routers.
UPCASTING = ("deepseek_v3", "gemma3n", "gemma3n_kvshare", "gemma4", "gptj", "llama4_text")


@dataclass(frozen=True)
class Seen:
    """The objects of one call of the main loop."""

    target: HFTarget
    drafter: Drafter
    call: Call

    def texts(self) -> list[list[int]]:
        """Every row's known ids."""
        return self.call.state.tokens


Watcher = Callable[[Seen, RoundResult, RoundRecord], None]


def watch_calls(monkeypatch: pytest.MonkeyPatch, watcher: Watcher | None = None) -> list[Seen]:
    """Records every call of the loop; `watcher` looks at each of its rounds, prefill included."""
    calls: list[Seen] = []

    def run(target: Any, drafter: Drafter, call: Call) -> None:
        seen = Seen(target, drafter, call)
        calls.append(seen)
        if watcher is not None:
            call.observers = [*call.observers, lambda *round_: watcher(seen, *round_)]
        loop.speculative_generate(target, drafter, call)

    monkeypatch.setattr(hf_generate, "speculative_generate", run)
    return calls


@torch.no_grad()
def cache_error(model: Any, cache: TreeCache, texts: Sequence[Sequence[int]]) -> float:
    """Largest difference from a fresh prefill of `texts` but their last token, relative (I1)."""
    assert cache.host_lengths == [len(text) - 1 for text in texts]
    assert cache.lengths.tolist() == cache.host_lengths
    worst = 0.0
    for row, text in enumerate(texts):
        fresh = DynamicCache()  # without a config no layer forgets what left its window
        model(input_ids=torch.tensor([text[:-1]]), past_key_values=fresh, use_cache=True)
        assert len(fresh.layers) == len(cache.layers)
        for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
            for name in ("keys", "values"):
                wanted = getattr(theirs, name)[0]
                got = getattr(ours, name)[row, :, : wanted.shape[1]]
                scale = float(wanted.abs().max())
                assert scale > 0
                worst = max(worst, float((got - wanted).abs().max()) / scale)
    return worst


def tolerance(family: str) -> float:
    """What a cache may differ by in float64."""
    return 1e-6 if family in UPCASTING else 1e-12
