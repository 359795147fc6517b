"""Registers the tests' oracle for these tests alone, and hands out augmented tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import specdec
from helpers.hf import ORACLE, Oracle, tiny_gemma3, tiny_gpt2, tiny_llama
from specdec.registry import methods


@pytest.fixture(scope="module", autouse=True)
def _oracle() -> Iterator[None]:
    methods.register(ORACLE, Oracle)
    yield
    methods.unregister(ORACLE)


@pytest.fixture(scope="module")
def llama(_oracle: None) -> Any:
    """A float64 Llama that speculates by prompt lookup."""
    return specdec.augment(tiny_llama(), "prompt_lookup")


@pytest.fixture(scope="module")
def gemma3(_oracle: None) -> Any:
    """A float64 Gemma 3 with a window of eight tokens."""
    return specdec.augment(tiny_gemma3(), "prompt_lookup")


@pytest.fixture(scope="module")
def gpt2(_oracle: None) -> Any:
    """A float64 GPT-2 with a table of 64 positions."""
    return specdec.augment(tiny_gpt2(), "prompt_lookup")
