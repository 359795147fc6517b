"""Calls that end in the middle: a failing streamer, a failing layer, Ctrl-C wherever it strikes.

The exception arrives unchanged, the cache stands at the last commit, the generator where plain
`generate` stands after as many tokens (after as many draws, when a processor or a criterion
raised), and the next call says what plain says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

import specdec
from helpers.hf import Oracle, ids_of, left_padded, oracle, plain, prompt, tiny_llama
from helpers.names import CACHE
from helpers.spies import Seen, cache_error, watch_calls
from specdec import SpecConfig
from specdec.api import capability
from specdec.round.pickers import picker_of
from specdec.stats import RoundRecord

NEW = 20
SAMPLED = {"do_sample": True, "top_k": 0}


class Stop(Exception):
    """What most of these tests throw."""


class Fuse:
    """Raises at its n-th use."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self._left, self._error = at, error

    def burn(self, *_: Any, **__: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error


class Streamer:
    """Keeps what it was given; fails in `put` or in `end`."""

    def __init__(self, put: Fuse | None = None, end: Fuse | None = None) -> None:
        self.steps: list[list[int]] = []
        self._put, self._end = put, end

    def put(self, value: Tensor) -> None:
        if self._put is not None:
            self._put.burn()
        self.steps.append(value.flatten().tolist())

    def end(self) -> None:
        if self._end is not None:
            self._end.burn()


class Processor(LogitsProcessor):
    """Fails when it is called often enough."""

    def __init__(self, fuse: Fuse) -> None:
        self._fuse = fuse

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._fuse.burn()
        return scores


class Criterion(StoppingCriteria):
    """Fails when it is asked often enough."""

    def __init__(self, fuse: Fuse) -> None:
        self._fuse = fuse

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._fuse.burn()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@contextmanager
def hooked(model: Any, layer: int, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward pre-hook for the length of a block, which no self-test runs into."""
    known = capability(model) if "_specdec" in vars(model) else None
    handle = model.model.layers[layer].register_forward_pre_hook(hook)
    if known is not None:
        model._specdec.test.assume(model, known)
    try:
        yield
    finally:
        handle.remove()


def plant(where: str, fuse: Fuse, model: Any, stack: ExitStack,
          patch: pytest.MonkeyPatch) -> dict[str, Any]:  # fmt: skip
    """Arranges for the fuse to burn; returns what the call needs besides."""
    if where == "streamer.put":
        return {"streamer": Streamer(put=fuse)}
    if where == "streamer.end":
        return {"streamer": Streamer(end=fuse)}
    if where == "processor":
        return {"logits_processor": [Processor(fuse)]}
    if where == "criterion":
        return {"stopping_criteria": [Criterion(fuse)]}
    if where == "a layer":  # the layers before it have written their slots by then
        stack.enter_context(hooked(model, 1, fuse.burn))
    elif where != "on_round":
        method = getattr(Oracle, where)

        def burning(*args: Any) -> Any:
            fuse.burn()
            return method(*args)

        patch.setattr(Oracle, where, burning)
    return {}


def committed(seen: Seen, model: Any, free: Tensor, width: int) -> None:
    """Asserts that cache and text belong together (I1, I7)."""
    texts = [list(text) for text in seen.texts()]
    for row, text in enumerate(texts):
        emitted = seen.call.state.emitted(row)
        assert text[len(text) - emitted :] == free[row, width : width + emitted].tolist()
        if not emitted:  # after the prefill, before its token: the cache holds the whole prompt
            text.append(0)
    if any(seen.target.cache.host_lengths):
        assert cache_error(model, seen.target.cache, texts) <= 1e-12


INTERRUPTIONS = [
    *(("streamer.put", at) for at in (1, 2, 3, 9)),
    ("streamer.end", 1),
    *(("a layer", at) for at in (1, 2, 4)),
    *(("propose", at) for at in (1, 3)),
    *(("observe", at) for at in (1, 3)),
    ("observe_prefill", 1),
    ("start", 1),
    *(("on_round", at) for at in (1, 2, 4)),
    *(("processor", at) for at in (1, 2, 9)),
    *(("criterion", at) for at in (1, 2, 9)),
]


@pytest.mark.fault
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("where", "at"), INTERRUPTIONS)
def test_a_call_that_ends_in_the_middle(
    where: str,
    at: int,
    sampled: dict[str, Any],
    error: type[BaseException],
    llama: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_row = where in ("processor", "criterion")  # unknown ones make a batch run plain
    inputs = {"input_ids": prompt()} if one_row else left_padded((9, 4, 6))
    call = {**inputs, "max_new_tokens": NEW, **sampled}
    torch.manual_seed(1)
    free = plain(llama, **call)
    calls = watch_calls(monkeypatch)
    fuse = Fuse(at, error)
    config = oracle(free, 9)
    if where == "on_round":
        config = SpecConfig(config.method, config.options, on_round=fuse.burn)
    torch.manual_seed(1)
    with monkeypatch.context() as patch, ExitStack() as stack:
        more = plant(where, fuse, llama, stack, patch)
        stack.enter_context(pytest.raises(error))
        llama.generate(**call, **more, specdec=config)
    state = torch.get_rng_state()
    steps = 0
    if calls:  # a streamer may fail on the prompt, before the loop begins
        committed(calls[-1], llama, free, 9)
        steps = max(map(calls[-1].call.state.emitted, range(len(free))))
    torch.manual_seed(1)
    if one_row:  # plain's own generator, when they raise there
        again = plant(where, Fuse(at, error), llama, ExitStack(), monkeypatch)
        with pytest.raises(error):
            plain(llama, **call, **again)
    elif steps:
        plain(llama, **{**call, "max_new_tokens": steps})
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(more.get("streamer"), Streamer):
        given = more["streamer"].steps[1:]
        assert given == free[:, 9 : 9 + len(given)].T.tolist()
    for settings in (config.__class__(config.method, config.options), SpecConfig("lookahead")):
        torch.manual_seed(1)
        assert torch.equal(llama.generate(**call, specdec=settings), free)


@pytest.mark.fault
@pytest.mark.parametrize("where", ["streamer.put", "a layer", "on_round"])
def test_a_users_cache_is_left_at_the_last_turn(
    where: str, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn that failed can be made again."""
    cache = DynamicCache()
    said = llama.generate(prompt(), max_new_tokens=NEW, **{CACHE: cache})
    held = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    ids = torch.cat([ids_of(said), prompt(3, seed=3)], 1)
    wanted = plain(llama, ids, max_new_tokens=NEW)
    fuse = Fuse(4, Stop)
    on_round = fuse.burn if where == "on_round" else None
    with monkeypatch.context() as patch, ExitStack() as stack:
        more = plant(where, fuse, llama, stack, patch)
        stack.enter_context(pytest.raises(Stop))
        llama.generate(
            ids, max_new_tokens=NEW, **{CACHE: cache}, **more,
            specdec=SpecConfig("lookahead", on_round=on_round),
        )  # fmt: skip
    assert cache.get_seq_length() == ids_of(said).shape[1] - 1
    for layer, (keys, values) in zip(cache.layers, held, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert torch.equal(llama.generate(ids, max_new_tokens=NEW, **{CACHE: cache}), wanted)


@pytest.mark.fault
def test_an_interrupted_call_leaves_the_models_mode() -> None:
    """Training mode, attention backend and hooks are as before, and the wrapper still works."""
    model = specdec.augment(tiny_llama(), "prompt_lookup").train()
    backend = model.config._attn_implementation
    with (
        hooked(model, 1, Fuse(5, KeyboardInterrupt).burn),
        pytest.raises(KeyboardInterrupt),
    ):
        model.generate(prompt(), max_new_tokens=NEW, do_sample=False)
    assert model.training
    assert model.config._attn_implementation == backend
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    model.eval()
    wanted = plain(model, prompt(), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=NEW, do_sample=False), wanted)


@pytest.mark.fault
@pytest.mark.parametrize("forward", [2, 4, 10])
def test_an_interrupted_self_test_leaves_the_model_alone(forward: int) -> None:
    """Ctrl-C while `augment` runs its forwards, in training mode and out of it."""
    model = tiny_llama().train()
    with (
        hooked(model, 0, Fuse(forward, KeyboardInterrupt).burn),
        pytest.raises(KeyboardInterrupt),
    ):
        specdec.augment(model, "prompt_lookup")
    assert model.training
    assert "generate" not in vars(model)
    assert "_specdec" not in vars(model)


@pytest.mark.fault
def test_noise_drawn_ahead_is_given_back(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all nodes are picked at once, as on a GPU, a round draws beyond what it emits."""
    monkeypatch.setattr("specdec.generate.call.picker_of", lambda *given, **how: picker_of(
        *given, **{**how, "along_path": False}))  # fmt: skip

    def watch(record: RoundRecord) -> None:
        if record.index == 3:
            raise Stop

    sampled = {"do_sample": True, "top_k": 12}
    torch.manual_seed(1)
    with pytest.raises(Stop):
        llama.generate(
            prompt(), max_new_tokens=NEW, **sampled,
            specdec=SpecConfig("lookahead", on_round=watch),
        )  # fmt: skip
    state = torch.get_rng_state()
    torch.manual_seed(1)
    plain(llama, prompt(), max_new_tokens=specdec.last_stats(llama).new_tokens, **sampled)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.fault
def test_statistics_of_an_interrupted_call(llama: Any) -> None:
    """They count what was emitted before."""
    records: list[RoundRecord] = []

    def watch(record: RoundRecord) -> None:
        records.append(record)
        if record.index == 3:
            raise Stop

    with pytest.raises(Stop):
        llama.generate(
            prompt(), max_new_tokens=NEW, do_sample=False,
            specdec=SpecConfig("lookahead", on_round=watch),
        )  # fmt: skip
    stats = specdec.last_stats(llama)
    assert stats.rounds == 3
    assert stats.new_tokens == sum(len(record.tokens[0]) for record in records)
