"""A tiny random model folder with a tokenizer, and the command line run in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.tiny_model import CHAT_TEMPLATE, CONTEXT, byte_tokenizer, write_model
from specdec.cli.main import main

__all__ = ["CONTEXT", "byte_tokenizer"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and tokenizer without a chat template."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and tokenizer with a chat template."""
    return write_model(tmp_path_factory.mktemp("chat"), CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def model_writer() -> Callable[..., Path]:
    """Writes such a folder anywhere."""
    return write_model


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs the command line; gives exit code, standard output and standard error."""

    def call(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        code = main([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])
        output, errors = capsys.readouterr()
        return SimpleNamespace(code=code, out=output, err=errors)

    return call
