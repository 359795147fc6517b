"""Ten thousand tokens in one call: the right text, rounds that stay as cheap, memory that fits."""

from __future__ import annotations

import gc
import statistics
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from helpers.heads import head_for
from helpers.hf import prompt, tiny_llama
from helpers.names import CACHE, cache_of
from specdec import SpecConfig
from specdec.errors import ConfigError
from specdec.registry import methods
from specdec.stats import RoundRecord

LONG, WIDTH = 10_000, 9
HOST_STAGES = ("draft", "verify", "commit", "observe")
SIZES: dict[str, dict[str, Any]] = {"lookahead": {"window": 3, "ngram": 3, "guesses": 3}}
BYTES_A_TOKEN = {"none": 64}  # the ids and nothing else
_ONCE = 50_000  # bytes
_MANY_BYTES_A_TOKEN = 4_000  # n-grams of several lengths, as tuples in dictionaries


@pytest.fixture(scope="module")
def model() -> Any:
    """One layer, float64, weights that keep greedy text from settling into one loop."""
    tiny = tiny_llama(
        num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2 * LONG, initializer_range=0.5,
    )  # fmt: skip
    return specdec.augment(tiny, "none")


def lengths(short: int, *fast_when_long: str) -> list[object]:
    """(method, tokens): short, and long; what has models of its own or takes long is slow."""
    cases: list[object] = []
    for method in methods.names():
        marks = [pytest.mark.slow] if method in ("draft_model", "eagle3") else []
        cases.append(pytest.param(method, short, marks=marks))
        marks = [] if method in fast_when_long else [pytest.mark.slow]
        cases.append(pytest.param(method, LONG, marks=marks))
    return cases


def settings(model: Any, method: str, **more: Any) -> SpecConfig:
    """Small sizes; skips a method that cannot be configured without somebody's files."""
    drafts: dict[str, Callable[[Any], Any]] = {"draft_model": lambda own: own, "eagle3": head_for}
    options = {"draft": drafts[method](model)} if method in drafts else SIZES.get(method, {})
    try:
        methods.configure(method, options)
    except ConfigError as problem:
        pytest.skip(f"{method} needs more than a model: {problem}")
    return SpecConfig(method, options, **more)


@torch.no_grad()
def greedy_choices(model: Any, ids: Tensor) -> Tensor:
    """[S] the best token after each prefix of `ids` [1, S], by forwards of 500 tokens."""
    cache, best = None, []
    for start in range(0, ids.shape[1], 500):
        chunk = ids[:, start : start + 500]
        output = model(input_ids=chunk, **{CACHE: cache}, use_cache=True)
        cache = cache_of(output)
        best.append(output.logits[0].argmax(-1))
    return torch.cat(best)


def different_grams(text: Tensor) -> int:
    """How many different runs of five tokens `text` [S] holds."""
    return len({tuple(gram) for gram in text.unfold(0, 5, 1).tolist()})


@pytest.mark.parametrize(("method", "tokens"), lengths(700, "prompt_lookup"))
def test_the_text_and_the_cost_of_a_round(model: Any, method: str, tokens: int) -> None:
    """By induction: where every token is the best one after its prefix, the text is plain's."""
    costs: list[float] = []

    def watch(record: RoundRecord) -> None:
        costs.append(sum(record.seconds.get(stage, 0.0) for stage in HOST_STAGES))

    got = model.generate(
        prompt(WIDTH), max_new_tokens=tokens, do_sample=False,
        specdec=settings(model, method, on_round=watch),
    )  # fmt: skip
    assert specdec.last_stats(model).mode == "tree"
    assert got.shape == (1, WIDTH + tokens)
    assert torch.equal(greedy_choices(model, got)[WIDTH - 1 : -1], got[0, WIDTH:])
    assert different_grams(got[0, -500:]) > 20, "the text ends in a loop: the test shows nothing"
    fifth = len(costs) // 5
    early, late = statistics.median(costs[1:fifth]), statistics.median(costs[-fifth:])
    # Work that follows the length of the text would cost several times as much at its end.
    assert late <= 4 * early + 2e-4, f"a round costs {late * 1e6:.0f} us, {early * 1e6:.0f} before"


@dataclass
class Memory:
    """What is in use after a twentieth, a quarter and all of the text.

    Attributes:
        tokens: Length of the text.
        traced: (emitted tokens, bytes of Python objects).
        tensors: (emitted tokens, bytes of tensor storage outside the KV cache).
    """

    tokens: int
    traced: list[tuple[int, int]] = field(default_factory=list)
    tensors: list[tuple[int, int]] = field(default_factory=list)
    _emitted: int = 0

    def __post_init__(self) -> None:
        self._marks = [self.tokens // 20, self.tokens // 4, self.tokens - 50]

    def __call__(self, record: RoundRecord) -> None:
        self._emitted += len(record.tokens[0])
        if self._marks and self._emitted >= self._marks[0]:
            del self._marks[0]
            gc.collect()
            self.traced.append((self._emitted, tracemalloc.get_traced_memory()[0]))
            self.tensors.append((self._emitted, loose_tensor_bytes()))


def loose_tensor_bytes() -> int:
    """Bytes of all new tensors but keys and values: those have a [rows, heads, slots, dim]."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.ndim != 4:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def traced_memory() -> Iterator[None]:
    """Traces allocations of a block, and hides everything older from the garbage collector."""
    gc.collect()
    gc.freeze()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.unfreeze()


def growth(marks: list[tuple[int, int]]) -> tuple[float, float]:
    """(bytes a token, growth from the first mark to the last over growth up to the second).

    Caches that fill once are let off.
    """
    (first, least), (_, middle), (last, most) = marks
    grown = max(most - least - _ONCE, 0)
    return grown / (last - first), grown / max(middle - least, _ONCE)


@pytest.mark.timeout(1800)  # tracing makes allocations several times slower
@pytest.mark.parametrize(("method", "tokens"), lengths(300))
def test_memory_follows_the_text(model: Any, method: str, tokens: int) -> None:
    """Sampled text never repeats itself for long, so whatever a method collects keeps growing."""
    memory = Memory(tokens)
    config = settings(model, method, on_round=memory)
    call = {"do_sample": True, "top_k": 0, "temperature": 1.5, "specdec": config}
    torch.manual_seed(3)
    with traced_memory():
        got = model.generate(prompt(WIDTH), max_new_tokens=tokens, **call)
    assert different_grams(got[0]) > tokens / 2
    print(f"{method}: Python {memory.traced}, tensors {memory.tensors}")
    bytes_a_token, ratio = growth(memory.traced)
    assert bytes_a_token <= BYTES_A_TOKEN.get(method, _MANY_BYTES_A_TOKEN)
    # 4.75 where it follows the text, up to twice that in dictionaries, which double; 16 and more
    # where it follows the square of the text.
    assert ratio <= 12
    bytes_a_token, _ = growth(memory.tensors)
    # The ids for processors and criteria; everything else belongs to one round.
    assert bytes_a_token <= 16
