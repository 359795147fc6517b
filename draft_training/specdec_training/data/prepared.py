"""Prepared data: what `specdec data prepare` writes and every trainer reads.

A folder with `examples/` (Arrow), `draft_vocab.safetensors`, `held_out.json` and `meta.json`. The
last is written last, in a folder that gets its name when it is whole: a folder without it was never
finished, and is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError, SpecdecError
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary

FORMAT_VERSION = 1
EXAMPLES, VOCABULARY, HELD_OUT, META = (
    "examples",
    "draft_vocab.safetensors",
    "held_out.json",
    "meta.json",
)
_MOST_META_BYTES = 2**20
_MOST_HELD_OUT_BYTES = 2**28


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        token_ids: Ids of the target.
        loss_mask: For each token whether the assistant wrote it, so that it is to be predicted.
            Not shifted: `loss_mask[t]` is about `token_ids[t]`.
    """

    token_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class PreparedMeta:
    """What prepared data are, in JSON beside them.

    Attributes:
        format_version: Of the files in the folder; readers refuse another.
        target: The target they were made for.
        tokenizer: `tokenizer_fingerprint` of its tokenizer.
        chat_template: Hash of the chat template and its variables, or None without one.
        vocab_size: V, ids that the target scores.
        max_length: Most tokens of an example.
        rows: Number of examples.
        tokens: Tokens of all examples.
        loss_tokens: Tokens to be predicted.
        held_out: Number of prompts kept out of training.
        rows_read: Rows of the input.
        skipped: Reason -> rows that were skipped for it.
        kinds: Row format -> examples from it.
        draft_vocab_size: D, tokens that a head can propose.
        draft_vocab_coverage: Share of the tokens to be predicted that the draft vocabulary holds.
        data_hash: SHA-256 over the examples.
        vocab_hash: SHA-256 of the file with the draft vocabulary.
        held_out_hash: SHA-256 of the file with the held-out prompts.
    """

    format_version: int
    target: TargetFingerprint
    tokenizer: str
    chat_template: str | None
    vocab_size: int
    max_length: int
    rows: int
    tokens: int
    loss_tokens: int
    held_out: int
    rows_read: int
    skipped: Mapping[str, int]
    kinds: Mapping[str, int]
    draft_vocab_size: int
    draft_vocab_coverage: float
    data_hash: str
    vocab_hash: str
    held_out_hash: str

    def to_json(self) -> str:
        """Text of `meta.json`; the same for the same data."""
        facts = asdict(self) | {"target": self.target.to_dict()}
        return json.dumps(facts, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, facts: Any) -> PreparedMeta:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: A field is missing, unknown or of another type, or the version is unknown.
        """
        if not isinstance(facts, dict) or facts.get("format_version") != FORMAT_VERSION:
            version = facts.get("format_version") if isinstance(facts, dict) else None
            raise ConfigError(
                f"prepared data of version {version!r} cannot be read, only {FORMAT_VERSION}; "
                "prepare them again"
            )
        names = {field.name for field in fields(cls)}
        wrong = sorted(map(str, names ^ set(facts)))
        if wrong:
            raise ConfigError(f"{META} has a missing or unknown field {wrong[0]!r}")
        for name, value in facts.items():
            if not _fits(name, value):
                raise ConfigError(f"{META}: {name} cannot be {value!r}")
        return cls(**(facts | {"target": TargetFingerprint.from_dict(facts["target"])}))


def _fits(name: str, value: Any) -> bool:
    if name == "target":
        return isinstance(value, dict)
    if name in ("skipped", "kinds"):
        return isinstance(value, dict) and all(type(count) is int for count in value.values())
    if name == "draft_vocab_coverage":
        return isinstance(value, int | float) and 0 <= value <= 1
    if name == "chat_template" and value is None:
        return True
    if name in ("tokenizer", "chat_template") or name.endswith("_hash"):
        return isinstance(value, str)
    return type(value) is int and value >= 0


class ExampleList(Sequence[Example]):
    """The examples, read from the Arrow files when they are asked for."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        row = self._data[index]
        return Example(row["token_ids"], row["loss_mask"])

    def columns(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]]:
        """By chunk: lengths [n] of the examples, their ids [sum] and loss masks [sum].

        Raises:
            ConfigError: Ids and masks are not of the same length, or have nulls.
        """
        table = self._data.data
        chunks = (table.column(name).chunks for name in ("token_ids", "loss_mask"))
        for ids, mask in zip(*chunks, strict=True):
            flat_ids, flat_mask = ids.flatten(), mask.flatten()
            if ids.null_count + mask.null_count + flat_ids.null_count + flat_mask.null_count:
                raise ConfigError("the examples are damaged: there are nulls in them")
            lengths = _numpy(ids.value_lengths()).astype(np.int64)
            if not np.array_equal(lengths, _numpy(mask.value_lengths())):
                raise ConfigError("the examples are damaged: ids and loss masks differ in length")
            yield lengths, _numpy(flat_ids).astype(np.int64), _numpy(flat_mask)

    def hash(self) -> str:
        """SHA-256 over all examples; does not depend on how they are stored."""
        parts = [hashlib.sha256() for _ in range(3)]
        for lengths, ids, mask in self.columns():
            for part, values in zip(parts, (lengths, ids, mask.astype(np.int64)), strict=True):
                part.update(values.astype("<i8").tobytes())
        return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()


