"""Plain terminal output for the commands: colour or not, aligned columns, bars."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

_RESET = "\x1b[0m"
_ROUNDS = ("\x1b[36m", "\x1b[33m")  # neighbouring rounds differ; both read on dark and light
_MAX_WIDTH = 100  # wider lines read badly
_DIM, _BOLD = "\x1b[2m", "\x1b[1m"


def say(text: str = "", stream: TextIO | None = None) -> None:
    """Writes a line to standard output, or to `stream`."""
    print(text, file=stream or sys.stdout, flush=True)


def say_next(what: str, *command: object) -> None:
    """Names the command that comes next, on a line of its own to paste into a shell.

    Silent unless a terminal shows standard error: a file or another program has no use for it.

    Args:
        what: What the command does, as in "train a head".
        *command: Its words behind `specdec`.
    """
    if sys.stderr.isatty():
        line = shlex.join(["specdec", *map(str, command)])
        say(f"\nnext, {what}:\n  {line}", sys.stderr)


def colour_wanted(stream: TextIO, no_colour: bool = False) -> bool:
    """Whether to colour: a terminal, not asked otherwise, and NO_COLOR (no-color.org) unset."""
    return (
        not no_colour
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
        and stream.isatty()
    )


def dim(text: str, colour: bool) -> str:
    """`text` in the background."""
    return f"{_DIM}{text}{_RESET}" if colour else text


def bold(text: str, colour: bool) -> str:
    """`text` as a heading."""
    return f"{_BOLD}{text}{_RESET}" if colour else text


def by_round(pieces: Sequence[str], colour: bool) -> str:
    """Pieces of text in alternating colours, or with a bar between them."""
    if not colour:
        return "|".join(pieces)
    # Colour ends before a line break, so that pagers and copied lines stay whole.
    return "".join(
        "\n".join(f"{_ROUNDS[i % 2]}{line}{_RESET}" if line else "" for line in piece.split("\n"))
        for i, piece in enumerate(pieces)
    )


def columns(rows: Sequence[Sequence[str]], gap: int = 3) -> list[str]:
    """Lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append((" " * gap).join(cells).rstrip())
    return lines


def facts(pairs: Sequence[tuple[str, str]], indent: int = 0) -> list[str]:
    """Lines of names and values, the values aligned."""
    width = max(len(name) for name, _ in pairs)
    lines = []
    for name, value in pairs:
        start = f"{' ' * indent}{name.ljust(width)}  "
        lines.append(wrapped(start + value, len(start)))
    return lines


def wrapped(text: str, hang: int = 0) -> str:
    """`text` in lines that fit the terminal; later lines are indented by `hang`."""
    width = min(max(shutil.get_terminal_size().columns, 40), _MAX_WIDTH)
    return textwrap.fill(
        text,
        width,
        subsequent_indent=" " * hang,
        drop_whitespace=True,
        break_long_words=False,
        break_on_hyphens=False,
    )


def bar(share: float, stream: TextIO, width: int = 30) -> str:
    """A bar as long as `share` (0 to 1) of `width`."""
    encoding = (getattr(stream, "encoding", None) or "ascii").lower()
    block = "█" if encoding.startswith("utf") else "#"
    return block * max(round(share * width), 1 if share > 0 else 0)
