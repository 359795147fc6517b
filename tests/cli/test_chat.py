"""A chat that outgrows the model's context forgets its oldest turns, and says so."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from helpers.tiny_model import CONTEXT
from specdec.cli import generate as command
from specdec.cli.options import GenerateOptions
from specdec.errors import SpecdecError
from specdec.loading import load_model

Run = Callable[..., SimpleNamespace]
Messages = list[dict[str, str]]


@pytest.fixture
def session(chat_folder: Path) -> Callable[..., command.Session]:
    """A session on the tiny model, of which a token is a byte."""

    def make(**options: object) -> command.Session:
        model = load_model(str(chat_folder), "float32", "cpu")
        return command.Session(
            model, AutoTokenizer.from_pretrained(chat_folder), GenerateOptions(chat=True, **options)
        )

    return make


def turns(*lengths: int, system: bool = False) -> Messages:
    """Question, answer, question ...: each named by its number, of so many bytes."""
    roles = ["user", "assistant"] * len(lengths)
    made = [
        {"role": role, "content": str(number) * length}
        for number, (role, length) in enumerate(zip(roles, lengths, strict=False))
    ]
    return [{"role": "system", "content": "S" * 10}, *made] if system else made


def kept(messages: Messages) -> str:
    """First letters of what is left."""
    return "".join(message["content"][0] for message in messages)


@pytest.mark.parametrize(
    ("lengths", "new_tokens", "left"),
    [
        ((20, 20, 20), 16, "012"),
        ((60, 60, 60), 16, "2"),
        ((40, 40, 40, 40, 20), 16, "234"),
        ((40, 40, 40, 40, 20), 110, "4"),
        ((20, 20, 20, 20, 20), None, "234"),  # a quarter of the context is left for the answer
    ],
)
@pytest.mark.parametrize("system", [False, True])
def test_the_oldest_turns_are_forgotten(
    lengths: tuple[int, ...],
    new_tokens: int | None,
    left: str,
    system: bool,
    session: Callable[..., command.Session],
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = session(max_new_tokens=new_tokens)
    messages = turns(*lengths)
    messages = [{"role": "system", "content": "S"}, *messages] if system else messages
    ids = made.encode_newest(messages)
    wanted = new_tokens or CONTEXT // 4
    if kept(messages).lstrip("S") != left:  # the system turn takes room, too
        assert system
        assert left.endswith(kept(messages).lstrip("S"))
    assert kept(messages).startswith("S") == system
    assert ids.shape[1] + wanted <= CONTEXT
    assert torch.equal(ids, made.encode_chat(messages))
    gone = len(lengths) + system - len(messages)
    said = capsys.readouterr().err
    assert (
        said == ""
        if not gone
        else said
        == (
            f"specdec: warning: the chat has outgrown the model's context of {CONTEXT} tokens; its "
            f"{gone} oldest turns are forgotten\n"
        )
    )


def test_the_newest_turn_is_never_forgotten(session: Callable[..., command.Session]) -> None:
    made = session(max_new_tokens=8)
    messages = turns(30, 30, 400)
    ids = made.encode_newest(messages)
    assert kept(messages) == "2"
    with pytest.raises(SpecdecError, match="the prompt is too long"):
        made.answer(ids)


def test_a_long_chat_goes_on(
    chat_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twelve turns in a context that holds three; a line for each time that some were forgotten."""
    folder = shutil.copytree(chat_folder, tmp_path / "model")
    lines = "".join(f"{n:02} is a question\n" for n in range(12))
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    made = run("generate", "--model", folder, "--chat", "--method", "none", "--max-new-tokens", 20)
    assert made.code == 0, made.err
    assert made.err.count("oldest turns are forgotten\n") == made.err.count("\n") > 2
