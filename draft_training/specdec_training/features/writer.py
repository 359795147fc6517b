"""Records a target's features of prepared data; goes on where a killed process stopped.

Each shard gets its name when it is whole, so a shard that is there need not be written again.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from specdec.artifacts.atomic_files import (
    FULL,
    Digest,
    digest_of,
    flush_folder,
    make_folder,
    replace_file,
    size_text,
)
from specdec.artifacts.run_lock import LOCKS, RunLock
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.artifacts.tensor_files import write_tensors
from specdec.errors import ConfigError
from specdec_training.contracts import Document, TokenBatch
from specdec_training.data.prepared import PreparedData
from specdec_training.features.cache import (
    DTYPES,
    INDEX,
    META,
    TARGET,
    FeatureError,
    FeatureKey,
    OpenShard,
    Shard,
    index_text,
    meta_text,
    read_index,
)
from specdec_training.features.online import OnlineFeatures
from specdec_training.features.target_output import OutputMatrix, weights_hash

_BATCH_TOKENS = 8192  # slots of a forward of the target
_ID_BYTES = 8
_PROBE = 4  # positions at which logits are compared


def estimate_bytes(
    prepared: PreparedData,
    model_config: Any,
    taps: Sequence[int],
    dtype: str,
    target_dtype: torch.dtype | None = None,
) -> int:
    """Bytes that the features will take, embeddings and output matrix of the target included.

    Args:
        model_config: The target's Hugging Face configuration.
        taps: Layers that are recorded, beside the last hidden states.
        dtype: A key of `DTYPES`.
        target_dtype: What the target will be loaded in; None for the checkpoint's own.

    Raises:
        ConfigError: The type is not known.
    """
    text, width = model_config.get_text_config(), _dtype(dtype).itemsize
    token = (len(taps) + 1) * int(text.hidden_size) * width + _ID_BYTES
    kept = target_dtype or getattr(text, "dtype", None)
    matrices = 1 if getattr(model_config, "tie_word_embeddings", False) else 2
    width = kept.itemsize if isinstance(kept, torch.dtype) else 4
    matrix = int(text.vocab_size * text.hidden_size) * width
    return prepared.meta.tokens * token + matrices * matrix


def write_features(
    target: Any,
    prepared: PreparedData,
    taps: Sequence[int],
    folder: str | Path,
    dtype: str = "bfloat16",
    shard_tokens: int = 32_768,
    progress: bool = True,
) -> None:
    """Runs the target over all examples and keeps what it says.

    Args:
        target: A loaded causal language model.
        taps: Layers whose outputs are recorded, as in `Eagle3Config`; and the last one's.
        folder: Made when missing. Finished shards of a killed process are kept; a folder that
            holds all of these features already is left as it is.
        dtype: Type that they are kept in, a key of `DTYPES`.
        shard_tokens: Tokens of a shard, which is held in memory while it is filled.
        progress: Show a progress bar.

    Raises:
        ConfigError: An option is out of range, or the data are another target's.
        FeatureError: The folder holds other features or cannot be written, or the features do not
            fit the type.
        UnsupportedModelError: The target's logits cannot be made from its last hidden states.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be at least 1, got {shard_tokens}")
    path, kind = Path(folder).expanduser(), _dtype(dtype)
    _check_target(target, prepared)
    source = OnlineFeatures(target, taps, torch.device("cpu"))
    output = _output_matrix(target, source)
    key = _key(target, prepared, tuple(taps), dtype, output)
    lengths = [int(n) for chunk, _, _ in prepared.examples.columns() for n in chunk]
    shards = _plan(lengths, shard_tokens)
    with _written(path), RunLock(path):
        _begin(path, key, shards)
        names = [META, TARGET, *(shard.name for shard in shards)]
        if all((path / name).is_file() for name in names):
            return
        files = {INDEX: digest_of(path / INDEX), TARGET: _write_target(path, target, output)}
        bar = tqdm(total=key.tokens, unit="token", desc="features", disable=not progress)
        with bar:
            for shard in shards:
                if not _is_whole(path, shard):
                    tensors = _features_of(source, prepared, shard, kind)
                    files[shard.name] = _write(path / shard.name, tensors)
                else:
                    files[shard.name] = digest_of(path / shard.name)
                bar.update(shard.tokens)
        replace_file(path / META, meta_text(key, files))


def _key(
    target: Any,
    prepared: PreparedData,
    taps: tuple[int, ...],
    dtype: str,
    output: OutputMatrix,
) -> FeatureKey:
    """What these features will be of."""
    return FeatureKey(
        target=prepared.meta.target,
        weights=weights_hash(target),
        data_hash=prepared.meta.data_hash,
        taps=taps,
        dtype=dtype,
        rows=prepared.meta.rows,
        tokens=prepared.meta.tokens,
        logit_scale=output.scale,
        logit_cap=output.cap,
    )


def _plan(lengths: Sequence[int], most: int) -> list[Shard]:
    """Which examples go into which shard; a longer example has one of its own."""
    shards: list[Shard] = []
    first = tokens = 0
    for example, length in enumerate(lengths):
        if tokens and tokens + length > most:
            shards.append(Shard(len(shards), first, example, tokens))
            first, tokens = example, 0
        tokens += length
    if tokens:
        shards.append(Shard(len(shards), first, len(lengths), tokens))
    return shards