def _numpy(values: Any) -> NDArray[Any]:
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return found


@dataclass(frozen=True)
class PreparedData:
    """Prepared data, opened.

    Attributes:
        examples: What is trained on.
        held_out: Prompts of rows that are not among the examples, to measure acceptance on.
        meta: What the data are.
        vocabulary: What a head is to draft among.
        counts: int64 [V], how often each token is to be predicted.
    """

    examples: ExampleList
    held_out: list[list[int]]
    meta: PreparedMeta
    vocabulary: DraftVocabulary
    counts: Tensor

    @classmethod
    def load(cls, folder: Path | str) -> PreparedData:
        """Opens a folder and checks it.

        Raises:
            ConfigError: It is unfinished, damaged, or not what its description says.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ConfigError(f"there is no folder {str(folder)!r} with prepared data")
        if not (path / META).is_file():
            raise ConfigError(
                f"{str(folder)!r} holds no finished data: there is no {META}; run `specdec data "
                "prepare` again"
            )
        try:
            return cls._load(path)
        except SpecdecError as problem:
            raise ConfigError(f"prepared data in {str(folder)!r}: {problem}") from problem
        except Exception as problem:  # any failure to read foreign files means that they are wrong
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            raise ConfigError(
                f"prepared data in {str(folder)!r} are damaged: {reason}"
            ) from problem

    @classmethod
    def _load(cls, path: Path) -> PreparedData:
        meta = PreparedMeta.from_dict(json.loads(_read(path / META, _MOST_META_BYTES)))
        held_out = json.loads(_read(path / HELD_OUT, _MOST_HELD_OUT_BYTES, meta.held_out_hash))
        _check_prompts(held_out, meta)
        _check_hash(path / VOCABULARY, meta.vocab_hash)
        tensors = load_file(path / VOCABULARY)
        examples = ExampleList(_table(path / EXAMPLES))
        _check_examples(examples, meta)
        vocabulary = _vocabulary(tensors, meta)
        return cls(examples, held_out, meta, vocabulary, tensors["counts"])


def _table(folder: Path) -> Any:
    """The `datasets.Dataset` in a folder that may come from anywhere."""
    state = json.loads(_read(folder / "state.json", _MOST_META_BYTES))
    for entry in state["_data_files"]:
        name = str(entry["filename"])
        file = folder / name
        if name != file.name or file.is_symlink() or not file.is_file():
            raise ConfigError(f"{EXAMPLES}: {name[:100]!r} is no file of the folder")
    table = datasets.load_from_disk(str(folder))
    wanted = {
        "token_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("bool")),
    }
    if dict(table.features) != wanted:
        raise ConfigError(f"{EXAMPLES} has other columns than {', '.join(wanted)}")
    return table


def _read(path: Path, most: int, wanted: str | None = None) -> bytes:
    if path.stat().st_size > most:
        raise ConfigError(f"{path.name} is larger than {most:,} bytes")
    if wanted is not None:
        _check_hash(path, wanted)
    return path.read_bytes()


def _check_hash(path: Path, wanted: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wanted:
        raise ConfigError(f"{path.name} was changed after it was written; prepare the data again")


def _check_prompts(held_out: Any, meta: PreparedMeta) -> None:
    fits = isinstance(held_out, list) and len(held_out) == meta.held_out
    if not fits or not all(isinstance(prompt, list) and prompt for prompt in held_out):
        raise ConfigError(f"{HELD_OUT} is no list of {meta.held_out} prompts")
    if not all(type(t) is int and 0 <= t < meta.vocab_size for p in held_out for t in p):
        raise ConfigError(f"{HELD_OUT} has a token outside the vocabulary of {meta.vocab_size}")


def _check_examples(examples: ExampleList, meta: PreparedMeta) -> None:
    """Compares lengths, ids and counts with the description."""
    tokens = learnt = 0
    for lengths, ids, mask in examples.columns():
        if len(ids) and not (ids.min() >= 0 and ids.max() < meta.vocab_size):
            raise ConfigError(f"a token is outside the vocabulary of {meta.vocab_size}")
        if len(lengths) and lengths.max() > meta.max_length:
            raise ConfigError(f"an example is longer than {meta.max_length} tokens")
        tokens, learnt = tokens + len(ids), learnt + int(mask.sum())
    found, wanted = (len(examples), tokens, learnt), (meta.rows, meta.tokens, meta.loss_tokens)
    if found != wanted:
        raise ConfigError(
            f"the examples are damaged: rows, tokens and loss tokens are {found}, not {wanted}"
        )


def _vocabulary(tensors: Mapping[str, Tensor], meta: PreparedMeta) -> DraftVocabulary:
    counts = tensors["counts"]
    fits = counts.shape == (meta.vocab_size,) and counts.dtype == torch.int64
    if not fits or int(counts.sum()) != meta.loss_tokens:
        raise ConfigError(f"{VOCABULARY} does not count the examples' tokens")
    sizes = meta.draft_vocab_size, meta.vocab_size
    try:
        return DraftVocabulary.read(tensors.get("d2t"), tensors.get("t2d"), *sizes)
    except ConfigError as problem:
        raise ConfigError(f"{VOCABULARY}: {problem}") from problem
