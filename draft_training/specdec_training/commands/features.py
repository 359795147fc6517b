"""`specdec data features`: says how much it will write, and records the target's hidden states."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from specdec.artifacts.atomic_files import size_text
from specdec.artifacts.terminal import facts, say
from specdec.errors import ConfigError, SpecdecError
from specdec.loading import TOY, load_model
from specdec_training.data.prepared import PreparedData
from specdec_training.data.target import open_target
from specdec_training.features.cache import FeatureError
from specdec_training.features.layers import chosen_layers
from specdec_training.features.options import DataFeaturesOptions
from specdec_training.features.writer import estimate_bytes, free_bytes, write_features

_MOST_UNASKED = 20 * 10**9


def run_features(options: DataFeaturesOptions) -> int:
    """Runs `specdec data features`; the exit code.

    Raises:
        SpecdecError: An option, the data or the target is wrong; the features would not fit on
            the disk, or are large and nobody said --yes; or writing failed.
    """
    if options.data is None or options.output is None:
        raise ConfigError(
            f"--{'data' if options.data is None else 'output'} is missing; give a folder"
        )
    for name in ("shard_tokens", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.target_device_map not in (None, "auto", "balanced", "sequential"):
        raise ConfigError(
            "--target-device-map must be auto, balanced or sequential, got "
            f"{options.target_device_map!r}"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    out = options.output.expanduser()
    prepared, target = PreparedData.load(options.data), open_target(options.target)
    different = target.fingerprint.differences(prepared.meta.target)
    if different:
        raise ConfigError(f"--data was prepared for another target: {'; '.join(different)}")
    layers = chosen_layers(options.taps, target.config)
    _check_size(options, prepared, target.config, layers, out)
    model = load_model(options.target, options.dtype, options.device, options.target_device_map)
    write_features(model, prepared, layers, out, options.keep_as, options.shard_tokens)
    say(f"features: {out}, {size_text(_present(out))}")
    return 0


def _check_size(
    options: DataFeaturesOptions,
    prepared: PreparedData,
    model_config: Any,
    layers: tuple[int, ...],
    out: Path,
) -> None:
    """Says how much will be written, and refuses what does not fit or was not asked for."""
    try:
        free, present = free_bytes(out), _present(out)
    except OSError as problem:
        raise SpecdecError(
            f"cannot look for --output {str(out)!r}: {problem.strerror}"
        ) from problem
    loaded = "float32" if (options.target, options.dtype) == (TOY, "auto") else options.dtype
    known = None if loaded == "auto" else getattr(torch, loaded)
    size = estimate_bytes(prepared, model_config, layers, options.keep_as, known)
    rest = max(size - present, 0)
    lines = [
        ("tokens", f"{prepared.meta.tokens:,} in {prepared.meta.rows:,} examples"),
        ("layers", f"{', '.join(map(str, layers))} and the last one, as {options.keep_as}"),
        ("size", size_text(size)),
        ("on the disk", f"{size_text(free)} free at {out}"),
    ]
    if present:
        lines.append(("already there", size_text(present)))
    say("\n".join(facts(lines)), sys.stderr)
    if rest > free:
        raise FeatureError(
            f"the features need {size_text(rest)} more and {size_text(free)} are free at {out}; "
            "give another --output, record fewer data, or train without recorded features"
        )
    if rest > _MOST_UNASKED and not options.yes:
        raise FeatureError(
            f"this would write {size_text(rest)}; say --yes to do it. Training without recorded "
            "features needs no disk and a forward of the target a batch"
        )


def _present(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
