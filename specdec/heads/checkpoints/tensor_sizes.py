"""Sizes of a head, from its tensors first and from its configuration where those are silent.

Some trainers leave the target's sizes in the head's `config.json`. A shape is not copied from
another model: where the two differ, the tensors are right, and the difference is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.heads.checkpoints.parsed import Parsed, whole
from specdec.heads.checkpoints.strict_files import TensorInfo
from specdec.heads.checkpoints.tensors import EMBEDDINGS, LM_HEAD

_ATTENTION = "layers.0.self_attn."
_WHERE = {  # size -> (tensor, which of its dimensions of how many)
    "hidden_size": (("norm.weight", 0, 1),),
    "intermediate_size": (("layers.0.mlp.gate_proj.weight", 0, 2),),
    "vocab_size": ((EMBEDDINGS, 0, 2),),
    "draft_vocab_size": ((LM_HEAD, 0, 2), ("d2t", 0, 1)),
}


def read_sizes(
    parsed: Parsed,
    raw: Mapping[str, Any],
    layer: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    head_dim: int | None = None,
) -> None:
    """Puts every size into `parsed` but the target's width.

    Args:
        parsed: Of this checkpoint.
        raw: `config.json`.
        layer: The part of it that describes the decoder layer.
        infos: Tensors by our names.
        head_dim: Width of a head that a user says, or None.

    Raises:
        ConfigError: A size is missing, or no size at all.
    """
    stated = {name: whole(layer, name) for name in ("hidden_size", "intermediate_size")}
    stated["vocab_size"] = whole(layer, "vocab_size")
    default = None if parsed.dialect == "speculators" else stated["vocab_size"]
    stated["draft_vocab_size"] = whole(raw, "draft_vocab_size", default)
    for name, said in stated.items():
        shown = _shown(name, infos)
        if shown is None or shown == said:
            parsed.state(name, said)
        else:
            sentence = f"{name} is {said} in config.json, and {shown} in the tensors, which count"
            parsed.assume(name, shown, sentence)
    _read_heads(parsed, layer, infos, head_dim)
    # Where no size of the draft vocabulary is given, SGLang takes the target's output matrix.
    parsed.lm_head_optional = parsed.dialect == "modelopt" or raw.get("draft_vocab_size") is None


def read_target_width(
    parsed: Parsed,
    raw: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    count: int,
) -> None:
    """Puts the target's width into `parsed`.

    Args:
        parsed: Its other sizes are known.
        raw: `config.json`.
        infos: Tensors by our names.
        count: Layers of the target that the head reads.
    """
    name, size = "target_hidden_size", parsed.settings["hidden_size"]
    said = whole(raw, name, size)
    width = _dimension(infos, "fc.weight", 1, 2)
    if raw.get(name) is None and width is not None and width != count * size:
        norm = _dimension(infos, "fc_norm.0.weight", 0, 1)
        shown = norm or (width // count if width % count == 0 else None)
        if shown is not None:
            sentence = f"{name} not stated; {shown}, as fc reads {count} layers of that width"
            parsed.assume(name, shown, sentence)
            return
    parsed.state(name, said)


def _shown(name: str, infos: Mapping[str, TensorInfo]) -> int | None:
    """The size by the tensors; None where none shows it, or two contradict each other."""
    found = {_dimension(infos, *place) for place in _WHERE[name]} - {None}
    return found.pop() if len(found) == 1 else None


def _dimension(infos: Mapping[str, TensorInfo], name: str, index: int, rank: int) -> int | None:
    info = infos.get(name)
    if info is None or len(info.shape) != rank or info.shape[index] < 1:
        return None
    return info.shape[index]


def _read_heads(
    parsed: Parsed,
    layer: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    head_dim: int | None,
) -> None:
    """Number and width of the attention heads.

    The tensors show only their products: rows of queries and rows of keys. Of the widths that the
    configuration implies, the one that most of it agrees on is taken.
    """
    heads = whole(layer, "num_attention_heads")
    keys = whole(layer, "num_key_value_heads", heads)
    usual = max(parsed.settings["hidden_size"] // heads, 1)
    said = {
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": whole(layer, "head_dim", usual),
    }
    q_rows = _dimension(infos, f"{_ATTENTION}q_proj.weight", 0, 2)
    k_rows = _dimension(infos, f"{_ATTENTION}k_proj.weight", 0, 2)
    known = head_dim or _dimension(infos, f"{_ATTENTION}q_norm.weight", 0, 1)
    shown = None if q_rows is None or k_rows is None else _heads(layer, known, q_rows, k_rows)
    for name, value in said.items():
        parsed.state(name, value if shown is None else shown[name])
    wrong = [n for n in said if shown and layer.get(n) is not None and shown[n] != said[n]]
    for name in wrong:
        parsed.assumed[name] = (
            f"{name} is {said[name]} in config.json, and the tensors have {q_rows} rows of queries "
            f"and {k_rows} of keys; {parsed.settings[name]}, as the rest of it agrees on"
        )
    parsed.stated -= set(wrong)


def _heads(
    layer: Mapping[str, Any], known: int | None, q_rows: int, k_rows: int
) -> dict[str, int] | None:
    """Heads that make up these rows, or None where the configuration fits them in no way."""
    votes = [layer.get("head_dim")]
    for rows, name in ((q_rows, "num_attention_heads"), (k_rows, "num_key_value_heads")):
        count = layer.get(name)
        votes.append(rows // count if count and rows % count == 0 else None)
    widths = [known] if known else sorted(filter(None, votes), key=votes.count, reverse=True)
    for dim in widths:
        if dim % 2 or q_rows % dim or k_rows % dim or q_rows % k_rows:
            continue
        return {
            "num_attention_heads": q_rows // dim,
            "num_key_value_heads": k_rows // dim,
            "head_dim": dim,
        }
    return None
