"""Looks into a running call: its loop objects, forwards, and its cache against plain's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from helpers.laws import Case
from helpers.names import CACHE, cache_of
from specdec import loop
from specdec.api import capability
from specdec.caches.tree_cache import TreeCache
from specdec.contracts import Drafter, RoundResult
from specdec.generate import decode
from specdec.loop import Call
from specdec.stats import RoundRecord
from specdec.targets.chain_target import ChainTarget

# Inside, these compute in float32 whatever the model's dtype: norms, rotary angles, routers.
UPCASTING = ("deepseek_v3", "gemma3n", "gemma3n_kvshare", "gemma4", "gptj", "llama4_text")


@dataclass(frozen=True)
class Seen:
    """The objects of one call of the main loop."""

    target: Any
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

    monkeypatch.setattr(decode, "speculative_generate", run)
    return calls


@torch.no_grad()
def cache_error(model: Any, cache: TreeCache, texts: Sequence[Sequence[int]]) -> float:
    """Largest difference from a fresh prefill of `texts` but their last token, relative (I1)."""
    assert cache.host_lengths == [len(text) - 1 for text in texts]
    assert cache.lengths.tolist() == cache.host_lengths
    worst = 0.0
    for row, text in enumerate(texts):
        fresh = DynamicCache()  # without a config no layer forgets what left its window
        model(input_ids=torch.tensor([text[:-1]]), **{CACHE: fresh}, use_cache=True)
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


# Chain mode: states

UPCASTING_STATES = ("qwen3_next", "qwen3_5", "falcon_h1", "mamba2", "bamba")
"""These scan in float32; BLOOM and MPT exist in it alone."""

_FOLDED = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class LayerState:
    """What a layer of a cache holds, copied: slots [B, H, S, D] and states [B, ...], by name."""

    slots: dict[str, Tensor]
    folded: dict[str, Tensor]


def layer_states(cache: Any) -> list[LayerState]:
    """Copies of what the layers of a Hugging Face cache hold."""
    found = []
    for layer in cache.layers:
        slots = {
            name: tensor.clone()
            for name in ("keys", "values")
            if (tensor := getattr(layer, name, None)) is not None and tensor.ndim == 4
        }
        folded = {
            f"{name} {index}": state.clone()
            for name in _FOLDED
            for index, state in getattr(layer, name, {}).items()
            if state is not None
        }
        found.append(LayerState(slots, folded))
    return found


@contextmanager
def watched_forwards(model: Any, watcher: Callable[[dict[str, Any], Any], None]) -> Iterator[None]:
    """Shows `watcher` the keyword arguments and the output of every forward of a block.

    A self-test that the hook makes due is not run in it.
    """
    known = capability(model) if "_specdec" in vars(model) else None
    hook = model.register_forward_hook(
        lambda _model, _args, kwargs, output: watcher(kwargs, output), with_kwargs=True
    )
    if known is not None:
        model._specdec.test.assume(model, known)
    try:
        yield
    finally:
        hook.remove()


def plain_states(case: Case) -> list[list[LayerState]]:
    """Layer states after the prompt and 0, 1, 2, ... further tokens of plain `generate`."""
    found: list[list[LayerState]] = []
    with watched_forwards(case.model, lambda _, out: found.append(layer_states(cache_of(out)))):
        case.generate(specdec=False)
    return found


def covered_tokens(seen: Seen) -> list[int]:
    """Tokens of each row behind its prompt that the state holds."""
    target, lengths = seen.target, seen.call.state.prompt_lengths
    assert isinstance(target, ChainTarget)
    return [covered - prompt for covered, prompt in zip(target._covered, lengths, strict=True)]


def state_error(seen: Seen, plain: Sequence[Sequence[LayerState]]) -> float:
    """Largest difference from plain's states after just as many tokens, relative; row by row.

    Also checks that attention layers hold as many slots of a row, aligned on the right.
    """
    cache, worst = seen.target.cache, 0.0
    for row, covered in enumerate(covered_tokens(seen)):
        tokens = seen.call.state.prompt_lengths[row] + covered
        if cache.width:
            assert cache.width - cache.padding[row] == tokens
        for ours, theirs in zip(layer_states(cache.cache), plain[covered], strict=True):
            assert ours.slots.keys() == theirs.slots.keys()
            assert ours.folded.keys() == theirs.folded.keys()
            for name, slots in ours.slots.items():
                shown = min(tokens, theirs.slots[name].shape[2])  # a window has forgotten the rest
                pair = slots[row, :, -shown:], theirs.slots[name][row, :, -shown:]
                worst = max(worst, relative_error(*pair))
            for name, state in ours.folded.items():
                worst = max(worst, relative_error(state[row], theirs.folded[name][row]))
    return worst


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def state_tolerance(case: Case) -> float:
    """What a state may differ by: wrong ones differ by a hundredth of their size and more."""
    exact = case.model.dtype == torch.float64 and case.family not in UPCASTING_STATES
    return 1e-12 if exact else 1e-4


def same_states(ours: Any, theirs: Any) -> float:
    """Largest difference between two caches, relative; layers, lengths and flags must be equal."""
    assert type(ours) is type(theirs)
    assert len(ours.layers) == len(theirs.layers)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is type(other)
        assert _flags(mine) == _flags(other)
    worst = 0.0
    for mine, other in zip(layer_states(ours), layer_states(theirs), strict=True):
        got, wanted = {**mine.slots, **mine.folded}, {**other.slots, **other.folded}
        assert got.keys() == wanted.keys()
        for name, tensor in got.items():
            assert tensor.dtype == wanted[name].dtype
            worst = max(worst, relative_error(tensor, wanted[name]))
    return worst


def _flags(layer: Any) -> dict[str, Any]:
    """Attributes of a layer that are neither tensors nor states."""
    return {
        name: value
        for name, value in vars(layer).items()
        if not isinstance(value, Tensor) and name not in _FOLDED
    }


class Reads(TorchDispatchMode):
    """Counts reads of a value, which would wait for an accelerator."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
        self.count += func.overloadpacket in waits
        return func(*args, **kwargs or {})
