"""Checkpoints are whole or not there: killed savers, full disks, damage, rotation, the lock.

Savers that are killed are forked, so that thirty of them start in a moment.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.artifacts import atomic_files
from specdec.artifacts.run_lock import RunLock
from specdec.artifacts.tensor_files import _NAMES as DTYPE_NAMES
from specdec.errors import ConfigError, SpecdecError
from specdec_training.run import checkpoints
from specdec_training.run.checkpoints import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    CheckpointWarning,
)
from specdec_training.run.folder import check_run_folder

Parts = dict[str, dict[str, Tensor]]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="savers are forked")


def parts_of(step: int, size: int = 20_000) -> Parts:
    """Tensors that follow from the step alone."""
    chosen = torch.Generator().manual_seed(step)
    return {
        "head": {
            "weight": torch.randn(size, generator=chosen),
            "half": torch.randn(size, generator=chosen).bfloat16(),
        },
        "optimizer": {
            "exp_avg": torch.randn(size, generator=chosen),
            "exp_avg_sq": torch.rand(size, generator=chosen),
            "step": torch.tensor(float(step)),
        },
        "rng": {"torch": chosen.get_state()},
    }


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "loss": [1 / (n + 1) for n in range(step % 7)], "note": "é\u2028"}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(found: Checkpoint, parts: Parts, state: dict[str, Any]) -> None:
    """Bit for bit, shapes and types included."""
    assert found.state == state
    assert set(found.parts) == set(parts)
    for name, wanted in parts.items():
        tensors = found.tensors(name)
        assert set(tensors) == set(wanted)
        for key, tensor in wanted.items():
            assert (tensors[key].dtype, tensors[key].shape) == (tensor.dtype, tensor.shape)
            assert bits(tensors[key]) == bits(tensor), f"{name}.{key}"


def save(store: CheckpointStore, step: int, size: int = 20_000) -> Path:
    return store.save(step, parts_of(step, size), state_of(step))


def whole(folder: Path) -> Checkpoint:
    """The newest checkpoint, compared with what was saved at its step."""
    found = CheckpointStore(folder).latest()
    assert found is not None
    assert_equal(found, parts_of(found.step), state_of(found.step))
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- round trips


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    chosen = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for dtype in DTYPE_NAMES:
        raw = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=chosen)
        raw = raw % 2 if dtype == torch.bool else raw
        name = str(dtype)
        tensors[name] = raw.view(dtype).reshape(2, -1)  # payloads of NaN, subnormals, all of it
        tensors[f"{name} scalar"] = tensors[name][0, 0].clone()
        tensors[f"{name} empty"] = tensors[name][:, :0]
        tensors[f"{name} transposed"] = tensors[name].t()
    tensors["conjugate"] = torch.randn(5, dtype=torch.complex64).conj()
    tensors['odd name \u2028 é " \\'] = torch.ones(3, requires_grad=True)
    CheckpointStore(tmp_path).save(1, {"all": tensors}, {})
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    read = found.tensors("all")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(read[name]) == bits(tensor.detach().resolve_conj()), name


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    """The file format is safetensors', read here by its own loader."""
    from safetensors.torch import load_file

    folder = save(CheckpointStore(tmp_path), 3)
    for name, tensors in parts_of(3).items():
        found = load_file(folder / f"{name}.safetensors")
        assert {key: bits(value) for key, value in found.items()} == {
            key: bits(value) for key, value in tensors.items()
        }


