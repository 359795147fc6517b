"""A copy of the sources in which faults are planted and tests are run, one run at a time.

Runs are forked from this process, which has loaded torch and transformers but nothing of the
library: most of a small run is otherwise their import. Only tests in Triton's interpreter begin in
a process of their own, because it has to be on before anything is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mutants.fault import Fault, FaultError

SOURCES = ("specdec", "kernels", "draft_training", "tests", "benchmarks", "pyproject.toml")
_PACKAGES = ("kernels", "draft_training", "benchmarks")  # folders that hold a package each
_OURS = (
    "specdec",
    "specdec_kernels",
    "specdec_training",
    "specdec_bench",
    "helpers",
    "mutants",
)  # modules that a run must take from its copy
_PRELOADED = (
    "hypothesis",
    "torch",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
)
_ARGUMENTS = ("-q", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-seed=0",
              "--tb=line", "--disable-warnings")  # fmt: skip
_INTERPRETED = "tests/kernels/interpreted"


def preload() -> None:
    """Imports what every run needs."""
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
    for name in _PRELOADED:
        importlib.import_module(name)
    if "specdec" in sys.modules:
        raise FaultError("the library is already loaded here, so a copy of it could not be tested")


@dataclass(frozen=True)
class Outcome:
    """One pytest run.

    Attributes:
        exit: Its exit status; None when it ran out of time.
        seconds: How long it took.
        output: What it printed.
        passed: Tests that passed.
        failed: Tests that failed in their own body; errors around them do not count.
        packages: Files of the packages that were tested, as far as they were imported.
    """

    exit: int | None
    seconds: float
    output: str
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)


class Workshop:
    """A copy of the sources.

    Args:
        folder: An empty folder.
        root: The repository.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.copy = folder / "copy"
        self._log, self._report = folder / "log.txt", folder / "report.json"
        self._child, self._begin = 0, 0.0
        self._right: tuple[Path, str] | None = None
        self._stamp = int(time.time())
        self.copy.mkdir(parents=True)
        for name in SOURCES:
            if (root / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(root / name, self.copy / name, ignore=ignore)
            elif (root / name).exists():
                shutil.copy2(root / name, self.copy / name)

    def start(self, selection: Sequence[str], fault: Fault | None) -> None:
        """Plants `fault`, if there is one, and begins a run."""
        if fault is not None:
            path = self.copy / fault.file
            self._right = path, path.read_text(encoding="utf-8")
            self._write(path, fault.planted(self.copy))
        self._report.unlink(missing_ok=True)
        arguments = [*_ARGUMENTS, *(["-x"] if fault is not None else []), *selection]
        sys.stdout.flush()
        sys.stderr.flush()
        self._begin = time.monotonic()
        self._child = os.fork()
        if self._child == 0:
            _run_tests(self.copy, self._log, self._report, arguments)

    def poll(self, timeout: float) -> Outcome | None:
        """The run's outcome, or None while it goes on; takes the fault out again."""
        seconds = time.monotonic() - self._begin
        finished, status = os.waitpid(self._child, os.WNOHANG)
        if not finished and seconds < timeout:
            return None
        if not finished:
            self.stop()
        self._child = 0
        self._take_out()
        found: dict[str, Any] = {}
        if finished and self._report.exists():
            found = json.loads(self._report.read_text(encoding="utf-8"))
        for package in found.get("packages", ()):
            if not Path(package).is_relative_to(self.copy):
                raise FaultError(f"the tests imported {package} instead of the copy's package")
        code = os.waitstatus_to_exitcode(status) if finished else None
        output = self._log.read_text(encoding="utf-8", errors="replace")
        return Outcome(code, seconds, output, **found)

    def stop(self) -> None:
        """Ends a run that is under way."""
        if self._child:
            try:
                os.killpg(self._child, signal.SIGKILL)
            except ProcessLookupError:  # forked just now, and not a group of its own yet
                os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0

    def _take_out(self) -> None:
        if self._right is not None:
            self._write(*self._right)
            self._right = None

    def _write(self, path: Path, source: str) -> None:
        """Writes with a time of its own: bytecode is told apart by full seconds and size alone."""
        path.write_text(source, encoding="utf-8")
        self._stamp += 1
        os.utime(path, (self._stamp, self._stamp))


def _run_tests(copy: Path, log: Path, report: Path, arguments: Sequence[str]) -> NoReturn:
    """The forked process: pytest in the copy, with nothing of the repository in reach."""
    code = -1
    try:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(copy)
        for name in [name for name in sys.modules if name.split(".")[0] in _OURS]:
            del sys.modules[name]
        root = Path(__file__).resolve().parents[2]
        roots = [copy, *(copy / name for name in _PACKAGES)]
        ours = {root / path.relative_to(copy) for path in roots} | {root / "tests"}
        own = [str(path) for path in roots]
        sys.path[:] = [*own, *(p for p in sys.path if Path(p).resolve() not in ours)]
        os.environ["PYTHONPATH"] = os.pathsep.join(own)
        if any(argument.startswith(_INTERPRETED) for argument in arguments):
            _begin_anew(copy, report, arguments)
        code = int(pytest.main(list(arguments), plugins=[_Report(report)]))
    except BaseException:  # noqa: BLE001 - a fork must not return into its parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


def _begin_anew(copy: Path, report: Path, arguments: Sequence[str]) -> NoReturn:
    """This process becomes one in which Triton's interpreter is on from its first line."""
    os.environ["PYTHONPATH"] += os.pathsep + str(copy / "tests")
    os.environ |= {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.execv(  # noqa: S606 - Python on ourselves
        sys.executable,
        [sys.executable, "-m", "mutants.workshop", str(report), *arguments,
         "--confcutdir=tests/kernels"],
    )  # fmt: skip


class _Report:
    """A pytest plugin that writes down which tests passed and failed, and whose package ran."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, list[str]] = {"passed": [], "failed": []}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.outcome in self._found:
            self._found[report.outcome].append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        files = [getattr(sys.modules.get(name), "__file__", None) for name in _OURS]
        found = {**self._found, "packages": [file for file in files if file is not None]}
        self._path.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[2:], plugins=[_Report(Path(sys.argv[1]))]))
