"""Hidden states as heads read them: which layers are reported, and one stream of several."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdec.errors import ConfigError
from specdec.hf.states import recorded_layers, tapped_states

BATCH, LENGTH, WIDTH, STREAMS = 2, 5, 8, 3


def config(**fields: Any) -> Any:
    text = SimpleNamespace(hidden_size=WIDTH, **fields)
    text.get_text_config = lambda: text
    return text


def states(*shape: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape) for _ in range(4))


def test_plain_states_are_joined_in_the_order_of_the_taps() -> None:
    found = states(BATCH, LENGTH, WIDTH)
    wanted = torch.cat([found[0], found[2]], -1)
    assert torch.equal(tapped_states(found, (-1, 1), config()), wanted)


def test_an_active_stream_is_taken() -> None:
    found = states(STREAMS, BATCH, LENGTH, WIDTH)
    assert torch.equal(tapped_states(found, (0,), config(altup_active_idx=2)), found[1][2])


@pytest.mark.parametrize("flat", [False, True], ids=["own dimension", "in the width"])
def test_streams_of_hyper_connections_are_averaged(flat: bool) -> None:
    found = states(BATCH, LENGTH, STREAMS, WIDTH)
    given = tuple(state.flatten(2) for state in found) if flat else found
    read = tapped_states(given, (0, 2), config())
    assert read.shape == (BATCH, LENGTH, 2 * WIDTH)
    torch.testing.assert_close(read, torch.cat([found[1].mean(2), found[3].mean(2)], -1))


def test_a_layer_that_is_not_reported_is_named() -> None:
    with pytest.raises(ConfigError, match=r"layer 3 .* reports 3 layers"):
        tapped_states(states(BATCH, LENGTH, WIDTH), (0, 3), config())


def test_layers_with_two_attentions_count_once() -> None:
    assert recorded_layers(config(num_hidden_layers=8, num_layers=4)) == 4
    assert recorded_layers(config(num_hidden_layers=8)) == 8
