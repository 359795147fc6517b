"""Shared by all tests: one thread, quiet transformers, throw-away methods, the law ledger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from helpers import laws
from helpers.drafters import THROW_AWAY
from specdec import register_drafter
from specdec.registry import methods

torch.set_num_threads(1)  # the models are tiny, and workers run side by side
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def throw_away_methods() -> Iterator[None]:
    """Registers the suite's own drafters for the length of a module."""
    for name, drafter in THROW_AWAY.items():
        register_drafter(name, drafter)
    yield
    for name in THROW_AWAY:
        methods.unregister(name)


@pytest.fixture(autouse=True)
def registered_by_one_test() -> Iterator[None]:
    """What a test registers ends with it: others ask the registry which methods there are."""
    before = set(methods.names())
    yield
    for name in set(methods.names()) - before:
        methods.unregister(name)


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> laws.Ledger:
    """Law cells of one test; `settle` fails the test when one of them differs."""
    return laws.Ledger(request.node.user_properties)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the law suite's totals, from all workers."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    line = laws.summary(
        [report.user_properties for report in reports if getattr(report, "when", None) == "call"]
    )
    if line is not None:
        terminalreporter.write_line(line)
