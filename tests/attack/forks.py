"""Runs the command line in a fork of this process, under limits, and says what came of it.

The imports of torch and transformers, most of a small run, are done once.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_PRELOADED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "specdec.cli",
    "specdec.cli.show",
    "specdec.cli.generate",
    "specdec.cli.doctor",
    "specdec.cli.heads",
    "specdec_training.commands.train",
    "specdec_training.commands.data",
    "specdec_training.commands.features",
    "specdec_bench.measure.command",
    "specdec_bench.replay.command",
    "specdec_bench.tune.command",
    "specdec_bench.report.command",
    "specdec_bench.gate.command",
)
_MORE_MEMORY = 3 * 2**30  # above what the imports take
_LARGEST_FILE = 2**30
_CAPABILITIES_OF_ROOT = 0x6  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
_POLL_SECONDS = 0.01

BROKEN_PIPE = "a pipe that nobody reads"
"""As a standard stream."""


def preload(caches: Path) -> None:
    """Imports what every run needs.

    Args:
        caches: Where libraries keep what they would keep in the user's home.
    """
    os.environ.pop("HF_HUB_OFFLINE", None)  # the hub is asked, and does not answer
    os.environ["HF_HOME"] = str(caches / "hf")
    for name in _PRELOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a fork's collector would copy the pages of all that


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        code: Exit status, negative for a signal; None when it ran out of time.
        seconds: Wall time.
        out: Its standard output.
        err: Its standard error.
    """

    code: int | None
    seconds: float
    out: str
    err: str


def run(
    arguments: list[str],
    folder: Path,
    *,
    streams: Mapping[str, Any],
    environment: Mapping[str, str | None],
    seconds: float,
) -> Outcome:
    """Runs `specdec` once.

    Args:
        arguments: Without the program's name.
        folder: Where it runs and where its output is kept.
        streams: "stdin": bytes, a path, or None for a closed one; "stdout": a path, None, or
            `BROKEN_PIPE`.
        environment: What is set, or with None removed.
        seconds: Limit of wall time.
    """
    out, err = folder / "stdout", folder / "stderr"
    (folder / "work").mkdir(exist_ok=True)
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _attacked(arguments, folder, dict(streams), environment, seconds)
    code: int | None = None
    while time.monotonic() - begin < seconds:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(_POLL_SECONDS)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    took = time.monotonic() - begin
    return Outcome(code, took, _text(out), _text(err))


def _text(path: Path) -> str:
    return path.read_bytes()[:1_000_000].decode("utf-8", "replace") if path.exists() else ""


def _attacked(
    arguments: list[str],
    folder: Path,
    streams: dict[str, Any],
    environment: Mapping[str, str | None],
    seconds: float,
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        _connect(folder, streams)
        os.chdir(folder / "work")
        os.environ["HOME"] = str(folder / "work")
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _limit(seconds)
        from specdec.cli.main import main

        code = main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - a fork must not return into its parent's code
        traceback.print_exc(file=sys.__stderr__)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(code & 0xFF)


def _connect(folder: Path, streams: dict[str, Any]) -> None:
    """Replaces the standard streams, as a shell would."""
    given = streams.get("stdin", b"")
    if isinstance(given, bytes):
        (folder / "stdin").write_bytes(given)
        given = folder / "stdin"
    places = {
        0: (given, os.O_RDONLY),
        1: (streams.get("stdout", folder / "stdout"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        2: (folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    }
    for number, (place, how) in places.items():
        if place is None:
            os.close(number)
            continue
        if place == BROKEN_PIPE:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, number)
            continue
        opened = os.open(place, how, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = None if given is None else open(0, closefd=False)  # type: ignore[assignment]  # noqa: SIM115
    sys.stdout = (  # type: ignore[assignment]
        None if places[1][0] is None else io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    )
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)


def _limit(seconds: float) -> None:
    """Memory, processor time and file size; no network; and no more rights than anybody has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + _MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    socket.getaddrinfo = _no_network  # type: ignore[assignment]
    if os.geteuid() == 0:
        _drop_rights()


def _no_network(*_: object, **__: object) -> NoReturn:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def _drop_rights() -> None:
    """Takes from root what lets it read and write whatever permissions say."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    if libc.capget(head, data) == 0:
        data[0] &= ~_CAPABILITIES_OF_ROOT
        libc.capset(head, data)
