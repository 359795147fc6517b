"""The suffix store on disk: several processes, crashes, hostile files, full disks."""

from __future__ import annotations

import copy
import errno
import os
import random
import signal
import stat
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from helpers.stores import KEY, files, holds, refresh_with_warning, store_in
from specdec.errors import ConfigError
from specdec.sources import suffix_segments
from specdec.sources.store_folder import open_folder
from specdec.sources.suffix_segments import HEADER, MAGIC, RECORD, VERSION
from specdec.sources.suffix_store import StoreWarning, SuffixStore

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="modes, links and fork are those of POSIX"),
    pytest.mark.filterwarnings("error::specdec.sources.suffix_store.StoreWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
OTHER_KEY = "b" * 64
LONG_AGO = time.time() - 100_000


def texts_of(seed: int, count: int, length: int = 50) -> list[list[int]]:
    """Texts that no other seed gives."""
    draw = random.Random(seed)
    return [[seed, *draw.choices(range(1000, 50_000), k=length)] for _ in range(count)]


def fork(work: Callable[[], object]) -> int:
    """Runs `work` in a child process that then ends at once; its id."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def wait_for(child: int) -> int:
    """The child's exit code; a child that hangs is killed."""
    deadline = time.time() + 60
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.time() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def settled(path: Path) -> None:
    """Makes a file look as if nobody had written to it for long."""
    os.utime(path, (LONG_AGO, LONG_AGO))


def test_round_trip(tmp_path: Path) -> None:
    texts = texts_of(1, 5)
    writer, reader = store_in(tmp_path), store_in(tmp_path)
    for text in texts:
        writer.add(text)
        assert holds(writer, text)  # at once, without a refresh
    assert not holds(reader, texts[0])
    reader.refresh()
    assert all(holds(reader, text) for text in texts)
    assert len(reader) == len(writer) == sum(map(len, texts))


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the records whose checksum has been computed."""
    sizes: list[int] = []
    crc = zlib.crc32

    def counting(payload: bytes) -> int:
        sizes.append(len(payload))
        return crc(payload)

    monkeypatch.setattr(zlib, "crc32", counting)
    return sizes


def test_only_new_bytes_are_read(tmp_path: Path, checked: list[int]) -> None:
    first, second = texts_of(1, 2)
    writer, reader = store_in(tmp_path), store_in(tmp_path)
    writer.add(first)
    reader.refresh()
    writer.add(second)
    checked.clear()
    reader.refresh()
    assert checked == [4 * len(second)]
    reader.refresh()
    assert checked == [4 * len(second)]
    assert len(reader) == len(first) + len(second)


def test_a_text_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    text = texts_of(1, 1)[0]
    store.add(text)
    size = files(tmp_path)[0].stat().st_size
    store.add(text)
    store.add(text[10:20])
    store.add(text[:1])
    assert files(tmp_path)[0].stat().st_size == size


def test_texts_do_not_run_into_each_other(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.add([1, 2, 3])
    store.add([4, 5, 6])
    assert not holds(store, [3, 4])


def test_modes(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "store"
    before = os.umask(0)
    try:
        store_in(folder).add([1, 2, 3])
    finally:
        os.umask(before)
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in folders] == [0o700] * 4
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(folder)] == [0o600]


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each writes 200 texts while the other does, and reads in between."""
    jobs = [texts_of(seed, 200) for seed in (1, 2, 3)]

    def write(texts: list[list[int]]) -> None:
        store = store_in(tmp_path)
        for text in texts:
            store.add(text)

    children = [fork(lambda texts=texts: write(texts)) for texts in jobs[1:]]  # type: ignore[misc]
    write(jobs[0])
    assert [wait_for(child) for child in children] == [0, 0]
    reader = store_in(tmp_path)
    reader.refresh()
    assert all(holds(reader, text) for texts in jobs for text in texts)
    assert len(files(tmp_path)) == 3


def test_a_forked_child_writes_a_file_of_its_own(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    first, second, third = texts_of(1, 3)
    store.add(first)
    child = fork(lambda: store.add(second))
    assert wait_for(child) == 0
    store.add(third)
    assert len(files(tmp_path)) == 2
    assert all(holds(store, text) for text in (first, second, third))


def test_a_fork_while_another_thread_holds_the_lock(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    with store.locked():
        child = fork(lambda: store.add([1, 2, 3]))
    assert wait_for(child) == 0
    store.refresh()
    assert holds(store, [1, 2, 3])


@pytest.mark.fault
def test_kill_in_the_middle_of_work(tmp_path: Path) -> None:
    """What was written before the kill is there, in order and without a gap."""
    texts = texts_of(4, 5000, length=400)
    child = fork(lambda: endless(store_in(tmp_path), texts))
    deadline = time.time() + 20
    while not (found := files(tmp_path)) or found[0].stat().st_size < 50_000:
        assert time.time() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert wait_for(child) == -signal.SIGKILL
    for path in files(tmp_path):
        settled(path)
    reader = store_in(tmp_path, limit=10**7)
    refresh_with_warning(reader)
    known = [holds(reader, text) for text in texts]
    assert 20 < sum(known) < len(texts)
    assert known == sorted(known, reverse=True)
    reader.add(texts[-1])
    assert holds(reader, texts[-1])


def endless(store: SuffixStore, texts: list[list[int]]) -> None:
    for text in texts:
        store.add(text)
    time.sleep(60)


@pytest.mark.fault
def test_kill_in_the_middle_of_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = texts_of(1, 3)
    write = os.write

    def half_then_die(descriptor: int, data: bytes) -> NoReturn:
        write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def work() -> None:
        store = store_in(tmp_path)
        store.add(first)
        monkeypatch.setattr(os, "write", half_then_die)
        store.add(second)

    assert wait_for(fork(work)) == -signal.SIGKILL
    store = store_in(tmp_path)
    store.refresh()  # it may still be on its way: no warning yet
    assert holds(store, first)
    store.add(third)
    torn = next(path for path in files(tmp_path) if f"-{os.getpid()}-" not in path.name)
    settled(torn)
    warned = refresh_with_warning(store)
    assert len(warned) == 1
    assert str(torn) in warned[0]
    assert "torn" in warned[0]
    assert refresh_with_warning(store) == []
    fresh = store_in(tmp_path)
    assert len(refresh_with_warning(fresh)) == 1
    assert [holds(fresh, text) for text in (first, second, third)] == [True, False, True]


def test_a_record_on_its_way_is_read_when_it_is_whole(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    first, second = texts_of(1, 2)
    store.add(first)
    path = files(tmp_path)[0]
    record = framed(second)
    with path.open("ab") as file:
        file.write(record[:30])
        file.flush()
        store.refresh()
        file.write(record[30:])
    store.refresh()
    assert holds(store, first)
    assert holds(store, second)
    assert len(store) == len(first) + len(second)


def framed(tokens: list[int]) -> bytes:
    payload = struct.pack(f"<{len(tokens)}I", *tokens)
    return RECORD.pack(len(payload), zlib.crc32(payload)) + payload


def planted(tmp_path: Path, content: bytes, number: int = 1) -> Path:
    """A file that has the name of a segment."""
    folder = open_folder(tmp_path, "s", KEY)
    path = folder / f"{number:020d}-{number}-{number:08x}.seg"
    path.write_bytes(content)
    settled(path)
    return path


GOOD_HEADER = HEADER.pack(MAGIC, VERSION, bytes.fromhex(KEY))
GOOD = framed([1, 2, 3, 4])
HOSTILE = {
    "empty": b"",
    "short header": GOOD_HEADER[:-1],
    "wrong magic": HEADER.pack(b"SPDSUFFY", VERSION, bytes.fromhex(KEY)) + GOOD,
    "wrong version": HEADER.pack(MAGIC, VERSION + 1, bytes.fromhex(KEY)) + GOOD,
    "another tokenizer": HEADER.pack(MAGIC, VERSION, bytes.fromhex(OTHER_KEY)) + GOOD,
    "zeros": bytes(5000),
    "not a segment": b"{}" * 500,
}
HOSTILE_TAILS = {
    "length beyond the file": RECORD.pack(4000, 0) + b"x" * 100,
    "absurd length": RECORD.pack(0xFFFFFFFC, 0) + b"x" * 100,
    "odd length": RECORD.pack(7, zlib.crc32(b"x" * 7)) + b"x" * 7,
    "no length": RECORD.pack(0, 0) + GOOD,
    "zeros": bytes(4096),
    "half a record header": b"\x04\x00\x00",
    "wrong checksum": GOOD[:-1] + b"\xff" + GOOD,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    path = planted(tmp_path, HOSTILE[name])
    store = store_in(tmp_path)
    warned = refresh_with_warning(store)
    assert len(warned) == 1
    assert str(path) in warned[0]
    assert len(store) == 0
    assert refresh_with_warning(store) == []
    store.add([5, 6, 7])
    assert holds(store, [5, 6, 7])


@pytest.mark.parametrize("name", HOSTILE_TAILS)
def test_damaged_tails(name: str, tmp_path: Path) -> None:
    """What stands before the damage is used, what stands behind it is not."""
    path = planted(tmp_path, GOOD_HEADER + framed([9, 8, 7]) + HOSTILE_TAILS[name])
    store = store_in(tmp_path)
    warned = refresh_with_warning(store)
    assert len(warned) == 1
    assert str(path) in warned[0]
    assert holds(store, [9, 8, 7])
    with path.open("ab") as file:
        file.write(GOOD)
    assert refresh_with_warning(store) == []
    assert len(store) == 3


def test_an_oversized_file_is_not_read(tmp_path: Path) -> None:
    path = planted(tmp_path, GOOD_HEADER)
    os.truncate(path, 1 << 40)  # sparse: a terabyte that takes no room
    settled(path)
    store = store_in(tmp_path)
    assert "more than a segment may have" in refresh_with_warning(store)[0]


def test_random_damage_never_raises_or_invents(tmp_path: Path) -> None:
    draw = random.Random(0)
    text = texts_of(1, 1)[0]
    whole = GOOD_HEADER + framed(text) + framed(text[::-1])
    for trial in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        folder = tmp_path / str(trial)
        planted(folder, bytes(damaged[: draw.randint(1, len(damaged))]))
        store = store_in(folder)
        refresh_with_warning(store)
        assert len(store) in (0, len(text), 2 * len(text))


def test_links_and_pipes_in_the_place_of_segments(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(GOOD_HEADER + GOOD)
    link = planted(tmp_path, b"", 1)
    link.unlink()
    link.symlink_to(target)
    pipe = planted(tmp_path, b"", 2)
    pipe.unlink()
    os.mkfifo(pipe)
    store = store_in(tmp_path)
    warned = refresh_with_warning(store)
    assert len(warned) == 2
    assert all("regular file" in message for message in warned)
    assert len(store) == 0


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    other = planted(tmp_path, b"").rename(open_folder(tmp_path, "s", KEY) / "x.seg")
    other.write_bytes(b"no segment")
    store = store_in(tmp_path)
    store.refresh()
    store.add([1, 2, 3])
    assert other.read_bytes() == b"no segment"


def test_spaces_and_tokenizers_share_nothing(tmp_path: Path) -> None:
    store_in(tmp_path).add([1, 2, 3])
    for other in (store_in(tmp_path, key=OTHER_KEY), store_in(tmp_path, space="t")):
        other.refresh()
        assert len(other) == 0


@pytest.mark.parametrize(
    "space", ["", ".", "..", "a/b", "a\\b", "a..b", "/etc", "-x", "a\n", "a\0", "ä", "x" * 65, 7]
)
def test_names_of_spaces(space: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="space must be"):
        SuffixStore(tmp_path, space, KEY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n", 7])
def test_fingerprints(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        SuffixStore(tmp_path, "s", key)


def test_a_limit_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        SuffixStore(tmp_path, "s", KEY, 1)


@pytest.mark.fault
@pytest.mark.parametrize("part", [0, 13])
def test_a_full_disk(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning; what was there stays, no torn record is left, and nothing is tried again."""
    store = store_in(tmp_path)
    first, second, third = texts_of(1, 3)
    store.add(first)
    size = files(tmp_path)[0].stat().st_size
    write = os.write
    calls: list[int] = []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if part:
            return write(descriptor, data[:part])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.warns(StoreWarning, match="off for the rest"):
            store.add(second)
        store.add(third)
    assert len(calls) == 1
    assert holds(store, first)
    assert files(tmp_path)[0].stat().st_size == size
    other = store_in(tmp_path)
    other.refresh()
    assert [holds(other, text) for text in (first, second)] == [True, False]


@pytest.mark.fault
def test_a_full_disk_at_the_first_text_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(StoreWarning, match="No space left"):
        store_in(tmp_path).add([1, 2, 3])
    assert files(tmp_path) == []


@pytest.mark.parametrize("folder", ["file/below", "nul\0byte", "x" * 300])
def test_a_folder_that_cannot_be_made(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = store_in(tmp_path / folder)
    assert len(refresh_with_warning(store)) == 1
    store.add([1, 2, 3])
    store.refresh()
    assert len(store) == 0


def test_the_newest_texts_are_kept(tmp_path: Path) -> None:
    texts = texts_of(1, 40, length=49)
    store = store_in(tmp_path, limit=500)
    for text in texts:
        store.add(text)
        assert len(store) <= 500
    fresh = store_in(tmp_path, limit=500)
    fresh.refresh()
    for held in (store, fresh):
        assert 250 <= len(held) <= 500
        known = [holds(held, text) for text in texts]
        assert known == sorted(known)
        assert sum(known) >= 5


def test_a_text_longer_than_the_limit_keeps_its_end(tmp_path: Path) -> None:
    text = texts_of(1, 1, length=999)[0]
    store = store_in(tmp_path, limit=100)
    store.add(text)
    assert len(store) == 50
    assert holds(store, text[-50:])
    size = files(tmp_path)[0].stat().st_size
    smaller = store_in(tmp_path, limit=40)
    smaller.refresh()
    assert len(smaller) == 20
    assert holds(smaller, text[-20:])
    store.add(text)  # is there already
    assert files(tmp_path)[0].stat().st_size == size
    assert len(store) == 50


def test_the_newest_of_many_files_are_read(tmp_path: Path, checked: list[int]) -> None:
    for number in range(1, 9):
        path = planted(tmp_path, GOOD_HEADER + framed([number] * 100), number)
        os.utime(path, (LONG_AGO + number, LONG_AGO + number))
    checked.clear()
    store = store_in(tmp_path, limit=400)
    store.refresh()
    assert len(checked) == 4
    assert [holds(store, [n] * 100) for n in range(1, 9)] == [False] * 4 + [True] * 4


def test_segments_rotate_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old files beyond what readers want are deleted, also temporary ones; fresh ones never are."""
    monkeypatch.setattr(suffix_segments, "MAX_SEGMENT_BYTES", 1000)
    folder = open_folder(tmp_path, "s", KEY)
    store = store_in(tmp_path, limit=250)
    for text in texts_of(1, 20, length=99):
        store.add(text)
    assert len(files(tmp_path)) == 10
    assert all(path.stat().st_size <= 1000 for path in files(tmp_path))
    left_over = folder / f".{1:020d}-1-{1:08x}.tmp"
    left_over.write_bytes(b"")
    for path in files(tmp_path):
        settled(path)
    last = texts_of(2, 1, length=99)[0]
    store_in(tmp_path, limit=250).add(last)
    assert len(files(tmp_path)) == 3  # 2 x 250 tokens are 2 files, and the new one
    assert not left_over.exists()
    reader = store_in(tmp_path, limit=250)
    reader.refresh()
    assert holds(reader, last)


def test_a_deleted_segment_is_replaced(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    first, second = texts_of(1, 2)
    store.add(first)
    files(tmp_path)[0].unlink()
    store.add(second)
    reader = store_in(tmp_path)
    reader.refresh()
    assert [holds(reader, text) for text in (first, second)] == [False, True]


def test_copies_are_stores_of_their_own(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.add([1, 2, 3])
    copies = [copy.deepcopy(store), copy.copy(store)]
    for number, other in enumerate(copies, 2):
        other.add([number, 5, 6])
        assert len(files(tmp_path)) == number
        assert holds(other, [1, 2, 3])
