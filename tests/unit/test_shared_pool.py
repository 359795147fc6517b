"""A pool that is kept from call to call is used by several threads at once."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from specdec.sources.ngram_pool import NgramPool


class Interrupted(int):
    """A token at whose look-up another thread happens to get its turn, once."""

    other_thread: Callable[[], None] | None = None

    def __hash__(self) -> int:
        work, self.other_thread = self.other_thread, None
        if work is not None:
            work()
        return int(self)


@pytest.mark.parametrize("guesses", [1, 2, 3])
def test_another_writer_in_the_middle_of_an_entry(guesses: int) -> None:
    """It drops the oldest entry while the first writer is about to drop the same one."""
    pool, token = NgramPool(guesses), Interrupted(1)
    for gram in [(token, 1), *((2, n) for n in range(1, guesses))]:
        pool.add(0, gram)
    token.other_thread = lambda: pool.add(0, (8, 8))
    pool.add(0, (9, 9))
    assert token.other_thread is None
    found = [gram for gram, _ in pool.guesses(0)]
    assert len(found) <= guesses
    assert found[0] == (8, 8)


@pytest.fixture
def _hurried() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hurried")
def test_writers_and_readers_at_once() -> None:
    pool, failures = NgramPool(guesses=2), list[Exception]()

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for _ in range(2_000):
                pool.add(choose.randrange(3), (choose.randrange(4), choose.randrange(2)))
                assert len(pool.guesses(choose.randrange(3))) <= 2 + 4  # others may be adding
        except Exception as problem:  # noqa: BLE001 - raised again below
            failures.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert all(len(pool.guesses(key)) <= 2 for key in range(3))
