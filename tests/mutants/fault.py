"""A planted fault, and the check that it still fits the code."""

from __future__ import annotations

import ast
import shlex
from dataclasses import dataclass
from pathlib import Path


class FaultError(Exception):
    """A fault that cannot be planted, or tests that cannot judge it."""


@dataclass(frozen=True)
class Fault:
    """One small mistake that the tests must notice.

    Attributes:
        name: Short and unique, in snake case.
        bug_class: What kind of mistake it is, in a few words that several faults may share.
        file: Source file, relative to the root of the repository.
        old: Text that occurs exactly once in `file`; as short as the mistake allows, because every
            change of it makes the fault unfit.
        new: What replaces it. The file must still compile: a fault is wrong, not broken.
        tests: What pytest is given, as on a command line: node ids and `-k`. Slow tests are left
            out. Narrow enough for seconds, and never a test that exists for the fault alone.
        endless: Whether the fault may end in an endless loop, which then counts as caught.
    """

    name: str
    bug_class: str
    file: str
    old: str
    new: str
    tests: str
    endless: bool = False

    @property
    def selection(self) -> tuple[str, ...]:
        """`tests` as arguments."""
        return tuple(shlex.split(self.tests))

    def planted(self, root: Path) -> str:
        """The source of `file` below `root` with the fault in it.

        Raises:
            FaultError: `old` is not there exactly once, or the result does not compile.
        """
        path = root / self.file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        count = source.count(self.old)
        if count != 1:
            raise FaultError(
                f"{self.name}: the fault no longer fits the code: {self.file} holds its text "
                f"{count} times instead of once; rewrite `old` for the code as it is now:\n"
                f"{self.old}"
            )
        mutated = source.replace(self.old, self.new)
        try:
            same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
        except SyntaxError as problem:
            raise FaultError(f"{self.name}: {self.file} no longer compiles: {problem}") from problem
        if same:
            raise FaultError(f"{self.name}: the fault changes nothing that runs")
        return mutated
