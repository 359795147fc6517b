"""The `specdec` command: parses, dispatches, and turns every failure of input into one line.

Knows nothing about models: each subcommand is imported when it runs, and its options stand in
`specdec.options`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import tyro

from specdec.errors import SpecdecError
from specdec.options import DemoOptions, DoctorOptions, GenerateOptions

_DESCRIPTION = "Speculative decoding inside Hugging Face generate: same text, fewer forwards."
_COMMANDS = ("demo", "generate", "doctor")
_PLAIN_WORDS = (  # tyro's words -> ours
    (r"^Error parsing ", ""),
    (r"no type matching (\S+) could be instantiated from \['(.*?)'\].*", r"expected \1, got '\2'"),
    (r"invalid literal for int\(\) with base 10: ", "expected INT, got "),
    (r"could not convert string to float: ", "expected FLOAT, got "),
    (r"\. Expected 1 values", ""),
)
_BAD_INPUT, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141

_Command = (
    Annotated[DemoOptions, tyro.conf.subcommand("demo")]
    | Annotated[GenerateOptions, tyro.conf.subcommand("generate")]
    | Annotated[DoctorOptions, tyro.conf.subcommand("doctor")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 1 when the demo's texts differ, 2 for bad input, 130 after Ctrl-C, 141 when
        the reader of the output has gone.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a model may emit what this terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        with _short_warnings():
            code = _run(arguments)
        sys.stdout.flush()
        return code
    except SpecdecError as problem:
        return _fail(" ".join(str(problem).split()))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return _BROKEN_PIPE


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from specdec import __version__

        print(f"specdec {__version__}")
        return 0
    options, code = _parse(arguments)
    if isinstance(options, DemoOptions):
        from specdec.demo.show import run_demo

        return run_demo(options)
    if isinstance(options, GenerateOptions):
        from specdec.commands.generate import run_generate

        return run_generate(options)
    if isinstance(options, DoctorOptions):
        from specdec.commands.doctor import run_doctor

        return run_doctor(options)
    return code


def _parse(arguments: list[str]) -> tuple[Any, int]:
    """(options, 0), or (None, exit code) after help or an error was printed."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        return None, _fail(f"unknown command {arguments[0]!r}; choose one of {known}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = tyro.cli(
                _Command,
                args=arguments,
                prog="specdec",
                description=_DESCRIPTION,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            return None, 0
        return None, _fail(_one_line(said.getvalue(), arguments))
    return options, 0


def _one_line(box: str, arguments: list[str]) -> str:
    """tyro's framed error message as one sentence; its frame says little more."""
    rows = [row.strip("│ ") for row in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    rows = [row for row in rows if row and not row.startswith(("╭", "╰"))]
    if len(rows) > 1 and set(rows[1]) == {"-"}:  # a terminal without UTF-8: title, rule, message
        rows = rows[2:]
    message = list(itertools.takewhile(lambda row: not set(row) <= set("─-"), rows))
    text = " ".join(message) or "these arguments make no sense"
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else ""
    suggestion = rows.index("Perhaps you meant:") + 1 if "Perhaps you meant:" in rows else 0
    if suggestion and suggestion < len(rows):
        text += f"; perhaps you meant {rows[suggestion].split()[0]}"
    for pattern, replacement in _PLAIN_WORDS:
        text = re.sub(pattern, replacement, text)
    text = text[0].lower() + text[1:].rstrip(".")
    return f"{text} (see {' '.join(filter(None, ['specdec', command]))} --help)"


def _fail(message: str) -> int:
    print(f"specdec: error: {message}", file=sys.stderr)
    return _BAD_INPUT


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Shows a warning once, as one line, without the place in our sources that raised it."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split()).removeprefix("specdec: ")
        if text not in shown:
            print(f"specdec: warning: {text}", file=sys.stderr)
        shown.add(text)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _silence_stdout() -> None:
    """Keeps Python from complaining about the closed pipe once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stdout.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


if __name__ == "__main__":
    raise SystemExit(main())
