"""Which layers of the target a head is to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.errors import ConfigError
from specdec.heads.checkpoints.aux_layers import check_layers
from specdec.heads.eagle3.config import default_aux_layers
from specdec.hf.states import recorded_layers

_MOST_LAYERS = 16


def chosen_layers(named: Sequence[int], model_config: Any) -> tuple[int, ...]:
    """The layers named with --taps, or the default of a target of this depth.

    Args:
        named: Layers counted from 0, whose output is read; -1 stands for the embeddings.

    Raises:
        ConfigError: No head can be written that reads these layers.
    """
    count = recorded_layers(model_config)
    layers = tuple(named) or default_aux_layers(count)
    if len(layers) > _MOST_LAYERS or any(not -1 <= layer < count for layer in layers):
        raise ConfigError(
            f"--taps takes up to {_MOST_LAYERS} layers from -1, the embeddings, to "
            f"{count - 2} of this target's {count} layers, got {' '.join(map(str, layers))}"
        )
    check_layers(layers, count, "--taps")
    return layers
