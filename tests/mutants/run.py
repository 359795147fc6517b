"""The mutation check: every known fault, planted in a copy of the library, must fail a test.

    make mutants                                     # all faults
    make mutants ARGS="--only NAME --only OTHER"     # some of them
    make mutants ARGS="--list"

A fault is caught when pytest ends with "tests failed" and a test failed in its own body. Errors in
collection or fixtures, crashes and empty selections are not catches. The same selections must pass
on the untouched copy first. Exit status: 0 when all faults were caught, 1 when one was missed, 2
when the check itself could not be made.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mutants.fault import Fault, FaultError
from mutants.faults import FAULTS
from mutants.workshop import Outcome, Workshop, preload

ROOT = Path(__file__).resolve().parents[2]
_TESTS_FAILED = 1
_POLL_SECONDS = 0.05
_GREEN, _RED, _RESET = "\x1b[32m", "\x1b[31m", "\x1b[0m"


@dataclass(frozen=True)
class Job:
    """One pytest run: a selection of tests, on the code as it is or with a fault in it."""

    selection: tuple[str, ...]
    fault: Fault | None = None


def run_all(
    jobs: Sequence[Job], workshops: Sequence[Workshop], timeout: float
) -> Iterator[tuple[Job, Outcome]]:
    """Outcomes in the order in which they come; one run at a time in each workshop."""
    waiting, running = deque(jobs), dict[Workshop, Job]()
    try:
        while waiting or running:
            for workshop in workshops:
                if workshop not in running and waiting:
                    running[workshop] = job = waiting.popleft()
                    workshop.start(job.selection, job.fault)
                elif workshop in running:
                    outcome = workshop.poll(timeout)
                    if outcome is not None:
                        yield running.pop(workshop), outcome
            time.sleep(_POLL_SECONDS)
    finally:
        for workshop in running:
            workshop.stop()


def with_progress(title: str, jobs: Sequence[Job], workshops: Sequence[Workshop],
                  timeout: float) -> Iterator[tuple[Job, Outcome]]:  # fmt: skip
    """`run_all` with a progress bar on standard error."""
    tqdm.monitor_interval = 0  # no second thread: runs are forked
    with tqdm(total=len(jobs), desc=title, unit="run", file=sys.stderr) as progress:
        for job, outcome in run_all(jobs, workshops, timeout):
            progress.update()
            yield job, outcome


def require_fit(faults: Sequence[Fault], root: Path) -> None:
    """Raises `FaultError`, naming every fault that cannot be planted."""
    problems = []
    for fault in faults:
        try:
            fault.planted(root)
        except FaultError as problem:
            problems.append(str(problem))
    if problems:
        raise FaultError("\n\n".join(problems))


def why_not_green(job: Job, outcome: Outcome) -> str | None:
    """What is wrong with a selection on the untouched copy, or None when it passes there."""
    if outcome.exit == 0 and outcome.passed:
        return None
    ended = "ran out of time" if outcome.exit is None else f"exit status {outcome.exit}"
    return (
        f"without any fault, `pytest {' '.join(job.selection)}` must pass, but: {ended}, "
        f"{len(outcome.passed)} tests passed:\n{outcome.output[-3000:]}"
    )


def judged(fault: Fault, outcome: Outcome) -> tuple[bool, str]:
    """(whether the fault was caught, by which test or why not)."""
    if outcome.exit is None:
        return fault.endless, "it never ends"
    if outcome.exit == _TESTS_FAILED and outcome.failed:
        return True, outcome.failed[0].removeprefix("tests/")
    if outcome.exit == 0:
        return False, f"{len(outcome.passed)} tests passed all the same"
    last = (outcome.output.strip().splitlines() or ["no output"])[-1]
    return False, f"no test failed in its own body, exit status {outcome.exit}: {last[:80]}"


def check(faults: Sequence[Fault], root: Path, jobs: int, timeout: float) -> list[str]:
    """Proves the baseline, plants every fault and prints a line for each; names those missed."""
    require_fit(faults, root)
    preload()
    missed = []
    with tempfile.TemporaryDirectory(prefix="specdec-mutants-") as folder:
        workshops = [Workshop(Path(folder) / str(n), root) for n in range(max(jobs, 1))]
        untouched = [Job(selection) for selection in dict.fromkeys(f.selection for f in faults)]
        found = with_progress("without faults", untouched, workshops, timeout)
        problems = [problem for run in found if (problem := why_not_green(*run)) is not None]
        if problems:
            raise FaultError("\n\n".join(problems))
        planted = [Job(fault.selection, fault) for fault in faults]
        table = Table(faults)
        for job, outcome in with_progress("with a fault", planted, workshops, timeout):
            if job.fault is not None:
                caught, how = judged(job.fault, outcome)
                missed += [] if caught else [job.fault.name]
                tqdm.write(table.row(job.fault, caught, outcome.seconds, how), file=sys.stdout)
    return missed


class Table:
    """Aligned lines; coloured on a terminal, unless NO_COLOR (no-color.org) is set."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._name = max(len(fault.name) for fault in faults)
        self._class = max(len(fault.bug_class) for fault in faults)
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def names(self, fault: Fault) -> str:
        """Name and class of a fault."""
        return f"{fault.name:{self._name}}  {fault.bug_class:{self._class}}"

    def row(self, fault: Fault, caught: bool, seconds: float, how: str) -> str:
        """A fault and what became of it."""
        mark = "caught" if caught else "MISSED"
        if self._colour:
            mark = f"{_GREEN if caught else _RED}{mark}{_RESET}"
        return f"{mark}  {self.names(fault)}  {seconds:5.1f} s  {how}"


def chosen(faults: Sequence[Fault], only: Sequence[str]) -> list[Fault]:
    """The faults named, or all; raises `FaultError` for an unknown or repeated name."""
    names = [fault.name for fault in faults]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise FaultError(f"two faults are called {repeated[0]}")
    unknown = [name for name in only if name not in names]
    if unknown:
        raise FaultError(f"there is no fault {unknown[0]!r}; --list shows them all")
    return [fault for fault in faults if not only or fault.name in only]


def main(arguments: Sequence[str] | None = None, faults: Sequence[Fault] = FAULTS,
         root: Path = ROOT) -> int:  # fmt: skip
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="only this fault; may be repeated")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="copies worked on side by side")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds a run may take")
    parser.add_argument("--list", action="store_true", help="name the faults and stop")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        wanted = chosen(faults, options.only)
        if options.list:
            table = Table(wanted)
            print("\n".join(f"{table.names(fault)}  {fault.file}" for fault in wanted))
            return 0
        missed = check(wanted, root, options.jobs, options.timeout)
    except FaultError as problem:
        print(problem, file=sys.stderr)
        return 2
    print(f"{len(wanted) - len(missed)} of {len(wanted)} faults caught, "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    if missed:
        print(f"missed: {', '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
