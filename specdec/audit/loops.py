"""Looks at generated text: where it falls into a repetition loop.

Small models loop under greedy decoding, and every n-gram method flies through a loop; a speed-up
measured there says nothing about text that goes on, and a head trained on it learns to repeat.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_PERIOD = 64
"""Longest loop that is looked for, in tokens."""


def loop_start(tokens: Sequence[int], periods: int = 3, shortest: int = 8) -> int | None:
    """Where the first repetition loop begins, or None.

    A loop is a stretch of at least `shortest` tokens, and at least `periods` times the same
    `p <= MAX_PERIOD` tokens in a row. It begins with its second period: the first is still news.
    """
    first: int | None = None
    for period in range(1, min(MAX_PERIOD, len(tokens) // periods) + 1):
        run = 0  # how long tokens have equalled those one period before
        for at in range(period, len(tokens)):
            run = run + 1 if tokens[at] == tokens[at - period] else 0
            if run + period >= max(periods * period, shortest):
                start = at - run + 1
                first = start if first is None else min(first, start)
                break
    return first
