"""A pool that is kept from call to call is used by several threads at once."""

import random
import sys
import threading
from collections.abc import Iterator

import pytest

from specdec.sources.ngram_pool import NgramPool


@pytest.fixture
def _hurried() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hurried")
def test_a_pool_takes_writers_and_readers_at_once() -> None:
    pool, failures = NgramPool(guesses=2), list[Exception]()

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for _ in range(2_000):
                pool.add(choose.randrange(3), (choose.randrange(4), choose.randrange(2)))
                assert len(pool.guesses(choose.randrange(3))) <= 2 + 4  # a thread may be adding
        except Exception as problem:  # noqa: BLE001 - raised again below
            failures.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert all(len(pool.guesses(key)) <= 2 for key in range(3))
