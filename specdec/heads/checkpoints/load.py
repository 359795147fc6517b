"""Loads, describes and saves draft heads: the front door to checkpoints of every dialect.

Reading trusts nothing: sizes and names are checked against the configuration before anything is
allocated, whatever is unknown or missing raises, and every default that had to be assumed is
reported in a sentence. Code that comes with a checkpoint is never run, a pickle never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from specdec.artifacts.hub import from_hub
from specdec.artifacts.places import DRAFT_HEAD, locate
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec.heads.checkpoints.overrides import chosen_settings
from specdec.heads.checkpoints.parsed import Context, Parsed
from specdec.heads.checkpoints.read_dialects import parse
from specdec.heads.checkpoints.rope import check_rope, read_rope
from specdec.heads.checkpoints.save import save_head
from specdec.heads.checkpoints.sidecar import Sidecar, check_flags, read_sidecar
from specdec.heads.checkpoints.strict_files import (
    LEGACY,
    StoredTensors,
    TensorInfo,
    inside,
    read_object,
    stored_tensors,
)
from specdec.heads.checkpoints.tensors import (
    EMBEDDINGS,
    LM_HEAD,
    canonical_names,
    check_numbers,
    check_tensors,
    state,
)
from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.head import Eagle3Head

__all__ = [
    "HeadDescription",
    "LoadedHead",
    "build_head",
    "describe_head",
    "load_head",
    "locate_head",
    "read_head_config",
    "save_head",
]

_FILES = ("config.json", "specdec_config.json", "*.safetensors", "*.safetensors.index.json")
_NO_OVERRIDES: Mapping[str, Any] = {}


@dataclass(frozen=True)
class HeadDescription:
    """What a checkpoint is, without its weights.

    Attributes:
        config: Shape and flags.
        dialect: One of `specdec.heads.checkpoints.read_dialects.DIALECTS`.
        assumed: A sentence on every default that the checkpoint does not state.
        fingerprint: Of the target it was made for, or None when it does not say.
        facts: Where it comes from.
        num_target_layers: Layers of its target, or None when nobody knows.
        engine: The engine it was written for, or None.
        layers_known: False where `config.aux_output_layers` only has the right length.
        tensors: What the files hold, by our names.
    """

    config: Eagle3Config
    dialect: str
    assumed: tuple[str, ...]
    fingerprint: TargetFingerprint | None
    facts: dict[str, Any]
    num_target_layers: int | None
    engine: str | None
    layers_known: bool
    tensors: Mapping[str, TensorInfo] = field(repr=False)


@dataclass(frozen=True)
class LoadedHead:
    """A head and what is known about it.

    Attributes:
        head: In evaluation mode.
        dialect: One of `specdec.heads.checkpoints.read_dialects.DIALECTS`.
        assumed: A sentence on every default that the checkpoint does not state.
        fingerprint: Of the target it was made for, or None when it does not say.
        facts: Where it comes from.
        num_target_layers: Layers of its target, or None when nobody knows.
    """

    head: Eagle3Head
    dialect: str
    assumed: tuple[str, ...]
    fingerprint: TargetFingerprint | None
    facts: dict[str, Any]
    num_target_layers: int | None = None


def load_head(
    source: str | Path,
    *,
    target: TargetFingerprint | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    overrides: Mapping[str, Any] = _NO_OVERRIDES,
) -> LoadedHead:
    """The head in a checkpoint of any dialect.

    Args:
        source: A folder or a hub id.
        target: What the head is to draft for; checked, and needed when the checkpoint does not say
            which layers it reads.
        dtype: None keeps the checkpoint's.
        device: Where the head goes.
        overrides: Fields of `Eagle3Config` that win over whatever the checkpoint says.

    Raises:
        ConfigError: It is no EAGLE-3 head, broken, ambiguous, or another target's.
    """
    folder = locate_head(source)
    stored = stored_tensors(folder)
    found = describe_head(folder, stored, target=target, overrides=overrides)
    return build_head(found, stored, dtype, device)


def read_head_config(
    source: str | Path,
    *,
    target: TargetFingerprint | None = None,
    overrides: Mapping[str, Any] = _NO_OVERRIDES,
) -> HeadDescription:
    """As `load_head`, without reading weights: only JSON and the header of the tensors.

    Raises:
        ConfigError: As `load_head`.
    """
    folder = locate_head(source)
    return describe_head(folder, stored_tensors(folder), target=target, overrides=overrides)


def locate_head(source: str | Path, legacy: bool = False) -> Path:
    """The folder of a checkpoint; one on the hub is fetched, without any code.

    Args:
        source: A folder, a hub id, or "demo" for the bundled head.
        legacy: Fetch `pytorch_model.bin` as well.

    Raises:
        ConfigError: There is none.
    """
    place = locate(str(source), DRAFT_HEAD)
    if place.is_folder:
        return Path(place.name)
    return _fetched(place.name, [*_FILES, LEGACY] if legacy else [*_FILES])


def _fetched(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with from_hub(name, DRAFT_HEAD.what) as cached_only:
            return Path(
                snapshot_download(name, allow_patterns=patterns, local_files_only=cached_only)
            )
    except ConfigError:
        raise
    except Exception as problem:  # any failure to fetch foreign files: the reason goes on
        text = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise ConfigError(f"cannot fetch the draft head {name!r}: {text}") from problem


def describe_head(
    folder: Path,
    stored: StoredTensors,
    *,
    target: TargetFingerprint | None = None,
    overrides: Mapping[str, Any] = _NO_OVERRIDES,
    layers_needed: bool = True,
) -> HeadDescription:
    """What a checkpoint is, everything checked that can be without its weights.

    Args:
        folder: With `config.json` in it.
        stored: Its tensors.
        target: As in `load_head`.
        overrides: As in `load_head`.
        layers_needed: Refuse a checkpoint of which nobody knows the target layers.

    Raises:
        ConfigError: As `load_head`.
    """
    chosen = chosen_settings(overrides)
    raw = read_object(inside(folder, "config.json"))
    _refuse_model(folder, raw, stored)
    sidecar = read_sidecar(folder, chosen)
    parsed = parse(raw, stored.infos, _context(sidecar, target, chosen))
    if sidecar is not None:
        _merge(parsed, sidecar)
    names = canonical_names(stored.infos)
    infos = {ours: stored.infos[theirs] for ours, theirs in names.items()}
    known = "aux_output_layers" in parsed.settings
    if not known:
        if layers_needed:
            raise ConfigError(
                "aux_output_layers are not in the checkpoint, and the default depends on how many "
                "layers the target has; name the target (target=, --target NAME) or the layers"
            )
        parsed.settings["aux_output_layers"] = tuple(range(_layers_read(parsed, infos)))
    check_flags(parsed.settings)
    config = Eagle3Config(**parsed.settings)
    _check_activation(config.hidden_act)
    check_rope(config)
    check_tensors(infos, config, parsed.lm_head_optional)
    _check_target(parsed, config, sidecar, target)
    return HeadDescription(
        config,
        parsed.dialect,
        tuple(parsed.assumed.values()),
        None if sidecar is None else sidecar.fingerprint,
        {} if sidecar is None else dict(sidecar.facts),
        _num_layers(sidecar, target),
        None if sidecar is None else sidecar.engine,
        known,
        infos,
    )


def build_head(
    found: HeadDescription,
    stored: StoredTensors,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoadedHead:
    """The head of a checkpoint that was described.

    Raises:
        ConfigError: Its tensors cannot be read, hold no draft vocabulary, or no finite numbers.
    """
    names = canonical_names(stored.infos)
    read = stored.read(list(names.values()))
    check_numbers(read)
    tensors = {ours: read[theirs] for ours, theirs in names.items()}
    assumed = list(found.assumed)
    kinds = {info.dtype for name, info in found.tensors.items() if name not in ("d2t", "t2d")}
    if len(kinds) > 1 and dtype is None:
        assumed.append(
            f"weights stored as {' and '.join(sorted(kinds))}; all were made "
            f"{found.tensors['fc.weight'].dtype}, as fc has it"
        )
    values = state(tensors, found.config, dtype)
    with torch.device("meta"):  # shapes only; the tensors that were read become the weights
        head = Eagle3Head(found.config, EMBEDDINGS in tensors, LM_HEAD in tensors)
    head.load_state_dict(values, assign=True)
    return LoadedHead(
        head.to(device).eval(),
        found.dialect,
        tuple(assumed),
        found.fingerprint,
        found.facts,
        found.num_target_layers,
    )


def _refuse_model(folder: Path, raw: Mapping[str, Any], stored: StoredTensors) -> None:
    """Says so where a whole model was named: it has a second layer, and nothing that joins taps."""
    parts = [name.split(".") for name in stored.infos]
    has_layers = any(one[index : index + 2] == ["layers", "1"] for one in parts
                     for index in range(len(one)))  # fmt: skip
    if has_layers and not any("fc" in one for one in parts):
        raise ConfigError(
            f"{str(folder)!r} holds a whole model ({raw.get('architectures')!s:.80}) and no draft "
            "head; --method draft_model drafts with it"
        )


def _check_activation(name: str) -> None:
    if name not in ACT2FN:
        raise ConfigError(f"hidden_act {name!r:.60} is unknown")
    try:
        has_weights = any(True for _ in ACT2FN[name].parameters())
    except Exception as problem:  # some need more than a name
        raise ConfigError(f"hidden_act {name!r} cannot be used: {problem!s:.100}") from problem
    if has_weights:
        raise ConfigError(f"hidden_act {name!r} has weights of its own, which no head keeps")


def _context(
    sidecar: Sidecar | None, target: TargetFingerprint | None, chosen: Mapping[str, Any]
) -> Context:
    known = target
    if sidecar is not None and sidecar.fingerprint is not None:
        known = sidecar.fingerprint
    return Context(
        _num_layers(sidecar, target),
        None if known is None else known.model_type,
        sidecar is not None and sidecar.engine == "sglang",
        sidecar is not None or "aux_output_layers" in chosen,
        chosen,
    )


def _num_layers(sidecar: Sidecar | None, target: TargetFingerprint | None) -> int | None:
    if sidecar is not None:
        return sidecar.num_target_layers
    return None if target is None else target.num_hidden_layers


def _layers_read(parsed: Parsed, infos: Mapping[str, TensorInfo]) -> int:
    """How many target layers `fc` has room for; the check of its shape follows."""
    info = infos.get("fc.weight")
    width = info.shape[-1] if info is not None and info.shape else 0
    return min(max(width // int(parsed.settings["target_hidden_size"]), 1), 16)


def _merge(parsed: Parsed, sidecar: Sidecar) -> None:
    """Lets our own file say what the dialect cannot, and refuses contradictions."""
    if parsed.dialect != sidecar.dialect:
        raise ConfigError(
            f"dialect is {sidecar.dialect!r} by specdec_config.json, and the other files are of "
            f"{parsed.dialect!r}; one of them is another head's"
        )
    ours = {one.name: getattr(sidecar.config, one.name) for one in fields(Eagle3Config)}
    ours["rope"] = read_rope({"rope_parameters": dict(sidecar.config.rope)})
    for name in sorted(parsed.stated):
        if parsed.settings[name] != ours[name]:
            raise ConfigError(
                f"{name} is {parsed.settings[name]!r:.100} by config.json and the tensors, and "
                f"{ours[name]!r:.100} by specdec_config.json; correct one, or remove the latter"
            )
    parsed.settings = ours
    parsed.assumed.clear()


def _check_target(
    parsed: Parsed, config: Eagle3Config, sidecar: Sidecar | None, target: TargetFingerprint | None
) -> None:
    if target is None:
        return
    different: list[str] = []
    if sidecar is not None and sidecar.fingerprint is not None:
        different = sidecar.fingerprint.differences(target)
    elif sidecar is not None and sidecar.num_target_layers != target.num_hidden_layers:
        different = [f"layers: {sidecar.num_target_layers} and {target.num_hidden_layers}"]
    elif config.target_hidden_size != target.hidden_size:
        different = [f"target_hidden_size: {config.target_hidden_size} and {target.hidden_size}"]
    elif config.vocab_size > target.vocab_size:
        different = [f"vocab_size: {config.vocab_size} and {target.vocab_size}"]
    if different:
        raise ConfigError(
            f"the head was made for another target ({'; '.join(different)}); use a head of this one"
        )
    if config.vocab_size < target.vocab_size:
        parsed.assumed["vocab_size"] = (
            f"vocab_size is {config.vocab_size} and the target's {target.vocab_size}; taken as the "
            "same tokens without the target's padding"
        )
