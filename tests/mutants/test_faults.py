"""The faults fit the code as it is, and the mutation check itself tells right from wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from laws import test_text
from mutants.fault import Fault, FaultError
from mutants.faults import FAULTS
from mutants.run import chosen, judged
from mutants.workshop import Outcome

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_code(fault: Fault) -> None:
    """When this fails after a change of the library, rewrite the fault for the new code."""
    assert fault.planted(ROOT) != (ROOT / fault.file).read_text(encoding="utf-8")
    assert fault.file.startswith(
        (
            "specdec/",
            "kernels/specdec_kernels/",
            "draft_training/specdec_training/",
            "benchmarks/specdec_bench/",
        )
    )
    named = [part for part in fault.selection if part.startswith("tests/")]
    assert named
    for node in named:
        path, *names = node.split("[")[0].split("::")
        assert (ROOT / path).exists(), path
        assert all(f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") for name in names)


def test_the_laws_that_faults_rely_on_are_run() -> None:
    """An expression that chooses no test of the fast grid would catch nothing."""
    laws = [fault.selection for fault in FAULTS if "tests/laws/test_text.py" in fault.tests]
    for selection in dict.fromkeys(laws):
        name, expression = selection[0].split("::")[1], Expression.compile(selection[2])
        cells = [mark for mark in getattr(test_text, name).pytestmark if mark.name == "parametrize"]
        fast = [str(cell.id) for cell in cells[0].args[1] if not cell.marks]
        ids = [str(cell.id) for cell in cells[0].args[1]] if "" in selection else fast
        assert any(expression.evaluate(lambda word, id=id: word in id) for id in ids), selection


def test_there_are_many_faults_and_each_has_a_name() -> None:
    assert len(FAULTS) >= 20
    assert chosen(FAULTS, []) == list(FAULTS)
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


LIBRARY = '''
"""A library."""


def larger(a: int, b: int) -> int:
    """The larger one."""
    while a < b:
        a += 1
    return a
'''
TESTS = """
import pytest

import specdec


@pytest.fixture
def three():
    return specdec.larger(2, 3)


def test_larger():
    assert specdec.larger(1, 2) == 2


def test_in_fixture(three):
    assert three
"""


def planted(name: str, old: str, new: str, tests: str = "tests/test_larger.py") -> Fault:
    return Fault(name, "example", "specdec/__init__.py", old, new, tests, name == "endless")


EXAMPLES = {
    "caught": planted("caught", "a += 1", "a += 2"),
    "missed": planted("missed", "while a < b:", "while a <= b - 1:"),
    "elsewhere": planted("elsewhere", "a += 1", "a += 2", "tests/test_larger.py -k in_fixture"),
    "endless": planted("endless", "a += 1", "a += 0"),
    "no_import": planted("no_import", "def larger", "1 / 0\n\n\ndef larger"),
    "in_a_fixture": planted(
        "in_a_fixture", "return a", "raise ValueError", "tests/test_larger.py -k in_fixture"
    ),
    "unfit": planted("unfit", "a -= 1", "a += 2"),
    "red": planted("red", "a += 1", "a += 2", "tests/test_red.py"),
    "foreign": planted("foreign", "a += 1", "a += 2", "tests/test_foreign.py"),
    "empty": planted("empty", "a += 1", "a += 2", "tests/test_larger.py -k nothing_of_the_kind"),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with one function and a test of it."""
    for name, text in (
        ("specdec/__init__.py", LIBRARY),
        ("tests/test_larger.py", TESTS),
        ("tests/test_red.py", "def test_red():\n    assert False\n"),
        (
            "tests/test_foreign.py",
            f"import sys\nsys.path.insert(0, {str(tmp_path / 'other')!r})\n"
            "def test_import():\n    import specdec\n",
        ),
        ("other/specdec/__init__.py", ""),
        ("pyproject.toml", ""),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def run(project: Path, *names: str, timeout: int = 60) -> tuple[int, str]:
    """(exit status, output) of the check on some of the examples, without its preloading."""
    program = (
        "import sys\n"
        "import mutants.run as run\n"
        "from mutants.test_faults import EXAMPLES\n"
        "from pathlib import Path\n"
        "run.preload = lambda: None\n"
        "faults = [EXAMPLES[name] for name in sys.argv[3:]]\n"
        "limit = ['--jobs', '1', '--timeout', sys.argv[2]]\n"
        "sys.exit(run.main(limit, faults, Path(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(project), str(timeout), *names],
        env={"PYTHONPATH": str(ROOT / "tests")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (project / "specdec/__init__.py").read_text(encoding="utf-8") == LIBRARY
    return done.returncode, done.stdout + done.stderr


def test_what_is_caught_and_what_is_missed(project: Path) -> None:
    """Twice the same fault: between the two, the copy was right again."""
    names = ("caught", "missed", "elsewhere", "no_import", "in_a_fixture")
    status, output = run(project, *names)
    assert status == 1, output
    assert "1 of 5 faults caught" in output
    assert "missed: missed, elsewhere, no_import, in_a_fixture" in output
    marks = {line.split()[1]: line for line in output.splitlines() if line.startswith(
        ("caught", "MISSED"))}  # fmt: skip
    assert "test_larger.py::test_larger" in marks["caught"]
    assert "2 tests passed all the same" in marks["missed"]
    assert "exit status 2" in marks["no_import"]
    assert "no test failed in its own body" in marks["in_a_fixture"]
    status, output = run(project, "caught")
    assert status == 0, output


@pytest.mark.slow
def test_an_endless_loop_is_ended(project: Path) -> None:
    status, output = run(project, "endless", timeout=6)
    assert status == 0, output
    assert "it never ends" in output


@pytest.mark.parametrize(("name", "message"), [
    ("empty", "exit status 5, 0 tests passed"),
    pytest.param("unfit", "the fault no longer fits the code", marks=pytest.mark.slow),
    pytest.param("red", "without any fault, `pytest tests/test_red.py` must pass",
                 marks=pytest.mark.slow),
    pytest.param("foreign", "instead of the copy's package", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_check_that_cannot_be_made(project: Path, name: str, message: str) -> None:
    status, output = run(project, name)
    assert status == 2, output
    assert message in output


def test_only_a_marked_fault_may_be_endless() -> None:
    forever = Outcome(None, 9.0, "")
    assert judged(EXAMPLES["endless"], forever)[0]
    assert not judged(EXAMPLES["caught"], forever)[0]


@pytest.mark.parametrize(("old", "new", "message"), [
    ("a", "b", "times instead of once"),
    ("return a", "return (a", "no longer compiles"),
    ("return a", "return (a)", "changes nothing"),
])  # fmt: skip
def test_a_fault_that_cannot_be_planted(project: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        planted("bad", old, new).planted(project)
    with pytest.raises(FaultError, match="there is no fault 'nonsense'"):
        chosen(FAULTS, ["nonsense"])
    with pytest.raises(FaultError, match="two faults are called caught"):
        chosen([EXAMPLES["caught"]] * 2, [])
