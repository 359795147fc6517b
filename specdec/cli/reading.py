"""Reads the user's text: from an option, a file or standard input, and always as UTF-8."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from specdec.artifacts.input_files import MOST_TEXT, read_input_text, too_large
from specdec.artifacts.terminal import say
from specdec.cli.options import GenerateOptions
from specdec.errors import ConfigError


def prompt_text(options: GenerateOptions) -> str:
    """The text to continue.

    Raises:
        ConfigError: It is empty, not UTF-8, or cannot be read.
    """
    if options.prompt is not None:
        text, source = options.prompt, "--prompt"
    else:
        path = options.file or Path("-")
        source = f"--file {path}"
        text = _read(path, source)
    if not text:
        raise ConfigError(f"{source} is empty; give some text to continue")
    return _checked(text, source)


def check_input(flag: str) -> None:
    """Makes standard input strict about UTF-8.

    Raises:
        ConfigError: It is closed.
    """
    if sys.stdin is None:
        raise ConfigError(f"{flag} reads standard input, which is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read from it before
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def chat_lines() -> Iterator[str]:
    """What the user says, until the input ends; empty lines are left out.

    Raises:
        ConfigError: A line is not UTF-8, or cannot be read.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        say("Ctrl-D ends the chat, Ctrl-C stops at once.", sys.stderr)
    while True:
        text = _line("> " if is_terminal else "")
        if text is None:
            return
        if text.strip():
            yield _checked(text.strip(), "--chat")


def _line(prompt: str) -> str | None:
    try:
        if prompt:  # a person, who may edit the line
            return input(prompt)
        line = sys.stdin.readline(MOST_TEXT + 1)
    except EOFError:
        return None
    except UnicodeDecodeError as problem:
        raise ConfigError(f"--chat reads UTF-8 text, got: {problem.reason}") from problem
    except OSError as problem:
        raise ConfigError(f"cannot read --chat: {problem.strerror or problem}") from problem
    if len(line) > MOST_TEXT:
        raise ConfigError(too_large("a line of --chat", MOST_TEXT))
    return line or None


def _read(path: Path, source: str) -> str:
    if str(path) != "-":
        return read_input_text(path, "--file")
    try:
        check_input(source)
        text = sys.stdin.read(MOST_TEXT + 1)
    except OSError as problem:
        raise ConfigError(f"cannot read {source}: {problem.strerror or problem}") from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{source} is not UTF-8 text: {problem.reason}") from problem
    if len(text) > MOST_TEXT:
        raise ConfigError(too_large(source, MOST_TEXT))
    return text


def _checked(text: str, source: str) -> str:
    """`text`, unless it holds the surrogates that Python puts in place of undecodable bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise ConfigError(f"{source} is not UTF-8 text: {problem.reason}") from problem
    return text
