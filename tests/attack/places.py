"""The files and folders that an attack names: good ones, and hostile variants of them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from helpers.heads import head_for
from helpers.tiny_model import CHAT_TEMPLATE, write_model
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.heads.checkpoints.save import save_head

DEEP = "[" * 100_000
_SPARSE = 10 * 2**30


def deep_json() -> bytes:
    """Nested deeper than any parser goes."""
    return (DEEP + "]" * len(DEEP)).encode()


CONTENT: Mapping[str, bytes] = {
    "empty": b"",
    "binary": bytes(range(256)) * 16,
    "nul": b"\0" * 4096,
    "bad_utf8": b"caf\xe9 \xff\xfe\n",
    "utf16": "hello".encode("utf-16"),
    "deep": deep_json(),
    "list": b"[1, 2]",
    "text": b'"text"',
    "null": b"null",
    "nan": b'{"a": NaN}',
    "open": b'{"a": ',
    "twice": b'{"a": 1, "a": 2}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "surrogate": b'{"prompt": "\\ud800", "answer": "\\udfff", "text": "\\ud800"}\n',
}
"""Name -> what a hostile file holds."""


def write_hostile_files(folder: Path) -> dict[str, Path]:
    """Files of every content, and whatever else can stand where a file is expected."""
    folder.mkdir()
    made = {}
    for name, content in CONTENT.items():
        made[name] = folder / f"{name}.jsonl"
        made[name].write_bytes(content)
    made["folder"] = folder / "folder.jsonl"
    made["folder"].mkdir()
    made["fifo"] = folder / "fifo.jsonl"
    os.mkfifo(made["fifo"])
    made["loop"] = folder / "loop.jsonl"
    made["loop"].symlink_to(made["loop"])
    made["dangling"] = folder / "dangling.jsonl"
    made["dangling"].symlink_to(folder / "nothing")
    made["secret"] = folder / "secret.jsonl"
    made["secret"].write_text("{}\n")
    made["secret"].chmod(0)
    made["sparse"] = folder / "sparse.jsonl"
    with made["sparse"].open("wb") as stream:
        stream.truncate(_SPARSE)
    made["zero"] = Path("/dev/zero")
    made["linked_zero"] = folder / "zero.jsonl"
    made["linked_zero"].symlink_to("/dev/zero")
    made["null_device"] = Path("/dev/null")
    made["memory"] = Path("/proc/self/mem")  # opens, and fails to be read
    made["missing"] = folder / "missing.jsonl"
    return made


def write_locked(folder: Path) -> Path:
    """A folder in which nothing can be written."""
    folder.mkdir()
    folder.chmod(0o555)
    return folder


class Variants:
    """Copies of a checkpoint with one thing wrong.

    Args:
        original: A good folder.
        root: Where the copies go.
    """

    def __init__(self, original: Path, root: Path) -> None:
        self.original, self._root = original, root
        root.mkdir()

    def _copy(self, name: str) -> Path:
        folder = self._root / "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:100]
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.original, folder))

    def with_value(self, field: str, value: Any, file: str = "config.json") -> Path:
        """One field of a JSON file has another value."""
        folder = self._copy(f"{file}-{field}-{json.dumps(value)[:40]}")
        path = folder / file
        found = json.loads(path.read_text())
        place = found
        *above, last = field.split(".")
        for key in above:
            place = place[key]
        place[last] = value
        path.write_text(json.dumps(found))
        return folder

    def with_file(self, file: str, content: bytes | None, name: str) -> Path:
        """One file has another content; None removes it."""
        folder = self._copy(f"{file}-is-{name}")
        (folder / file).unlink(missing_ok=True)
        if content is not None:
            (folder / file).write_bytes(content)
        return folder

    def with_link(self, file: str, to: str, name: str) -> Path:
        """One file is a link."""
        folder = self.with_file(file, None, name)
        (folder / file).symlink_to(to)
        return folder

    def with_special(self, file: str, kind: str) -> Path:
        """One file is a folder, a FIFO, or far too large."""
        folder = self.with_file(file, None, kind)
        path = folder / file
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            with path.open("wb") as stream:
                stream.truncate(_SPARSE)
        return folder

    def with_tensors(self, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """Other weights."""
        folder = self._copy(f"tensors-{name}")
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        return folder


def headers(good: bytes) -> dict[str, bytes]:
    """Safetensors files that are none, made from a good one."""
    size = struct.unpack("<Q", good[:8])[0]
    header, rest = json.loads(good[8 : 8 + size]), good[8 + size :]

    def packed(changed: Any) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + rest

    first = next(name for name in header if name != "__metadata__")

    def with_first(**changes: Any) -> bytes:
        return packed({**header, first: {**header[first], **changes}})

    return {
        "empty": b"",
        "garbage": b"no tensors here" * 9,
        "cut": good[: len(good) // 2],
        "huge_header": struct.pack("<Q", 2**62) + good[8:],
        "long_header": struct.pack("<Q", 99_999_999) + good[8:],
        "no_json": packed(b"{" * 64),
        "deep": packed(deep_json()),
        "no_object": packed([1]),
        "no_tensors": packed({}),
        "other_dtype": with_first(dtype="X9"),
        "other_shape": with_first(shape=[2**40, 2**40]),
        "negative_shape": with_first(shape=[-1, -1]),
        "overlap": with_first(data_offsets=[0, 4]),
        "far": with_first(data_offsets=[2**50, 2**50 + 4]),
    }


def write_good(root: Path) -> dict[str, Path]:
    """A model, one with a chat template, and a head of the model."""
    from transformers import AutoModelForCausalLM

    model_folder = write_model(root / "model")
    chat = write_model(root / "chat", CHAT_TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    fingerprint = TargetFingerprint.of(model.config, tokenizer)
    head = head_for(model)
    save_head(head, root / "head", fingerprint=fingerprint, num_target_layers=2, facts={})
    return {"MODEL": model_folder, "CHAT": chat, "HEAD": root / "head"}
