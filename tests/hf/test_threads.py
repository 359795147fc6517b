"""Calls side by side in threads: on one model and on two, with every method, plain among them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from helpers.hf import fallbacks, left_padded, plain, prompt, tiny_gemma3, tiny_llama
from specdec import SpecConfig

NEW = 40
CALLS = 3
CONFIGS: tuple[SpecConfig | bool, ...] = (
    SpecConfig("lookahead", {"window": 3, "ngram": 3, "guesses": 3}),
    SpecConfig("prompt_lookup"),
    SpecConfig("none"),
    False,
)


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(works: list[Callable[[], None]]) -> None:
    """Runs all at once, started by one barrier; raises the first failure."""
    barrier, failures = threading.Barrier(len(works)), list[BaseException]()

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait(timeout=60)
            work()
        except BaseException as problem:  # noqa: BLE001 - raised again below
            failures.append(problem)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a call hangs"
    if failures:
        raise failures[0]


class Repeated:
    """One call, made several times; greedy, so that its text is known."""

    def __init__(self, model: Any, config: SpecConfig | bool, inputs: dict[str, Tensor]) -> None:
        call = {**inputs, "max_new_tokens": NEW, "do_sample": False}
        self._wanted = plain(model, **call)
        self._generate = lambda: model.generate(**call, specdec=config)

    def __call__(self) -> None:
        for _ in range(CALLS):
            assert torch.equal(self._generate(), self._wanted)


def jobs(model: Any, seed: int) -> list[Callable[[], None]]:
    """A thread for every configuration, each with a prompt of its own, and a padded batch."""
    works: list[Callable[[], None]] = [
        Repeated(model, config, {"input_ids": prompt(7 + n, seed=seed + n)})
        for n, config in enumerate(CONFIGS)
    ]
    return [*works, Repeated(model, CONFIGS[0], left_padded((9, 4, 6), seed=seed))]


@pytest.mark.usefixtures("hurried")
def test_many_threads_on_one_model() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    with fallbacks() as texts:
        together(jobs(model, seed=1))
    assert not texts
    stats = specdec.last_stats(model)
    assert stats.method in ("lookahead", "prompt_lookup", "none")
    Repeated(model, True, {"input_ids": prompt(11)})()
    assert specdec.last_stats(model).new_tokens == NEW


@pytest.mark.usefixtures("hurried")
def test_many_threads_on_two_models() -> None:
    """Windows and full attention side by side; each model keeps its own statistics."""
    models = [
        specdec.augment(tiny_llama(), "prompt_lookup"),
        specdec.augment(tiny_gemma3(), "lookahead", window=2, ngram=3, guesses=2),
    ]
    together([work for seed, model in enumerate(models) for work in jobs(model, seed)])
    for model, method in zip(models, ("prompt_lookup", "lookahead"), strict=True):
        Repeated(model, True, {"input_ids": prompt(11)})()
        assert specdec.last_stats(model).method == method


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("method", "options"), [
    ("lookahead", {"window": 3, "ngram": 3, "guesses": 1, "keep_pool": True}),
    ("recycling", {"keep_matrix": True}),
])  # fmt: skip
def test_threads_share_what_a_method_keeps(method: str, options: dict[str, Any]) -> None:
    """A memory that outlives a call is written by several calls at once; the texts stay right."""
    model = specdec.augment(tiny_llama(), method, **options)
    together([Repeated(model, True, {"input_ids": prompt(8 + n, seed=n)}) for n in range(4)])
    Repeated(model, True, {"input_ids": prompt(11)})()


@pytest.mark.usefixtures("hurried")
def test_a_failing_thread_leaves_the_others_alone() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")

    def broken(batch: int, ids: Tensor) -> list[int]:
        if len(ids) > 20:
            raise RuntimeError("the user's function fails")
        return list(range(3, 60))

    def fail() -> None:
        for _ in range(CALLS):
            with pytest.raises(RuntimeError, match="the user's function"):
                model.generate(prompt(), max_new_tokens=NEW, prefix_allowed_tokens_fn=broken)

    together([fail, *jobs(model, seed=5)])
    Repeated(model, True, {"input_ids": prompt(11)})()