def test_optimiser_and_generators_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Linear, torch.optim.AdamW, torch.Generator]:
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), torch.Generator()

    def train(model: Any, optimiser: Any, chosen: torch.Generator, steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(4, 8, generator=chosen)).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    straight = build()
    train(*straight, 12)
    model, optimiser, chosen = build()
    train(model, optimiser, chosen, 5)
    values = {
        f"{index}.{name}": value
        for index, entry in optimiser.state_dict()["state"].items()
        for name, value in entry.items()
    }
    parts = {
        "head": model.state_dict(), "optimizer": values, "rng": {"torch": chosen.get_state()},
    }  # fmt: skip
    CheckpointStore(tmp_path).save(5, parts, {"groups": optimiser.state_dict()["param_groups"]})

    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    model, optimiser, chosen = build()
    model.load_state_dict(found.tensors("head"))
    restored: dict[int, dict[str, Tensor]] = {}
    for name, value in found.tensors("optimizer").items():
        restored.setdefault(int(name.split(".")[0]), {})[name.split(".")[1]] = value
    optimiser.load_state_dict({"state": restored, "param_groups": found.state["groups"]})
    chosen.set_state(found.tensors("rng")["torch"])
    train(model, optimiser, chosen, 7)
    for mine, theirs in zip(model.parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_holds_what_json_holds(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = {"float": 0.1 + 0.2, "big": 2**70, "inf": float("inf"), "none": None, "pair": (1, 2)}
    store.save(1, {}, state | {"nan": float("nan")})
    found = store.latest()
    assert found is not None
    assert found.state.pop("nan") != 0
    assert found.state == state | {"pair": [1, 2]}
    for value, where in (
        ({"a": [torch.ones(1)]}, r"state\['a'\]\[0\] is a Tensor"),
        ({"a": {1: 2}}, r"state\['a'\] has the key 1"),
        ({"a": Path("x")}, r"state\['a'\] is a PosixPath"),
        ({"a": {1, 2}}, r"state\['a'\] is a set"),
    ):
        with pytest.raises(ConfigError, match=where):
            store.save(2, {}, value)
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(ConfigError, match="holds itself"):
        store.save(2, {}, {"a": nested})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "", ".", "A", "a.b", "x" * 65, "a\n", 3])
def test_part_names_are_checked(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match="a part of a checkpoint is named"):
        CheckpointStore(tmp_path / "run").save(1, {name: {}}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [-1, 1.0, True, 10**15, "1"])
def test_steps_are_checked(tmp_path: Path, step: Any) -> None:
    with pytest.raises(ConfigError, match="step must be a whole number"):
        CheckpointStore(tmp_path).save(step, {}, {})


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(1, dtype=torch.complex128), "complex128, which safetensors does not hold"),
        (torch.ones(1, device="meta"), "on the meta device"),
        (torch.ones(2, 2).to_sparse(), "torch.sparse_coo"),
        ([1.0], "is a list, not a tensor"),
    ],
)
def test_tensors_are_checked_before_anything_is_written(
    tmp_path: Path, tensor: Any, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        CheckpointStore(tmp_path / "run").save(1, {"head": {"w": tensor}}, {})
    assert list(tmp_path.iterdir()) == []


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path).latest() is None
    assert CheckpointStore(tmp_path / "missing").latest() is None
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot read"):
        CheckpointStore(tmp_path / "file").latest()
    with pytest.raises(CheckpointError, match="cannot save step 1"):
        save(CheckpointStore(tmp_path / "file"), 1)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)
    with pytest.raises(CheckpointError, match="no part 'haed', only head, optimizer, rng"):
        whole(tmp_path).tensors("haed")


# ---- rotation


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (0, 5, 10, 15, 20, 100_000_000):
        save(store, step, 10)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000015", "step-00000020", "step-100000000"]
    found = store.latest()
    assert found is not None
    assert found.step == 100_000_000
    with pytest.raises(ConfigError, match="keep must be at least 1"):
        CheckpointStore(tmp_path, keep=0)


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("{}")
    (tmp_path / "best").mkdir()
    for step in range(4):
        save(CheckpointStore(tmp_path, keep=1), step, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "log.jsonl", "step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 7)
    store.save(7, {"head": {"weight": torch.ones(3)}}, {"finished": True})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    found = store.latest()
    assert found is not None
    assert_equal(found, {"head": {"weight": torch.ones(3)}}, {"finished": True})


def test_a_later_whole_checkpoint_is_never_shadowed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    later = save(store, 50)
    with pytest.raises(CheckpointError, match="step-00000050 is later and whole"):
        save(store, 40)
    assert whole(tmp_path).step == 50
    damaged = later / "head.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    save(store, 40)  # the damaged one goes, instead of counting as the newest
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000040"]


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".tmp-5-{dead.pid}", f".tmp-6-{os.getpid()}", f".tmp-7-{os.getppid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "head.safetensors").write_bytes(b"half")
    save(CheckpointStore(tmp_path), 8)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".tmp-7-{os.getppid()}", "step-00000008"]  # that one may be at work