def _begin(folder: Path, key: FeatureKey, shards: Sequence[Shard]) -> None:
    """Writes the index, or finds the same one; removes what a killed process left half written."""
    if (folder / INDEX).is_file():
        before, planned = read_index(folder)
        different = before.differences(key)
        if list(shards) != planned and not different:
            different = ["shard_tokens: the shards are of another size"]
        if different:
            raise FeatureError(
                f"{folder} holds other features ({'; '.join(different)}); delete it, or give "
                "another folder"
            )
    elif any(path.name not in LOCKS and path.suffix != ".tmp" for path in folder.iterdir()):
        raise FeatureError(f"{folder} holds other files; give a folder that is new or empty")
    for path in folder.glob(".*.tmp"):  # the lock is ours, so nobody is writing them
        path.unlink()
    if not (folder / INDEX).is_file():
        replace_file(folder / INDEX, index_text(key, shards))


def _is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a shard was finished by an earlier process."""
    try:
        OpenShard(folder, shard)
    except FeatureError:
        return False
    return True


def _features_of(
    source: OnlineFeatures, prepared: PreparedData, shard: Shard, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a shard."""
    ids = [prepared.examples[i].token_ids for i in range(shard.first, shard.stop)]
    offsets = [0]
    for example in ids:
        offsets.append(offsets[-1] + len(example))
    found: dict[str, Tensor] = {}
    for members in _batches([len(example) for example in ids]):
        batch = _batch([ids[member] for member in members])
        features = source.features(batch)
        for name, whole in (("aux", features.aux), ("last_hidden", features.last_hidden)):
            if name not in found:
                found[name] = torch.empty(offsets[-1], whole.shape[-1], dtype=dtype)
            for row, member in enumerate(members):
                kept = whole[row, : len(ids[member])].to(dtype)
                if not bool(kept.isfinite().all()):
                    _refuse(whole[row, : len(ids[member])], shard.first + member, name, dtype)
                found[name][offsets[member] : offsets[member + 1]] = kept
    return found | {
        "token_ids": torch.tensor([token for example in ids for token in example]),
        "offsets": torch.tensor(offsets),
    }


def _refuse(values: Tensor, example: int, name: str, dtype: torch.dtype) -> None:
    if not bool(values.isfinite().all()):
        raise FeatureError(
            f"the target's {name} of example {example} holds values that are not finite; look at "
            "that example and at the target's dtype"
        )
    raise FeatureError(
        f"{name} of example {example} reaches {float(values.abs().max()):.4g}, which {dtype} does "
        "not hold; record with --keep-as bfloat16 or float32"
    )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Examples of similar length, together at most `_BATCH_TOKENS` slots."""
    members: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if members and (len(members) + 1) * lengths[members[0]] > _BATCH_TOKENS:
            yield members
            members = []
        members.append(example)
    if members:
        yield members


def _batch(examples: Sequence[Sequence[int]]) -> TokenBatch:
    """One example a row."""
    token_ids = torch.zeros(len(examples), max(map(len, examples)), dtype=torch.long)
    for row, example in enumerate(examples):
        token_ids[row, : len(example)] = torch.tensor(example)
    documents = (Document(row, row, 0, len(example)) for row, example in enumerate(examples))
    return TokenBatch(token_ids, torch.zeros_like(token_ids, dtype=torch.bool), tuple(documents))


def _check_target(target: Any, prepared: PreparedData) -> None:
    different = TargetFingerprint.of(target.config).differences(prepared.meta.target)
    if different:
        raise ConfigError(
            f"the data were prepared for another target ({'; '.join(different)}); prepare them "
            "with this one"
        )


def _output_matrix(target: Any, source: OnlineFeatures) -> OutputMatrix:
    size = target.get_output_embeddings().weight.shape[-1]
    hidden = torch.randn(_PROBE, size, generator=torch.Generator().manual_seed(0))
    return OutputMatrix.of(target, hidden, source.target_logits(hidden))


def _write_target(folder: Path, target: Any, output: OutputMatrix) -> Digest:
    """Keeps the target's embeddings, and its output matrix where that is another one."""
    if (folder / TARGET).is_file():
        return digest_of(folder / TARGET)
    embeddings = target.get_input_embeddings().weight.detach()
    tensors = {"embeddings": embeddings}
    if output.weight.data_ptr() != embeddings.data_ptr():
        tensors["output"] = output.weight
    if output.bias is not None:
        tensors["bias"] = output.bias
    return _write(folder / TARGET, tensors)


def _write(path: Path, tensors: dict[str, Tensor]) -> Digest:
    """Writes a file that gets its name when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        digest = write_tensors(temporary, tensors)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_folder(path.parent)
    return digest


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Makes the folder; says what to do when it cannot be written."""
    try:
        make_folder(folder)
        yield
    except OSError as problem:
        text = f"cannot write features to {folder}: {problem.strerror or problem}"
        if problem.errno in FULL:
            with contextlib.suppress(OSError):
                text += f"; {size_text(free_bytes(folder))} are free"
            text += ". Make room and run it again: it goes on after the shards that are there"
        raise FeatureError(text) from problem


def free_bytes(folder: Path) -> int:
    """Bytes that can be written where `folder` is or will be.

    Raises:
        OSError: The file system does not say.
    """
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"features are kept as {', '.join(DTYPES)}, not as {name!r}")
    return DTYPES[name]
