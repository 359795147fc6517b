"""An editable install of a clone that is called specdec, used from the folder above it.

Python started there looks into that folder first, and what it finds is the clone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("kernels", "training", "integrations", "bench")
PACKAGES = ("specdec", *(f"specdec_{side}" for side in SIDES))
PARTS = ("specdec", "kernels", "draft_training", "integrations", "benchmarks")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, folder: Path) -> str:
    """Output of a command that must succeed and that knows no other clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def above(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clone `specdec` and, in `env`, an environment that it is installed in."""
    if any(importlib.util.find_spec(name) is None for name in ("hatchling", "pip")):
        pytest.skip("the build backend hatchling, or pip, is not installed")
    above = tmp_path_factory.mktemp("above")
    clone = above / "specdec"
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, clone / part, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, clone / name)
    run(sys.executable, "-m", "venv", "--without-pip", above / "env", folder=above)
    python = interpreter(above)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=above)
    borrowed = sysconfig.get_path("purelib")  # torch and the rest; its own .pth files are not read
    (Path(site.strip()) / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
        "--no-index", "--no-build-isolation", "--disable-pip-version-check", "-e", clone,
        folder=above,
    )  # fmt: skip
    return above


def interpreter(above: Path) -> Path:
    return above / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.mark.parametrize("folder", [".", "specdec", "env"])
def test_the_packages_are_found(folder: str, above: Path) -> None:
    """From above the clone, from inside it, and from elsewhere; each is the clone's."""
    code = (
        f"import importlib\nfor name in {PACKAGES}: print(importlib.import_module(name).__file__)"
    )
    found = run(interpreter(above), "-c", code, folder=above / folder).split()
    assert len(found) == len(PACKAGES)
    for name, file in zip(PACKAGES, found, strict=True):
        assert Path(file).parent.name == name
        assert Path(file).is_relative_to(above / "specdec")


def test_the_librarys_names_are_found(above: Path) -> None:
    code = "import specdec; print(specdec.SpecdecError.__module__, *dir(specdec))"
    found = run(interpreter(above), "-c", code, folder=above).split()
    assert found[0] == "specdec.errors"
    assert "augment" in found
