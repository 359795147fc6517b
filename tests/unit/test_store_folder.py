"""The folders of the suffix store: whose they are, who may write to them, and what no folder is."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NoReturn

import pytest

from helpers.stores import KEY, files, holds, refresh_with_warning, store_in
from specdec.sources.store_folder import open_folder
from specdec.sources.suffix_store import StoreWarning

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="modes and links are those of POSIX"),
    pytest.mark.filterwarnings("error::specdec.sources.suffix_store.StoreWarning"),
]


def spoilt(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the store's own folder one that must not be used."""
    outside = folder.parent / "outside"
    if kind in ("link", "dangling link"):
        if kind == "link":
            outside.mkdir(mode=0o700)
        folder.symlink_to(outside)
    elif kind == "file":
        folder.write_bytes(b"")
    elif kind == "pipe":
        os.mkfifo(folder)
    else:
        folder.mkdir(mode=0o700)
    if kind in ("group", "everybody"):
        folder.chmod(0o770 if kind == "group" else 0o1777)
    elif kind == "stranger":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


SPOILT = {
    "link": "symbolic link",
    "dangling link": "symbolic link",
    "file": "not a folder",
    "pipe": "not a folder",
    "group": "can be written by somebody else (mode 0770)",
    "everybody": "can be written by somebody else (mode 1777)",
    "stranger": "belongs to somebody else",
}


@pytest.mark.parametrize("writes_first", [True, False])
@pytest.mark.parametrize("kind", SPOILT)
def test_the_stores_own_folder_is_checked(
    kind: str, writes_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On writing as on reading; nothing is put into it, and it is said once."""
    folder = tmp_path / "store"
    spoilt(kind, folder, monkeypatch)
    store = store_in(folder)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            if writes_first:
                store.add([1, 2, 3])
            store.refresh()
    (message,) = [str(warning.message) for warning in seen if warning.category is StoreWarning]
    assert f"{folder} " in message
    assert SPOILT[kind] in message
    assert len(store) == 0
    assert [path for path in tmp_path.rglob("*") if path.parent != tmp_path] == []


def test_folders_that_change_while_the_store_is_in_use(tmp_path: Path) -> None:
    """What was read before stays; nothing more is written or read."""
    folder = tmp_path / "store"
    store, other = store_in(folder), store_in(folder)
    store.add([1, 2, 3])
    before = files(folder)[0].read_bytes()
    other.refresh()
    folder.chmod(0o777)
    with pytest.warns(StoreWarning, match="somebody else"):
        store.add([4, 5, 6])
    assert "somebody else" in refresh_with_warning(other)[0]
    assert [path.read_bytes() for path in files(folder)] == [before]
    assert holds(store, [1, 2, 3])
    assert holds(other, [1, 2, 3])


@pytest.mark.parametrize(("mode", "usable"), [(0o777, False), (0o1777, True), (0o775, True)])
def test_a_folder_above_the_store(mode: int, usable: bool, tmp_path: Path) -> None:
    """Where everybody may rename what others made, a check of the store proves nothing."""
    above = tmp_path / "above" / "further"
    above.mkdir(parents=True)
    above.parent.chmod(mode)
    store = store_in(above / "store")
    warned = refresh_with_warning(store)
    assert len(warned) == (not usable)
    assert all(f"{above.parent}, above the store" in message for message in warned)
    store.add([1, 2, 3])
    assert holds(store, [1, 2, 3]) == usable


def test_a_link_above_the_store_is_followed(tmp_path: Path) -> None:
    """As /tmp is one on some systems; what it leads to is what is checked."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store_in(tmp_path / "link" / "store").add([1, 2, 3])
    assert len(files(tmp_path / "real")) == 1
    (tmp_path / "real").chmod(0o777)
    warned = refresh_with_warning(store_in(tmp_path / "link" / "store"))
    assert f"{tmp_path / 'real'}, above the store" in warned[0]


def test_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store_in(Path("~/store")).add([1, 2, 3])
    assert len(files(tmp_path / "store")) == 1


@pytest.mark.parametrize("name", ["~", "~/store", "~no-such-user-of-this-machine/store"])
def test_nobody_knows_the_users_home(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: object) -> NoReturn:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    store = store_in(Path(name))
    assert len(refresh_with_warning(store)) == 1
    store.add([1, 2, 3])


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    store = store_in(Path("store"))
    store.add([1, 2, 3])
    monkeypatch.chdir(tmp_path / "later")
    store.add([4, 5, 6])
    assert files(tmp_path / "later") == []
    assert len(files(tmp_path / "store")) == 1


@pytest.mark.parametrize("level", ["space", "key"])
def test_a_linked_folder_is_refused(level: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "store"
    (folder / "s").mkdir(parents=True, mode=0o700)
    place = folder / "s" / KEY
    if level == "space":
        place = folder / "s"
        place.rmdir()
    place.symlink_to(outside)
    store = store_in(folder)
    warned = refresh_with_warning(store)
    assert len(warned) == 1
    assert "symbolic" in warned[0]
    store.add([1, 2, 3])
    assert list(outside.iterdir()) == []


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    open_folder(tmp_path, "s", KEY).chmod(0o777)
    assert "somebody else" in refresh_with_warning(store_in(tmp_path))[0]
