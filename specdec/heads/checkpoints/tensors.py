"""The tensors of an EAGLE-3 head: our names, every dialect's names, and the shapes they must have.

Files keep each projection for itself, a head keeps those of the same input as one: `state` joins,
`separate` takes apart, and nobody else knows of both. Serving engines skip a name they do not know
and leave a missing tensor at zero, without a word; here both raise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec.heads.checkpoints.strict_files import TensorInfo
from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that a head's weights may have."""

LM_HEAD, EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"
"""Our names of the two matrices that may be the target's."""

_LAYER = "layers.0."
_LEGACY_NORMS = {
    "aux_norm_low": "fc_norm.0",
    "aux_norm_mid": "fc_norm.1",
    "aux_norm_high": "fc_norm.2",
}
_OTHER_HEADS = {
    "mask_hidden": "a P-EAGLE head",
    "kv_a_proj_with_mqa": "a head with latent attention (MLA)",
    "parallel_draft_heads": "a head with parallel Medusa heads",
    "markov_head": "a DSpark head",
    "medusa_head": "a Medusa head",
    "layers.1.": "a head with more than one layer",
    "additional_layers.": "a head with more than one layer",
    "mlp.experts": "a head with a mixture of experts",
    "weight_scale": "a quantised head",
}
_JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def canonical(name: str) -> str | None:
    """Our name for a tensor of any dialect; None for what no head keeps."""
    for prefix in ("drafter.", "eagle_module."):
        name = name.removeprefix(prefix)
    if not name.startswith("model.lm_head."):
        name = name.removeprefix("model.")
    if name.endswith("rotary_emb.inv_freq") or name.startswith("verifier_"):
        return None
    if name.startswith("midlayer."):
        name = _LAYER + name.removeprefix("midlayer.")
    if name == "hidden_norm.weight":
        name = _LAYER + name
    start, dot, rest = name.partition(".")
    return _LEGACY_NORMS.get(start, start) + dot + rest


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Our names -> those in the file.

    Raises:
        ConfigError: Two tensors in the file are the same one of ours.
    """
    found: dict[str, str] = {}
    for name in names:
        ours = canonical(name)
        if ours is None:
            continue
        if ours in found:
            raise ConfigError(f"{found[ours]!r:.80} and {name!r:.80} are one and the same tensor")
        found[ours] = name
    return found


def dialect_name(ours: str, dialect: str) -> str:
    """A dialect's name for one of our tensors."""
    if dialect in ("safeailab", "specforge"):
        return re.sub(r"^layers\.0\.", "midlayer.", ours)
    if dialect == "nemo" and ours not in (LM_HEAD, "d2t", "t2d"):
        return f"model.{ours}"
    return ours


def structure(names: Iterable[str]) -> dict[str, bool]:
    """The flags of `Eagle3Config` that show in which tensors there are."""
    found = set(names)
    return {
        "norm_before_fc": "input_norm.weight" in found,
        "fc_norm": "fc_norm.0.weight" in found,
        "qk_norm": f"{_LAYER}self_attn.q_norm.weight" in found,
        "attention_bias": f"{_LAYER}self_attn.q_proj.bias" in found,
        "output_bias": f"{_LAYER}self_attn.o_proj.bias" in found,
        "mlp_bias": f"{_LAYER}mlp.gate_proj.bias" in found,
        "fc_bias": "fc.bias" in found,
    }


def shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Shape of every floating-point tensor that a head of this configuration has.

    `lm_head.weight` and `embed_tokens.weight` included, which a checkpoint may leave out.
    """
    size, target = config.hidden_size, config.target_hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (queries, 2 * size),
        "k_proj.weight": (keys, 2 * size),
        "v_proj.weight": (keys, 2 * size),
        "o_proj.weight": (size, queries),
    }
    if config.attention_bias:
        attention |= {"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)}
    if config.output_bias:
        attention["o_proj.bias"] = (size,)
    if config.qk_norm:
        attention |= {"q_norm.weight": (config.head_dim,), "k_norm.weight": (config.head_dim,)}
    found: dict[str, tuple[int, ...]] = {"fc.weight": (size, config.feature_width)}
    found |= {f"{_LAYER}self_attn.{name}": shape for name, shape in attention.items()}
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        found[f"{_LAYER}{name}.weight"] = (size,)
    wide = config.intermediate_size
    found |= {f"{_LAYER}mlp.{name}_proj.weight": (wide, size) for name in ("gate", "up")}
    found[f"{_LAYER}mlp.down_proj.weight"] = (size, wide)
    if config.mlp_bias:
        found |= {f"{_LAYER}mlp.{name}_proj.bias": (wide,) for name in ("gate", "up")}
        found[f"{_LAYER}mlp.down_proj.bias"] = (size,)
    found |= {"norm.weight": (size,), LM_HEAD: (config.draft_vocab_size, size)}
    found[EMBEDDINGS] = (config.vocab_size, size)
    if config.fc_bias:
        found["fc.bias"] = (size,)
    if config.norm_before_fc:
        found["input_norm.weight"] = (config.feature_width,)
    if config.fc_norm:
        layers = range(len(config.aux_output_layers))
        found |= {f"fc_norm.{i}.weight": (target,) for i in layers}
    return found


def check_tensors(
    infos: Mapping[str, TensorInfo], config: Eagle3Config, lm_head_optional: bool
) -> None:
    """Raises `ConfigError` unless these are exactly the tensors of such a head.

    Args:
        infos: By our names.
        config: What the head says of itself.
        lm_head_optional: Whether it may do without, and use the target's.
    """
    wanted = shapes(config)
    optional = {EMBEDDINGS} | ({LM_HEAD} if lm_head_optional else set())
    unknown = sorted(set(infos) - set(wanted) - {"d2t", "t2d"})
    if unknown:
        raise ConfigError(f"unknown tensor {unknown[0]!r:.80}{_hint(unknown)}")
    missing = sorted(set(wanted) - set(infos) - optional)
    if missing:
        raise ConfigError(
            f"tensor {missing[0]!r} is missing ({len(missing)} in all); this is no whole EAGLE-3 "
            "head"
        )
    for name, info in infos.items():
        if name in wanted and info.shape != wanted[name]:
            raise ConfigError(
                f"tensor {name!r} has shape {list(info.shape)}, and by {_says(name)} in the "
                f"configuration it must have {list(wanted[name])}"
            )
        if name in wanted and info.dtype not in FLOATS:
            raise ConfigError(f"tensor {name!r} is {info.dtype}; a quantised head cannot be read")
    _check_vocabulary(infos, config)


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Raises `ConfigError` for a head with a weight that is no finite number.

    Args:
        tensors: By the names that a user knows them by.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta or bool(torch.isfinite(tensor).all()):
            continue
        count = int((~torch.isfinite(tensor)).sum())
        raise ConfigError(
            f"tensor {name!r:.80} of the draft head holds {count:,} of {tensor.numel():,} values "
            "that are NaN or infinite; the file is damaged or its training diverged: use another "
            "checkpoint of this head"
        )


def _check_vocabulary(infos: Mapping[str, TensorInfo], config: Eagle3Config) -> None:
    compressed = config.draft_vocab_size < config.vocab_size
    if compressed and "d2t" not in infos:
        raise ConfigError(
            f"tensor 'd2t' is missing: draft_vocab_size {config.draft_vocab_size} is below "
            f"vocab_size {config.vocab_size}, and without d2t the draft's ids mean nothing"
        )
    for name, length, dtypes in (
        ("d2t", config.draft_vocab_size, ("I64", "I32")),
        ("t2d", config.vocab_size, ("BOOL", "U8")),
    ):
        info = infos.get(name)
        if info is not None and (info.shape != (length,) or info.dtype not in dtypes):
            raise ConfigError(
                f"tensor {name!r} must be [{length}] of {' or '.join(dtypes)}, got "
                f"{list(info.shape)} of {info.dtype}"
            )


def _hint(names: list[str]) -> str:
    for part, kind in _OTHER_HEADS.items():
        if any(part in name for name in names):
            return f": this is {kind}, which is not supported"
    return f" ({len(names)} such); an EAGLE-3 head of this configuration has no place for it"


def _says(name: str) -> str:
    fields = {
        "fc.": "hidden_size, target_hidden_size and the number of aux layers",
        "input_norm.": "target_hidden_size and the number of aux layers",
        "fc_norm.": "target_hidden_size",
        "self_attn.": "hidden_size, num_attention_heads, num_key_value_heads and head_dim",
        "mlp.": "hidden_size and intermediate_size",
        "lm_head.": "draft_vocab_size and hidden_size",
        "embed_tokens.": "vocab_size and hidden_size",
    }
    return next((said for part, said in fields.items() if part in name), "hidden_size")


def state(
    tensors: Mapping[str, Tensor], config: Eagle3Config, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The state of an `Eagle3Head` from tensors under our names, all floats in one dtype.

    Raises:
        ConfigError: As `DraftVocabulary.read`.
    """
    dtype = dtype or tensors["fc.weight"].dtype
    found = {
        name: tensor.to(dtype) for name, tensor in tensors.items() if name not in ("d2t", "t2d")
    }
    for joined, parts in _JOINED.items():
        for kind in ("weight", "bias"):
            names = [f"{_LAYER}{part}.{kind}" for part in parts]
            if names[0] in found:
                found[f"{_LAYER}{joined}.{kind}"] = torch.cat([found.pop(name) for name in names])
    sizes = config.draft_vocab_size, config.vocab_size
    vocabulary = DraftVocabulary.read(tensors.get("d2t"), tensors.get("t2d"), *sizes)
    return found | vocabulary.tensors()


def separate(tensors: Mapping[str, Tensor], config: Eagle3Config) -> dict[str, Tensor]:
    """Tensors under our names from those of `Eagle3Head.state_dict`: the inverse of `state`."""
    found, wanted = dict(tensors), shapes(config)
    for joined, parts in _JOINED.items():
        for kind in ("weight", "bias"):
            whole = found.pop(f"{_LAYER}{joined}.{kind}", None)
            if whole is None:
                continue
            names = [f"{_LAYER}{part}.{kind}" for part in parts]
            pieces = whole.split([wanted[name][0] for name in names])
            found |= dict(zip(names, pieces, strict=True))
    return found
