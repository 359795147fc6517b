"""The `specdec` command: parses, dispatches, and turns every failure of input into one line.

Knows nothing about models: each subcommand is imported when it runs, and its options stand in
`specdec.cli.options`. Even tyro is imported inside `main`, where Ctrl-C is caught, and the package
itself imports nothing until a name is asked for.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import Annotated, Any, TextIO

from specdec.errors import SpecdecError

_DESCRIPTION = (
    "Speculative decoding inside Hugging Face generate: same text, fewer forwards. "
    "`specdec --version` says which release this is."
)
_COMMANDS = {  # name -> its options, and what runs them
    "demo": ("specdec.cli.options:DemoOptions", "specdec.cli.show:run_demo"),
    "generate": ("specdec.cli.options:GenerateOptions", "specdec.cli.generate:run_generate"),
    "doctor": ("specdec.cli.options:DoctorOptions", "specdec.cli.doctor:run_doctor"),
    "data": ("specdec.cli.options:DataOptions", ""),  # a group
    "bench": ("specdec.cli.options:BenchOptions", ""),  # a group
    "train": (
        "specdec_training.run.options:TrainOptions",
        "specdec_training.commands.train:run_train",
    ),
    "inspect": ("specdec.cli.head_options:InspectOptions", "specdec.cli.heads:run_inspect"),
    "convert": ("specdec.cli.head_options:ConvertOptions", "specdec.cli.heads:run_convert"),
}
_GROUPS = {
    "data": {
        name: (
            f"specdec_training.{folder}.options:Data{name.title()}Options",
            f"specdec_training.commands.{folder}:run_{name}",
        )
        for name, folder in (
            ("prepare", "data"),
            ("regenerate", "data"),
            ("doctor", "data"),
            ("features", "features"),
        )
    },
    "bench": {
        name: (
            f"specdec_bench.{folder}.options:{name.title()}Options",
            f"specdec_bench.{folder}.command:run_{name}",
        )
        for name, folder in (
            ("run", "measure"),  # specdec_bench.run is the function
            ("replay", "replay"),
            ("tune", "tune"),
            ("report", "report"),
            ("gate", "gate"),
        )
    },
}
_PLAIN_WORDS = (  # tyro's words -> ours
    (r"^Error parsing ", ""),
    (r"no type matching (\S+) could be instantiated from \['(.*?)'\].*", r"expected \1, got '\2'"),
    (r"invalid literal for int\(\) with base 10: ", "expected INT, got "),
    (r"could not convert string to float: ", "expected FLOAT, got "),
    (r"Could not parse arguments (\[.*?\]) into tuple type .*?\]", r"expected numbers, got \1"),
    (r"\. Expected 1 values", ""),
)
_EXTRAS = {  # package -> the extra of ours that installs it
    "accelerate": "train",
    "datasets": "train",
    "deepspeed": "deepspeed",
    "triton": "kernels",
}
_BUG, _BAD_INPUT, _INTERRUPTED, _BROKEN_PIPE = 1, 2, 130, 141
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_LINE_START, _LINE_END = 300, 100  # characters kept of an error message that quotes a novel


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 1 when the demo's texts differ or specdec has a bug, 2 for bad input, 130
        after Ctrl-C (while a command is imported, the signal ends the process), 141 when the
        reader of the output has gone.
    """
    try:
        _prepare_streams()
        with _short_warnings():
            code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as problem:  # noqa: BLE001 - the user gets one line
        code = _explain(problem)
    try:  # what was printed before the failure
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        _silence(sys.stdout)
    return code