# ---- damage


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damages(size: int, chosen: random.Random) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    for bit in chosen.sample(range(size * 8), min(40, size * 8)):
        yield f"bit {bit}", lambda data, bit=bit: flipped(data, bit)
    for length in {0, 1, size // 2, size - 1}:
        yield f"cut to {length}", lambda data, length=length: data[:length]
    yield "longer", lambda data: data + b"\0"


def with_warnings(work: Callable[[], Checkpoint | None]) -> tuple[Checkpoint | None, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return work(), [str(warning.message) for warning in said]


@pytest.mark.fault
def test_every_damage_of_every_file_is_noticed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 100)
    newest = save(store, 2, 100)
    chosen = random.Random(0)
    seen = 0
    for path in sorted(newest.iterdir()):
        data = path.read_bytes()
        for what, change in damages(len(data), chosen):
            path.write_bytes(change(data))
            found, said = with_warnings(store.latest)
            assert found is not None, (path.name, what)
            assert found.step == 1, (path.name, what)
            assert "is damaged and passed over" in said[0], (path.name, what)
            assert "going on from the older" in said[1]
            seen += 1
        path.write_bytes(data)
        path.rename(path.with_suffix(".gone"))
        found, said = with_warnings(store.latest)
        assert found is not None, path.name
        assert (found.step, len(said)) == (1, 2), path.name
        path.with_suffix(".gone").rename(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = store.latest()
    assert found is not None
    assert found.step == 2
    print(f"{seen} damages in {len(list(newest.iterdir()))} files, all noticed")


def test_when_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        (save(store, step, 10) / "COMPLETE.json").unlink()
    with pytest.warns(CheckpointWarning, match="no COMPLETE.json, so it was never finished"):
        assert store.latest() is None


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    marker = folder / "COMPLETE.json"
    value = json.loads(marker.read_text())
    value = change(value) or value
    marker.write_text(json.dumps(value, separators=(",", ":")))


def listed(name: str) -> Callable[[dict[str, Any]], None]:
    def change(marker: dict[str, Any]) -> None:
        marker["files"][name] = marker["files"]["head.safetensors"]

    return change


@pytest.mark.parametrize(
    "change",
    [
        listed("../../secret.safetensors"),
        listed("/etc/passwd"),
        listed("a/b.safetensors"),
        listed("head.safetensors\0"),
        listed("missing.safetensors"),
        lambda marker: marker.update(step=3),
        lambda marker: marker.update(version=2),
        lambda marker: marker.update(more=1),
        lambda marker: marker.update(files=[]),
        lambda marker: marker.update(files={}),
        lambda marker: marker["files"].update({"state.json": None}),
        lambda marker: marker["files"]["state.json"].update(bytes=-1),
        lambda marker: marker["files"]["state.json"].update(bytes=True),
        lambda marker: marker["files"]["state.json"].update(sha256="0" * 63),
        lambda marker: [marker],
    ],
)
def test_a_hostile_marker_is_refused(tmp_path: Path, change: Any) -> None:
    rewrite(save(CheckpointStore(tmp_path), 1, 10), change)
    with pytest.warns(CheckpointWarning):
        assert CheckpointStore(tmp_path).latest() is None


def test_hostile_json_is_refused(tmp_path: Path) -> None:
    marker = save(CheckpointStore(tmp_path), 1, 10) / "COMPLETE.json"
    good = marker.read_bytes()
    for text in (
        b"[" * 100_000,
        b"{}" + b" " * (2 << 20),
        good.replace(b'"step":1', b'"step":9,"step":1'),
        good.replace(b'"step":1', b'"step": 1'),
        good.replace(b'"step":1', b'"step":' + b"1" * 5000),
        b"\xff\xfe",
    ):
        marker.write_bytes(text)
        with pytest.warns(CheckpointWarning):
            assert CheckpointStore(tmp_path).latest() is None


def test_hostile_state_with_the_right_hash_is_refused(tmp_path: Path) -> None:
    """Whoever writes the state can write the marker, too."""
    folder = save(CheckpointStore(tmp_path), 1, 10)
    for text in (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"[1]", b"nonsense"):
        (folder / "state.json").write_bytes(text)
        digest = atomic_files.digest_of(folder / "state.json")
        facts = {"bytes": digest.size, "sha256": digest.sha256}
        rewrite(folder, lambda marker, facts=facts: marker["files"].update({"state.json": facts}))
        with pytest.warns(CheckpointWarning):
            assert CheckpointStore(tmp_path).latest() is None


@pytest.mark.parametrize("name", ["COMPLETE.json", "state.json", "head.safetensors", ""])
def test_symbolic_links_are_refused(tmp_path: Path, name: str) -> None:
    real = save(CheckpointStore(tmp_path / "run"), 1, 10)
    path = real / name if name else real
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(CheckpointWarning):
        assert CheckpointStore(tmp_path / "run").latest() is None
    # and rotation removes the link, not what it points to
    for step in (2, 3, 4):
        save(CheckpointStore(tmp_path / "run", keep=1), step, 10)
    assert (tmp_path / "elsewhere").exists()


@needs_fork
def test_a_pipe_in_the_place_of_a_file_makes_nobody_wait(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path), 1, 10)
    for name in ("COMPLETE.json", "head.safetensors"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.warns(CheckpointWarning):
            assert CheckpointStore(tmp_path).latest() is None
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    assert CheckpointStore(tmp_path).latest() is not None


# ---- full disks


class FullDisk:
    """os.write that finds no room after a number of bytes, as a full disk does."""

    def __init__(self, room: int, error: int = errno.ENOSPC) -> None:
        self.room, self.error, self.asked, self._write = room, error, 0, os.write

    def __call__(self, descriptor: int, data: Any) -> int:
        size = memoryview(data).nbytes
        self.asked += size
        if size <= self.room:
            self.room -= size
            return self._write(descriptor, data)
        if self.room > 0:  # a disk takes what still fits, and fails at the next byte
            written = self._write(descriptor, memoryview(data)[: self.room])
            self.room = 0
            return written
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.fault
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    before = content(tmp_path)
    disk = FullDisk(10**9)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", disk)
        save(CheckpointStore(tmp_path / "other"), 2)
    shutil.rmtree(tmp_path / "other")
    total = disk.asked
    rooms = sorted({0, 1, total // 7, total // 3, total // 2, total - 300, total - 1})
    for room in rooms:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FullDisk(room, error))
            with pytest.raises(CheckpointError, match="cannot save step 2") as caught:
                save(store, 2)
        assert content(tmp_path) == before, room
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], room
        text = str(caught.value)
        assert os.strerror(error) in text
        assert "untouched" in text
        if error != errno.EIO:
            assert "it needs " in text
            assert "are free" in text
    assert whole(tmp_path).step == 1
    save(store, 2)  # as soon as there is room
    assert whole(tmp_path).step == 2
    print(f"full after {', '.join(map(str, rooms))} of {total} bytes: step 1 intact each time")


@pytest.mark.fault
@needs_fork
def test_the_largest_file_allowed_is_a_full_disk(tmp_path: Path) -> None:
    """A limit of the operating system, in a process of its own: no write is pretended."""
    save(CheckpointStore(tmp_path, keep=1), 1)
    before = content(tmp_path)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for most in (1, 4096, 100_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            with pytest.raises(CheckpointError, match=r"File too large; it needs 2\d\d\.\d kB"):
                save(CheckpointStore(tmp_path, keep=1), 2)

    assert forked(limited).wait() == 0
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_too_little_room_is_seen_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CheckpointStore(tmp_path), 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "write", FullDisk(0))
    with pytest.raises(CheckpointError, match=r"it needs 2\d\d\.\d kB, 1\.0 kB are free"):
        save(CheckpointStore(tmp_path), 2)
    assert whole(tmp_path).step == 1


def test_an_interrupt_removes_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CheckpointStore(tmp_path), 1)

    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(CheckpointStore(tmp_path), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# ---- kills


class Child:
    """A forked process."""

    def __init__(self, process: int) -> None:
        self.process = process

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code; minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def forked(work: Callable[[], None]) -> Child:
    """Runs `work` in a copy of this process, which ends without pytest noticing."""
    process = os.fork()
    if process:
        return Child(process)
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - a child must not come back
        traceback.print_exc()
    finally:
        os._exit(code)
    raise AssertionError


def saver(folder: Path, first: int, done: int) -> Callable[[], None]:
    """Saves for ever; writes each step to the descriptor `done` once `save` has returned."""

    def work() -> None:
        store, step = CheckpointStore(folder), first
        while True:
            save(store, step)
            os.write(done, step.to_bytes(8, "little"))
            step += 1

    return work


@pytest.mark.fault
@needs_fork
def test_thirty_kills_at_random_moments(tmp_path: Path) -> None:
    """The newest complete checkpoint always loads, and is no older than the last one reported."""
    started = time.perf_counter()
    for step in range(1, 6):
        save(CheckpointStore(tmp_path / "timing"), step)
    duration = (time.perf_counter() - started) / 5
    folder, chosen = tmp_path / "run", random.Random(0)
    saved = first = 1
    in_the_middle = reported_and_newer = 0
    for _ in range(30):
        reader, writer = os.pipe()
        child = forked(saver(folder, first, writer))
        os.close(writer)
        if os.read(reader, 8):  # the first one is there: kill it somewhere in the next two
            time.sleep(chosen.random() * 2 * duration)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        with os.fdopen(reader, "rb") as stream:
            reported = stream.read()[-8:]
        saved = int.from_bytes(reported, "little") if reported else first
        in_the_middle += any(path.name.startswith(".tmp-") for path in folder.iterdir())
        with warnings.catch_warnings():
            warnings.simplefilter("error", CheckpointWarning)
            found = whole(folder)
        assert found.step >= saved
        reported_and_newer += found.step > saved
        first = found.step + 1
    save(CheckpointStore(folder), first)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"step-{first - 1:08d}", f"step-{first:08d}"]
    assert in_the_middle >= 3, "the kills must hit saves"
    print(
        f"30 kills over saves of {1000 * duration:.0f} ms: {in_the_middle} left a half-written "
        f"checkpoint behind, {reported_and_newer} a whole one not reported yet, 30 of 30 newest "
        "checkpoints whole"
    )


class KilledAt:
    """Ends this process, without any clean-up, at the n-th call that changes the disk."""

    CALLS = ("write", "fsync", "mkdir", "rename", "unlink", "rmdir", "replace")

    def __init__(self, call: int) -> None:
        self.left = call
        for name in self.CALLS:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call


@pytest.mark.fault
@needs_fork
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_a_kill_at_every_single_call_to_the_disk(tmp_path: Path, again: bool) -> None:
    """Not random: before each write, flush, rename and removal of one save, one after the other."""
    call, steps = 0, set()
    while True:
        call += 1
        folder = tmp_path / str(call)
        store = CheckpointStore(folder, keep=1)
        save(store, 4)
        (folder / ".tmp-9-99999999").mkdir()  # so that a save has a leftover to remove
        later = 4 if again else 5

        def work(call: int = call, store: CheckpointStore = store, later: int = later) -> None:
            KilledAt(call)
            save(store, later)

        code = forked(work).wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error", CheckpointWarning)
            steps.add(whole(folder).step)
        save(store, 6)
        assert [path.name for path in folder.iterdir()] == ["step-00000006"]
        shutil.rmtree(folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert call > 20
    assert steps == ({4} if again else {4, 5})
    print(f"killed before each of {call - 1} calls: a whole checkpoint every time")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads descriptors' names")
def test_everything_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill cannot show: the order that a loss of power depends on."""
    log: list[str] = []

    def logged(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            target = arguments[0]
            if isinstance(target, int):
                target = Path(f"/proc/self/fd/{target}").readlink()
            log.append(f"{name} {Path(target).relative_to(tmp_path)}")
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "rename"):
        logged(name)
    save(CheckpointStore(tmp_path / "run"), 5)
    temporary = f"run/.tmp-5-{os.getpid()}"
    files = ["state.json", "head.safetensors", "optimizer.safetensors", "rng.safetensors"]
    flushed = [entry for entry in log if not entry.startswith("write")]
    assert flushed == [
        "fsync .",  # the new folder's own name
        *(f"fsync {temporary}/{name}" for name in files),
        f"fsync {temporary}",
        f"fsync {temporary}/COMPLETE.json",
        f"fsync {temporary}",
        f"rename {temporary}",
        "fsync run",
    ]
    for name in (*files, "COMPLETE.json"):
        last = max(n for n, entry in enumerate(log) if entry == f"write {temporary}/{name}")
        assert log[last + 1] == f"fsync {temporary}/{name}"


# ---- one run per folder


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    second = RunLock(tmp_path / "run")
    refused = pytest.raises(SpecdecError, match=f"another run writes to .*process {os.getpid()} on")
    with RunLock(tmp_path / "run"), refused:
        second.__enter__()
    with RunLock(tmp_path / "run"):
        pass
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        1 / 0  # noqa: B018
    with RunLock(tmp_path):
        pass


@pytest.mark.fault
@needs_fork
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def hold() -> None:
        with RunLock(tmp_path):
            os.write(writer, b"x")
            time.sleep(60)

    child = forked(hold)
    os.read(reader, 1)
    with pytest.raises(SpecdecError, match=f"process {child.process} on"), RunLock(tmp_path):
        pass
    child.kill()
    child.wait()
    assert (tmp_path / "run.lock").read_bytes()  # it had no chance to tidy up
    with RunLock(tmp_path):
        pass
    os.close(reader)
    os.close(writer)


@pytest.mark.fault
@needs_fork
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a marker beside the file names the process."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("specdec.artifacts.append_file.lock_descriptor", refuse)
    marker = tmp_path / "run.lock.lock"
    forked(RunLock(tmp_path).__enter__).wait()
    assert marker.exists(), "it had no chance to tidy up"
    with RunLock(tmp_path):
        check_run_folder(tmp_path)  # lock and marker are its own
        owner = json.loads((tmp_path / "run.lock").read_bytes())
        assert owner == {"process": os.getpid(), "host": socket.gethostname()}
        busy = f"process {os.getpid()} on .* If it is gone, delete .*run.lock.lock"
        with pytest.raises(SpecdecError, match=busy), RunLock(tmp_path):
            pass
    assert not marker.exists()
    marker.write_text("1\nelsewhere\n")
    with pytest.raises(SpecdecError, match="If it is gone, delete"), RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecdecError, match="cannot lock the folder"), RunLock(tmp_path / "file"):
        pass
    (tmp_path / "run.lock").symlink_to(tmp_path / "file")
    with pytest.raises(SpecdecError, match="cannot lock the folder"), RunLock(tmp_path):
        pass
