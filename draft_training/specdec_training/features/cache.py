"""Recorded features: what a target says about prepared data, read back instead of computed.

A folder with one safetensors file for every shard of examples, `target.safetensors` (the target's
embeddings and output matrix, so that the target need not be there), `index.json` (which examples a
shard holds; written first) and `meta.json` (what the features are, and hashes; written last). A
folder without `meta.json` was never finished, and is refused. `feature_writer` writes it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.artifacts.atomic_files import Digest, digest_of, from_json, read_small, to_json
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.artifacts.tensor_files import read_tensors
from specdec.errors import ConfigError, SpecdecError
from specdec_training.contracts import Document, FeatureBatch, TokenBatch
from specdec_training.features.target_output import OutputMatrix

META, INDEX, TARGET = "meta.json", "index.json", "target.safetensors"
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Types that features can be kept in."""

_VERSION = 1
_MOST_JSON_BYTES = 64 << 20
_MOST_OPEN = 256  # shards that are mapped at a time; the oldest is let go


class FeatureError(SpecdecError):
    """Recorded features are unfinished, damaged, or of something else."""


@dataclass(frozen=True)
class FeatureKey:
    """What features are of; folders of another key do not fit.

    Attributes:
        target: Fingerprint of the target's configuration and tokenizer.
        weights: Hash over samples of its weights, which a fine-tuned sibling changes; or empty.
        data_hash: Of the prepared data.
        taps: Layers whose outputs are concatenated, as in `Eagle3Config`.
        dtype: Name of the type that the features are kept in.
        rows: Number of examples.
        tokens: Tokens of all examples.
        logit_scale: Factor after the output matrix.
        logit_cap: Bound of the logits after that, or None.
    """

    target: TargetFingerprint
    weights: str
    data_hash: str
    taps: tuple[int, ...]
    dtype: str
    rows: int
    tokens: int
    logit_scale: float = 1.0
    logit_cap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return facts | {"target": self.target.to_dict(), "taps": list(self.taps)}

    @classmethod
    def from_dict(cls, facts: Any) -> FeatureKey:
        """Reads what `to_dict` wrote, and trusts none of it.

        Raises:
            ConfigError: A field is missing, unknown, or cannot be right.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(facts, dict) or set(facts) != names:
            raise ConfigError(f"features are described by {', '.join(sorted(names))}")
        layers, scale, cap = facts["taps"], facts["logit_scale"], facts["logit_cap"]
        fits = {
            "weights": isinstance(facts["weights"], str),
            "data_hash": isinstance(facts["data_hash"], str),
            "taps": isinstance(layers, list) and all(type(n) is int for n in layers),
            "dtype": facts["dtype"] in DTYPES,
            "rows": type(facts["rows"]) is int and facts["rows"] >= 0,
            "tokens": type(facts["tokens"]) is int and facts["tokens"] >= 0,
            "logit_scale": type(scale) in (int, float),
            "logit_cap": cap is None or type(cap) in (int, float),
        }
        for name, fit in fits.items():
            if not fit:
                raise ConfigError(f"{name} of features cannot be {facts[name]!r:.100}")
        target = TargetFingerprint.from_dict(facts["target"])
        return cls(**(facts | {"target": target, "taps": tuple(layers)}))

    def differences(self, other: FeatureKey) -> list[str]:
        """One phrase for each field that differs, with both values."""
        found = [f"target {phrase}" for phrase in self.target.differences(other.target)]
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            unknown = field.name == "weights" and not (mine and theirs)
            if field.name != "target" and mine != theirs and not unknown:
                found.append(f"{field.name}: {_brief(mine)} and {_brief(theirs)}")
        return found


@dataclass(frozen=True)
class Shard:
    """Which examples a file holds.

    Attributes:
        number: Of the file, from 0.
        first: Number of its first example.
        stop: Example after its last one.
        tokens: Of all of them.
    """

    number: int
    first: int
    stop: int
    tokens: int

    @property
    def name(self) -> str:
        """The file's name."""
        return f"features-{self.number:06d}.safetensors"


def index_text(key: FeatureKey, shards: Sequence[Shard]) -> bytes:
    """Content of `index.json`."""
    ranges = [[shard.first, shard.stop, shard.tokens] for shard in shards]
    return to_json({"version": _VERSION, "key": key.to_dict(), "shards": ranges}, INDEX)


