"""Hidden states of Hugging Face models, as draft heads read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.errors import ConfigError

_STREAMS = ("altup_num_inputs", "hc_mult")  # options that count the streams of a state


def recorded_layers(config: Any) -> int:
    """Layers whose output a model reports.

    A layer of LongCat-Flash holds two attentions, and its `num_hidden_layers` counts these.
    """
    text = config.get_text_config()
    counts = (getattr(text, name, None) for name in ("num_hidden_layers", "num_layers"))
    return min(count for count in counts if isinstance(count, int))


def streams_of_state(config: Any) -> int:
    """Streams of every state that layers hand on: more than 1 with AltUp and hyper-connections."""
    text = config.get_text_config()
    return max(getattr(text, name, None) or 1 for name in _STREAMS)


def tapped_states(hidden_states: Sequence[Tensor], taps: Sequence[int], config: Any) -> Tensor:
    """[B, T, F] outputs of layers `taps`, concatenated, from those that a forward returned.

    Where layers hand on several streams of a state, Gemma 3n has an active one; of others (hyper-
    connections) the mean is taken, as they do at their end. Of a model that is spread over devices,
    all states go to the device of the last tap.

    Raises:
        ConfigError: The model reports fewer layers.
    """
    if max(taps) + 1 >= len(hidden_states):
        raise ConfigError(
            f"the head reads the output of layer {max(taps)} (from 0), and this model reports "
            f"{len(hidden_states) - 1} layers; the head was made for another target"
        )
    text, place = config.get_text_config(), hidden_states[taps[-1] + 1].device
    return torch.cat([_one_stream(hidden_states[tap + 1], text).to(place) for tap in taps], -1)


def _one_stream(state: Tensor, text: Any) -> Tensor:
    """[B, T, H] of a layer's output."""
    active = getattr(text, "altup_active_idx", None)
    width, found = text.hidden_size, state
    if state.ndim == 4:  # [streams, B, T, H], or [B, T, streams, H]
        found = state[active] if active is not None else state.mean(2)
    elif state.shape[-1] > width and state.shape[-1] % width == 0:
        found = state.unflatten(-1, (-1, width)).mean(-2)
    return found
