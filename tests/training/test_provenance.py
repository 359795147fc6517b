"""Provenance is plain JSON whatever it is given; files are replaced whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import specdec
from specdec.artifacts.atomic_files import (
    digest_of,
    from_json,
    is_running,
    make_folder,
    open_regular,
    read_small,
    replace_file,
    size_text,
    to_json,
    write_new,
)
from specdec.artifacts.source_revision import source_revision
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec_training.run.options import TrainOptions
from specdec_training.run.provenance import provenance


@dataclasses.dataclass(frozen=True)
class Odd:
    path: Path = Path("a/b")
    numbers: tuple[float, ...] = (1.5, float("nan"), float("inf"))
    names: frozenset[str] = frozenset({"b", "a"})
    more: Any = None


def test_provenance_is_plain_json() -> None:
    target = TargetFingerprint("llama", 32, 4, 100)
    found = provenance(Odd(more={1: Odd(), "k": object}), "d" * 64, target)
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == found
    options = found["options"]
    assert options["path"] == "a/b"
    assert options["numbers"] == [1.5, "nan", "inf"]
    assert options["names"] == ["a", "b"]
    assert options["more"]["1"]["more"] is None
    assert found["specdec"] == specdec.__version__
    assert found["packages"]["torch"]
    assert found["argv"] == sys.argv
    assert found["data_hash"] == "d" * 64
    assert found["target"] == target.to_dict()
    assert found["time"].endswith("+00:00")


def test_provenance_of_real_options() -> None:
    found = provenance(TrainOptions(data=Path("x"), output=Path("y")))
    assert found["options"]["data"] == "x"
    assert from_json(to_json(found, "provenance")) == found


def git(folder: Path, *words: str) -> str:
    words = ("-c", "user.name=n", "-c", "user.email=e", *words)
    return subprocess.run(
        ["git", "-C", str(folder), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_revision_is_that_of_the_sources(tmp_path: Path) -> None:
    assert source_revision(tmp_path / "contracts.py") is None
    git(tmp_path, "init", "-q")
    (tmp_path / "contracts.py").write_text("")
    git(tmp_path, "add", "contracts.py")
    git(tmp_path, "commit", "-qm", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert source_revision(tmp_path / "contracts.py") == head
    (tmp_path / "contracts.py").write_text("changed")
    assert source_revision(tmp_path / "contracts.py") == f"{head}+changes"
    installed = tmp_path / "site-packages"  # inside the checkout, but no part of it
    installed.mkdir()
    (installed / "contracts.py").write_text("")
    assert source_revision(installed / "contracts.py") is None


def test_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance({})["revision"] is None


# ---- files


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "meta.json"
    replace_file(path, b"one")
    (tmp_path / f".meta.json.{os.getpid()}.tmp").write_bytes(b"left by a killed namesake")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            replace_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert [found.name for found in tmp_path.iterdir()] == ["meta.json"]


def test_writing_never_follows_or_overwrites(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            write_new(tmp_path / name, [b"y"])
    assert not (tmp_path / "elsewhere").exists()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, memoryview(data)[:7]))
    content = bytes(range(256)) * 3
    digest = write_new(tmp_path / "file", [content[:100], b"", memoryview(content[100:])])
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == content
    assert digest == digest_of(tmp_path / "file")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("link", "symbolic link"), ("pipe", "regular file"), ("", "regular file")):
        with pytest.raises(OSError, match=reason):
            open_regular(tmp_path / name)
    assert read_small(tmp_path / "real", 5) == b"12345"
    with pytest.raises(OSError, match="larger than the 4 bytes"):
        read_small(tmp_path / "real", 4)


def test_json_comes_back_as_it_was() -> None:
    value = {"a": [1, 0.1, None, True, "é\u2028\ud800"], "b": {"c": 2**80}}
    assert from_json(to_json(value, "value")) == value
    assert to_json({"x": 1, "y": 2}, "value") == b'{"x":1,"y":2}'
    with pytest.raises(ConfigError, match=r"value\['a'\] is a bytes"):
        to_json({"a": b""}, "value")
    for text in (b"[]", b"{", b"[" * 100_000, b"\xff", b"1" * 10_000):
        with pytest.raises(ValueError):  # noqa: PT011 - of several kinds
            from_json(text)


def test_folders_are_made_and_files_in_their_place_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists"):
        make_folder(tmp_path / "file")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        make_folder(tmp_path / "file" / "below")


def test_which_processes_run() -> None:
    assert is_running(os.getpid())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert not is_running(dead.pid)
    assert is_running(10**12)  # no process number: better not to touch what is its


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (20 * 10**9, "20.0 GB"),
     (35 * 10**12, "35.0 TB"), (5 * 10**15, "5,000.0 TB")],
)  # fmt: skip
def test_sizes_for_people(size: int, text: str) -> None:
    assert size_text(size) == text