def _prepare_streams() -> None:
    """Makes the standard streams safe to use.

    Raises:
        SpecdecError: Standard output is closed.
    """
    if sys.stderr is None:  # closed by the caller; print would fall back to standard output
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the end
    if sys.stdout is None:
        raise SpecdecError("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a model may emit what this terminal cannot show
            stream.reconfigure(errors="replace")


def _explain(problem: BaseException) -> int:
    """Says what went wrong in one line, or nothing when the user stopped us; the exit code."""
    if any(isinstance(found, KeyboardInterrupt) for found in _chain(problem)):
        return _INTERRUPTED  # transformers makes an import error of one that ends an import
    if isinstance(problem, BrokenPipeError):
        _silence(sys.stdout)
        return _BROKEN_PIPE
    if isinstance(problem, SpecdecError):
        return _fail(str(problem))
    if isinstance(problem, OSError) and problem.errno in _WRITE_ERRORS and not problem.filename:
        _silence(sys.stdout)
        return _fail(f"cannot write the output: {problem.strerror}")
    if isinstance(problem, OSError) and problem.errno is not None:  # the system's, not ours
        place = "" if problem.filename is None else f" {str(problem.filename)!r:.200}"
        return _fail(f"the system refuses{place}: {problem.strerror}")
    package = (getattr(problem, "name", None) or "").partition(".")[0]
    is_missing = isinstance(problem, ModuleNotFoundError) and package != ""
    if is_missing and not package.startswith("specdec"):
        wanted = f"'specdec-torch[{_EXTRAS[package]}]'" if package in _EXTRAS else package
        return _fail(f"this needs the package {package}: pip install {wanted}")
    kind, first_line = type(problem).__name__, next(iter(str(problem).splitlines()), "")
    if kind in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's
        return _fail(f"out of memory{first_line and ': '}{first_line}")
    text = f"unexpected {kind}: {first_line} (this is a bug, please report it)"
    return _fail(text, _BUG)


def _chain(problem: BaseException | None) -> Iterator[BaseException]:
    """The exception and those that led to it; `raise ... from` can close the chain to a ring."""
    seen: set[int] = set()
    while problem is not None and id(problem) not in seen:
        seen.add(id(problem))
        yield problem
        problem = problem.__cause__ or problem.__context__


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from specdec import __version__

        print(f"specdec {__version__}")
        return 0
    from specdec.cli.option_checks import check_options

    name, rest, known = "specdec", arguments, _COMMANDS
    if arguments and arguments[0] in _GROUPS:
        name, rest, known = f"specdec {arguments[0]}", arguments[1:], _GROUPS[arguments[0]]
    options, code = _parse(name, rest, known)
    if options is None:
        return code
    check_options(options)
    runs = {_load(kind): run for kind, run in known.values() if run}
    with _interrupts_end_the_process():
        run: Callable[[Any], int] = _load(runs[type(options)])
    return run(options)


@contextlib.contextmanager
def _interrupts_end_the_process() -> Iterator[None]:
    """Ctrl-C ends the process as the system would, without an exception.

    For imports, which take seconds and have nothing to clean up: an exception from within is
    swallowed by some libraries, and aborts others with a message of their own.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _load(place: str) -> Any:
    """What stands at "module:name"."""
    module, attribute = place.split(":")
    return getattr(import_module(module), attribute)


def _parse(
    program: str, arguments: list[str], known: Mapping[str, tuple[str, str]]
) -> tuple[Any, int]:
    """(options, 0), or (None, exit code) after help or an error was printed."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        names = ", ".join(known)
        return None, _fail(f"unknown command {arguments[0]!r}; choose one of {names}")
    import tyro

    kinds = [
        Annotated[_load(kind), tyro.conf.subcommand(name)] for name, (kind, _) in known.items()
    ]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = tyro.cli(
                reduce(or_, kinds),
                args=arguments,
                prog=program,
                description=_DESCRIPTION,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            return None, 0
        command = arguments[0] if arguments and arguments[0] in known else ""
        return None, _fail(_one_line(said.getvalue(), " ".join(filter(None, [program, command]))))
    return options, 0


def _one_line(box: str, command: str) -> str:
    """tyro's framed error message as one sentence; its frame says little more."""
    rows = [row.strip("│ ") for row in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    rows = [row for row in rows if row and not row.startswith(("╭", "╰"))]
    if len(rows) > 1 and set(rows[1]) == {"-"}:  # a terminal without UTF-8: title, rule, message
        rows = rows[2:]
    message = list(itertools.takewhile(lambda row: not set(row) <= set("─-"), rows))
    text = " ".join(message) or "these arguments make no sense"
    suggestion = rows.index("Perhaps you meant:") + 1 if "Perhaps you meant:" in rows else 0
    if suggestion and suggestion < len(rows):
        text += f"; perhaps you meant {rows[suggestion].split()[0]}"
    for pattern, replacement in _PLAIN_WORDS:
        text = re.sub(pattern, replacement, text)
    text = text[0].lower() + text[1:].rstrip(".")
    return f"{text} (see {command} --help)"


def _fail(message: str, code: int = _BAD_INPUT) -> int:
    text = " ".join(message.split())
    # What was named may hold what a terminal obeys.
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    if len(text) > _LINE_START + _LINE_END:
        text = f"{text[:_LINE_START]} ... {text[-_LINE_END:]}"
    try:
        print(f"specdec: error: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody can be told
        _silence(sys.stderr)
    return code


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


def _silence(stream: TextIO) -> None:
    """Keeps Python from complaining once more, when it exits, about what cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


if __name__ == "__main__":
    raise SystemExit(main())
