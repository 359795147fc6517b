"""Eagle3Config: sizes and flags of an EAGLE-3 draft head, one value for every checkpoint dialect.

Layers of the target are counted in one way only: `aux_output_layers` names decoder layers, from 0,
whose *output* the head reads. Checkpoints count differently; `checkpoint.py` converts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specdec.errors import ConfigError

MOST = {
    "hidden_size": 32_768,
    "intermediate_size": 262_144,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 4096,
    "vocab_size": 4_194_304,
    "draft_vocab_size": 4_194_304,
    "target_hidden_size": 32_768,
    "max_position_embeddings": 2**31 - 1,
}
"""The largest value of each size that is believed; checked before anything is allocated."""

LEAST_FOR_DEFAULT = 7
"""Layers of a target from which on all trainers and engines mean the same default layers."""

_MOST_LAYERS_READ = 16
_MOST_TARGET_LAYERS = 4096


@dataclass(frozen=True)
class Eagle3Config:
    """Shape of an EAGLE-3 head (arXiv 2503.01840), with the flags of EAGLE-3.1 (arXiv 2605.09992).

    Attributes:
        hidden_size: Width H of the head.
        intermediate_size: Width of its MLP.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides the query heads.
        head_dim: Width of a head; even.
        vocab_size: Ids V of the target.
        draft_vocab_size: Ids D that the head can draft; V, or fewer.
        target_hidden_size: Width Ht of the target.
        aux_output_layers: Target layers, counted from 0, whose output the head reads, in the order
            in which it concatenates them; -1 stands for the embeddings.
        rms_norm_eps: Of every norm.
        hidden_act: Activation of the MLP, by its Hugging Face name.
        rope: Rotary parameters, as Hugging Face's `rope_parameters`.
        max_position_embeddings: Longest text that the head was made for; rotary scaling uses it.
        norm_before_residual: The residual is the normed feature, not the feature itself.
        norm_before_fc: One norm over the concatenated layers, before `fc`.
        fc_norm: A norm for each layer, before they are concatenated (EAGLE-3.1).
        feed_post_norm: Later steps read the state after the final norm (EAGLE-3.1), not before it.
        qk_norm: Norms of queries and keys, as in Qwen3.
        attention_bias: Biases of the query, key and value projections.
        output_bias: Bias of the attention's output projection.
        mlp_bias: Biases of the MLP.
        fc_bias: Bias of `fc`.
        sliding_window: Attention looks at this many newest positions only; None for all.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    aux_output_layers: tuple[int, ...]
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0}
    )
    max_position_embeddings: int = 2048
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    feed_post_norm: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    fc_bias: bool = False
    sliding_window: int | None = None
    output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        """Checks every field, before anything is allocated; raises `ConfigError`."""
        for name, most in MOST.items():
            check_size(name, getattr(self, name), most)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads must divide num_attention_heads, got "
                f"{self.num_key_value_heads} and {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, got {self.head_dim}")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(
                f"draft_vocab_size must be at most vocab_size {self.vocab_size}, got "
                f"{self.draft_vocab_size}"
            )
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window, 2**31 - 1)
        if not isinstance(self.rms_norm_eps, float) or not 0 < self.rms_norm_eps < 1:
            raise ConfigError(f"rms_norm_eps must be between 0 and 1, got {self.rms_norm_eps!r}")
        if not isinstance(self.rope, Mapping):
            raise ConfigError(f"rope must be a mapping, got {self.rope!r}")
        object.__setattr__(self, "aux_output_layers", _layers(self.aux_output_layers))

    @property
    def feature_width(self) -> int:
        """Width of the target's concatenated hidden states."""
        return len(self.aux_output_layers) * self.target_hidden_size


def check_size(name: str, value: object, most: int) -> None:
    """Raises `ConfigError` unless a field is a whole number from 1 to `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= most:  # type: ignore[operator]
        raise ConfigError(f"{name} must be an integer from 1 to {most}, got {value!r:.60}")


def _layers(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, list | tuple) or not 1 <= len(layers) <= _MOST_LAYERS_READ:
        raise ConfigError(
            f"aux_output_layers must be 1 to {_MOST_LAYERS_READ} layer numbers, got {layers!r:.80}"
        )
    for layer in layers:
        whole = isinstance(layer, int) and not isinstance(layer, bool)
        if not whole or not -1 <= layer < _MOST_TARGET_LAYERS:
            raise ConfigError(f"aux_output_layers holds {layer!r:.60}, which is no layer number")
    if len(set(layers)) < len(layers):
        raise ConfigError(f"aux_output_layers names a layer twice: {layers!r}")
    return tuple(layers)


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """The layers that a head reads when nothing else is said, as `aux_output_layers`.

    From 7 layers on it is the choice of EAGLE-3 and of both serving engines: a low, the middle and
    a high layer. Below, up to three layers are spread over all but the last one, whose output
    engines take before and Hugging Face after the final norm; the first of them is the lowest,
    where the tokens themselves are still to be seen (docs/training.md compares).
    """
    if num_layers >= LEAST_FOR_DEFAULT:
        return (1, num_layers // 2 - 1, num_layers - 4)
    if num_layers < 2:
        return (-1,)
    last, count = num_layers - 2, min(3, num_layers - 1)
    if count == 1:
        return (last,)
    return tuple(last * i // (count - 1) for i in range(count))
