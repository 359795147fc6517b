"""Where text falls into a loop."""

import random

import pytest

from specdec.audit.loops import loop_start


def test_text_that_goes_on_has_no_loop() -> None:
    generator = random.Random(0)
    assert loop_start([generator.randrange(50) for _ in range(400)]) is None
    assert loop_start([]) is None
    assert loop_start([1, 2, 1, 2, 3, 4, 5, 6, 7, 8]) is None  # twice is no loop


@pytest.mark.parametrize("period", [1, 2, 5, 20])
def test_a_loop_begins_with_its_second_period(period: int) -> None:
    head, body = list(range(100, 130)), list(range(period))
    assert loop_start(head + body * 12) == 30 + period


def test_a_short_stutter_is_no_loop() -> None:
    head = list(range(100, 130))
    assert loop_start([*head, 7, 7, 7, 7, *range(200, 220)]) is None


def test_the_earliest_loop_counts() -> None:
    first, second = [1, 2] * 10, [3, 4, 5] * 10
    assert loop_start([*first, *range(50, 60), *second]) == 2