def meta_text(key: FeatureKey, files: Mapping[str, Digest]) -> bytes:
    """Content of `meta.json`."""
    listed = {name: {"bytes": d.size, "sha256": d.sha256} for name, d in files.items()}
    return to_json({"version": _VERSION, "key": key.to_dict(), "files": listed}, META)


def read_index(folder: Path) -> tuple[FeatureKey, list[Shard]]:
    """(what the features are of, where they are).

    Raises:
        FeatureError: `index.json` cannot be read.
    """
    content = _read(folder, INDEX)
    try:
        key = FeatureKey.from_dict(content.get("key"))
        shards = [Shard(n, *map(int, entry)) for n, entry in enumerate(content["shards"])]
    except (ValueError, TypeError, KeyError) as problem:
        raise FeatureError(f"{INDEX} in {folder} is damaged: {problem}") from problem
    stops, tokens = [0, *(shard.stop for shard in shards)], sum(shard.tokens for shard in shards)
    follows = all(s.first == before < s.stop for s, before in zip(shards, stops, strict=False))
    if not follows or (stops[-1], tokens) != (key.rows, key.tokens):
        raise FeatureError(f"{INDEX} in {folder} is damaged: its shards do not hold all examples")
    return key, shards


class CachedFeatures:
    """Implements `FeatureSource` from a folder; the target need not be loaded.

    Args:
        folder: What `specdec data features` wrote.
        data_hash: Of the prepared data that batches are made of.
        target: The target that is trained for.
        taps: Layers that the head reads.
        device: Where features are wanted and logits are computed.
        weights: `weights_hash` of the target where it is loaded, to be compared as well.

    Raises:
        FeatureError: The folder is unfinished or damaged, or its features are of other data,
            another target or other layers; names what differs.
    """

    def __init__(
        self,
        folder: str | Path,
        data_hash: str,
        target: TargetFingerprint,
        taps: Sequence[int],
        device: torch.device | str = "cpu",
        weights: str | None = None,
    ) -> None:
        self.folder, self._device = Path(folder).expanduser(), torch.device(device)
        self.key, self._files = _finished(self.folder)
        key, self._shards = read_index(self.folder)
        wanted = dataclasses.replace(
            self.key,
            target=target,
            data_hash=data_hash,
            taps=tuple(taps),
            weights=weights or self.key.weights,
        )
        different = self.key.differences(wanted)
        if different or key != self.key:
            found = "; ".join(different) or "index.json and meta.json disagree"
            raise FeatureError(
                f"features in {self.folder} are not those that are needed ({found}); record them "
                "again with `specdec data features`"
            )
        self._check_sizes()
        tensors = read_tensors(self.folder / TARGET)
        self.embeddings: Tensor = tensors["embeddings"]
        weight = tensors.get("output", self.embeddings)
        self._output = OutputMatrix(
            weight, tensors.get("bias"), self.key.logit_scale, self.key.logit_cap
        ).to(device)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    @property
    def output_matrix(self) -> Tensor:
        """[V, Ht] the target's output matrix."""
        return self._output.weight

    def features(self, batch: TokenBatch) -> FeatureBatch:
        """The batch's features; zeros in padding.

        Raises:
            FeatureError: A shard is damaged, or the batch holds other tokens than were recorded.
        """
        shape, ids = batch.token_ids.shape, batch.token_ids.cpu()
        both: list[Tensor] = []
        for document in batch.documents:
            pieces = self._look_up(document, ids[document.row, document.start : document.stop])
            if not both:
                both = [torch.zeros(*shape, p.shape[1], dtype=p.dtype) for p in pieces]
            for whole, piece in zip(both, pieces, strict=True):
                whole[document.row, document.start : document.stop] = piece
        if not both:
            raise FeatureError("a batch without documents has no features")
        return FeatureBatch(batch, both[0].to(self._device), both[1].to(self._device))

    @torch.no_grad()
    def target_logits(self, last_hidden: Tensor) -> Tensor:
        """[..., V] the target's logits for hidden states [..., Ht]."""
        return self._output(last_hidden)

    def check(self) -> None:
        """Compares every file with its hash; takes as long as reading them.

        Raises:
            FeatureError: One was changed.
        """
        for name, wanted in self._files.items():
            try:
                found = digest_of(self.folder / name)
            except OSError as problem:
                raise FeatureError(
                    f"cannot read {self.folder / name}: {problem.strerror}"
                ) from problem
            if found != wanted:
                raise FeatureError(
                    f"{self.folder / name} was changed after it was written; delete the folder "
                    "and record the features again"
                )

    def _check_sizes(self) -> None:
        """Compares the files with what was written; reads only their sizes."""
        for name in (INDEX, TARGET, *(shard.name for shard in self._shards)):
            path = self.folder / name
            wanted = self._files.get(name)
            if wanted is None or not path.is_file() or path.is_symlink():
                raise FeatureError(f"{path} is missing; delete the folder and record again")
            if path.stat().st_size != wanted.size:
                raise FeatureError(
                    f"{path} has {path.stat().st_size:,} bytes instead of {wanted.size:,}; delete "
                    "the folder and record the features again"
                )

    def _look_up(self, document: Document, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The features [n, F] and [n, Ht] of the tokens, which may end before the example does."""
        example = document.example
        low, high = 0, len(self._shards)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._shards[middle].first <= example else (low, middle)
        if not self._shards or not 0 <= example < self.key.rows:
            raise FeatureError(f"there is no example {example} in {self.folder}")
        shard = self._open.get(low) or OpenShard(self.folder, self._shards[low])
        self._open[low] = shard
        self._open.move_to_end(low)
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return shard.read(example, token_ids)


class OpenShard:
    """A shard whose tensors are mapped; what is read is just the part that is asked for.

    Raises:
        FeatureError: It cannot be read, or does not hold what the index says.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._path, self._shard = folder / shard.name, shard
        try:
            self._file = _mapped(self._path)
            self._slices = [self._file.get_slice(n) for n in ("aux", "last_hidden", "token_ids")]
            offsets = self._file.get_tensor("offsets").tolist()
        except (SafetensorError, OSError, RuntimeError) as problem:
            raise FeatureError(f"cannot read {self._path}: {problem}") from problem
        lengths = [part.get_shape()[0] for part in self._slices]
        steps = [stop - start for start, stop in itertools.pairwise(offsets)]
        whole = offsets[:1] == [0] and offsets[-1] == shard.tokens and min(steps, default=1) > 0
        if not whole or len(steps) != shard.stop - shard.first or set(lengths) != {shard.tokens}:
            raise FeatureError(f"{self._path} does not hold what {INDEX} says")
        self._offsets = offsets

    def read(self, example: int, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The features [n, F] and [n, Ht] of the first n tokens [n] of an example.

        Raises:
            FeatureError: Other tokens were recorded.
        """
        index = example - self._shard.first
        start = self._offsets[index]
        stop = start + len(token_ids)
        if stop > self._offsets[index + 1]:
            raise FeatureError(
                f"example {example} has {self._offsets[index + 1] - start} recorded tokens, the "
                f"batch has {len(token_ids)}"
            )
        aux, last, recorded = (part[start:stop] for part in self._slices)
        if not torch.equal(recorded.to(token_ids.dtype), token_ids):
            raise FeatureError(
                f"the batch has other tokens for example {example} than {self._path} recorded; "
                "record the features of these data"
            )
        return aux, last


def _mapped(path: Path) -> Any:
    return safe_open(path, "pt")


def _finished(folder: Path) -> tuple[FeatureKey, dict[str, Digest]]:
    if not folder.is_dir():
        raise FeatureError(f"there is no folder {str(folder)!r} with features")
    if not (folder / META).is_file():
        raise FeatureError(
            f"{folder} holds no finished features: there is no {META}; run `specdec data features` "
            "again, which goes on where it stopped"
        )
    content = _read(folder, META)
    try:
        key = FeatureKey.from_dict(content.get("key"))
        files = {
            str(name): Digest(int(facts["bytes"]), str(facts["sha256"]))
            for name, facts in content["files"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise FeatureError(f"{META} in {folder} is damaged: {problem}") from problem
    return key, files


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = from_json(read_small(folder / name, _MOST_JSON_BYTES))
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise FeatureError(f"cannot read {name} in {folder}: {reason}") from problem
    if content.get("version") != _VERSION:
        raise FeatureError(
            f"features in {folder} have version {content.get('version')!r:.40}, only {_VERSION} "
            "can be read; record them again"
        )
    return content


def _brief(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
