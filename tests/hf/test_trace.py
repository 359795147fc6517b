"""The JSONL trace when its file is missing, full, shared, odd, or no file at all."""

from __future__ import annotations

import errno
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import specdec
from helpers.hf import plain, prompt, tiny_llama
from specdec import SpecConfig
from specdec.errors import ConfigError
from specdec.generate.trace import TraceWarning, traced

NEW = 12
POSIX = pytest.mark.skipif(os.name != "posix", reason="special files are those of POSIX")


@pytest.fixture
def model() -> Any:
    return specdec.augment(tiny_llama(), "prompt_lookup")


def run(model: Any, trace: str | Path, **options: Any) -> Any:
    settings = SpecConfig("prompt_lookup", trace=trace, **options)
    return model.generate(prompt(), max_new_tokens=NEW, do_sample=False, specdec=settings)


def said(seen: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in seen if warning.category is TraceWarning]


@contextmanager
def listening() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def place(kind: str, folder: Path) -> Path:
    """A path that cannot be written to."""
    (folder / "file").write_bytes(b"")
    if kind == "pipe":
        os.mkfifo(folder / "pipe")
    return {
        "missing folder": folder / "missing" / "rounds.jsonl",
        "a folder": folder,
        "below a file": folder / "file" / "rounds.jsonl",
        "long name": folder / ("x" * 300),
        "no name": folder / "nul\0byte",
        "no such user": Path("~no-such-user-of-this-machine/rounds.jsonl"),
        "full device": Path("/dev/full"),
        "pipe": folder / "pipe",
    }[kind]


KINDS = ("missing folder", "a folder", "below a file", "long name", "no name", "no such user")


@pytest.mark.fault
@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=POSIX) for kind in ("full device", "pipe"))]
)
def test_a_trace_that_cannot_be_written_is_one_warning(
    model: Any, kind: str, tmp_path: Path
) -> None:
    """In three calls, of many rounds each; their text is plain's."""
    wanted = plain(model, prompt(), max_new_tokens=NEW, do_sample=False)
    path = place(kind, tmp_path)
    with listening() as seen:
        for _ in range(3):
            assert torch.equal(run(model, path), wanted)
    (message,) = said(seen)
    assert repr(str(path))[:100] in message
    assert "the text stays the same" in message


@pytest.mark.fault
def test_a_file_that_may_not_be_opened(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is refused in the middle: what was written before is whole."""
    path, real, left = tmp_path / "rounds.jsonl", os.write, [3]

    def denied(descriptor: int, data: bytes) -> int:
        if not left[0]:
            raise PermissionError(errno.EACCES, "Permission denied")
        left[0] -= 1
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", denied)
    with pytest.warns(TraceWarning, match="Permission denied"):
        run(model, path)
    assert [line["index"] for line in lines(path)] == [0, 1, 2]


@pytest.mark.fault
def test_a_disk_that_takes_half_a_line(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half is cut off, so the next call's lines are whole."""
    path, real, calls = tmp_path / "rounds.jsonl", os.write, list[int]()

    def nearly_full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 3:
            return real(descriptor, data[: len(data) // 2])
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", nearly_full)
        with pytest.warns(TraceWarning, match="No space left"):
            run(model, path)
        assert len(calls) == 4, "nothing is tried again in this call"
    assert [line["index"] for line in lines(path)] == [0, 1]
    with listening() as seen:
        run(model, path)
    assert said(seen) == []
    assert [line["index"] for line in lines(path)][:4] == [0, 1, 0, 1]


def test_the_half_of_a_line_stays_when_another_writer_came_after_it(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, calls = tmp_path / "rounds.jsonl", os.write, list[int]()

    def shared(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            half = real(descriptor, data[: len(data) // 2])
            with path.open("ab") as other:
                other.write(b'\n{"of": "another"}\n')
            return half
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", shared)
    with pytest.warns(TraceWarning):
        run(model, path)
    assert path.read_bytes().endswith(b'{"of": "another"}\n')


def test_a_file_that_works_again_is_written_again(model: Any, tmp_path: Path) -> None:
    """And when it then fails, that is news."""
    path = tmp_path / "folder" / "rounds.jsonl"
    with listening() as seen:
        run(model, path)
        path.parent.mkdir()
        run(model, path)
        assert lines(path)[0]["index"] == 0
        path.unlink()
        path.parent.rmdir()
        run(model, path)
    assert len(said(seen)) == 2


@POSIX
def test_a_pipe_that_somebody_reads(model: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with listening() as seen:
            run(model, tmp_path / "pipe")
        assert said(seen) == []
        assert json.loads(os.read(reader, 1 << 16).splitlines()[0])["index"] == 0
    finally:
        os.close(reader)


@pytest.mark.parametrize("as_text", [True, False])
def test_the_users_home(
    model: Any, as_text: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run(model, "~/rounds.jsonl" if as_text else Path("~/rounds.jsonl"))
    assert len(lines(tmp_path / "home" / "rounds.jsonl")) > 1
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("trace", [3, True, b"rounds.jsonl", "", ["a"], 1.5, object()])
def test_a_trace_that_is_no_path_is_refused_at_once(trace: Any) -> None:
    with pytest.raises(ConfigError, match="trace must be the path of a file"):
        specdec.augment(tiny_llama(), "prompt_lookup", trace=trace)


@pytest.mark.parametrize("on_round", [3, True, "print", [print]])
def test_a_callback_that_cannot_be_called_is_refused_at_once(on_round: Any) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match="on_round must be callable"):
        specdec.augment(model, "prompt_lookup", on_round=on_round)
    with pytest.raises(ConfigError, match="on_round must be callable"):
        specdec.augment(model, config=SpecConfig("none", on_round=on_round))


def test_the_file_is_opened_once_a_call_and_closed(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the call ends in an exception."""
    path, real, opened = tmp_path / "rounds.jsonl", os.open, list[int]()

    def watched(name: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = real(name, *args, **kwargs)
        if Path(name) == path:
            opened.append(descriptor)
        return descriptor

    def stop(record: Any) -> NoReturn:
        raise RuntimeError("the user's callback fails")

    monkeypatch.setattr(os, "open", watched)
    run(model, path)
    assert len(lines(path)) > 2
    assert len(opened) == 1
    with pytest.raises(RuntimeError, match="the user's callback"):
        run(model, path, on_round=lambda record: record.index and stop(record))
    assert len(opened) == 2
    for descriptor in opened:
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(descriptor)


class Record:
    """A round of a thread, far longer than any buffer."""

    def __init__(self, index: int) -> None:
        self._index = index

    def to_json(self) -> dict[str, Any]:
        return {"thread": self._index, "tokens": [self._index] * 30_000}


def test_lines_of_threads_do_not_run_into_each_other(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        with traced(path, {}) as (observer,):
            barrier.wait()
            for _ in range(10):
                observer(None, Record(index))  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = lines(path)
    assert Counter(line["thread"] for line in found) == dict.fromkeys(range(4), 10)
    assert all(line["tokens"] == [line["thread"]] * 30_000 for line in found)
