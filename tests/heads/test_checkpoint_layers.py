"""Target layers: three ways of counting, there and back, and every refusal."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import ConfigError
from specdec.heads.checkpoints.aux_layers import (
    check_layers,
    hidden_states_ids,
    read_ids,
    sglang_ids,
    sglang_reads,
)
from specdec.heads.eagle3.config import default_aux_layers

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")
APART = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gpt_oss")


@pytest.mark.parametrize("num_layers", range(4, 81))
def test_conversions_there_and_back_are_the_identity(num_layers: int) -> None:
    for low, middle in itertools.combinations(range(-1, num_layers - 2), 2):
        layers = (low, middle, num_layers - 2)
        ids = hidden_states_ids(layers)
        assert ids == [low + 1, middle + 1, num_layers - 1]
        assert read_ids(ids, "hidden_states", num_layers) == layers
        assert read_ids(list(layers), "output", num_layers) == layers
        if middle > low + 6:
            continue  # the rest is the same again
        for kind in ("llama", *APART):
            try:
                written = sglang_ids(layers, kind, num_layers)
            except ConfigError:
                assert low == -1 or (low == 0 and kind in APART[:3])
                continue
            if written is None:
                assert layers == default_aux_layers(num_layers)
            else:
                assert sglang_reads(written, kind, num_layers) == layers


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(4, 80), st.sampled_from(PLAIN + APART))
def test_sglang_reads_what_was_meant(data: st.DataObject, num_layers: int, kind: str) -> None:
    numbers = st.sets(st.integers(0, num_layers - 2), min_size=1, max_size=5)
    layers = tuple(sorted(data.draw(numbers)))
    try:
        ids = sglang_ids(layers, kind, num_layers)
    except ConfigError:
        assert kind in APART[:3]
        assert layers[0] == 0
        return
    if ids is None:
        assert layers == default_aux_layers(num_layers)
    else:
        assert sglang_reads(ids, kind, num_layers) == layers
        if kind in PLAIN:
            assert ids == list(layers)


def test_the_default_rule_is_that_of_all_engines() -> None:
    for num_layers in range(7, 200):
        layers = default_aux_layers(num_layers)
        assert hidden_states_ids(layers) == [2, num_layers // 2, num_layers - 3]
        check_layers(layers, num_layers, "default")


def test_deepseek_counts_by_the_first_number() -> None:
    # SGLang 0.5.23, deepseek_v2.py: one is added only when the first number is 1.
    assert sglang_reads([1, 29, 57], "deepseek_v3", 61) == (1, 29, 57)
    assert sglang_reads([2, 30, 58], "deepseek_v3", 61) == (1, 29, 57)
    assert sglang_ids((3, 29, 57), "deepseek_v3", 61) == [4, 30, 58]
    assert sglang_ids((1, 20, 40), "deepseek_v3", 61) == [1, 20, 40]
    with pytest.raises(ConfigError, match="cannot be named to SGLang"):
        sglang_ids((0, 20, 40), "deepseek_v3", 61)
    # gpt_oss.py: one is added unless the largest number is the number of layers.
    assert sglang_reads([6, 18, 24], "gpt_oss", 24) == (5, 17, 23)
    assert sglang_reads([6, 17, 22], "gpt_oss", 24) == (6, 17, 22)


@pytest.mark.parametrize(
    ("ids", "counting", "said"),
    [
        ([2, 16, 32], "hidden_states", "before the target's final norm"),
        ([1, 15, 31], "output", "before the target's final norm"),
        ([1, 15, 32], "output", "the target has 32 layers"),
        ([2, 16, 40], "hidden_states", "the target has 32 layers"),
        ([-1, 3, 4], "hidden_states", "the lowest is -1"),
        ([-2, 3, 4], "output", "the lowest is -1"),
        ([5, 3, 9], "output", "must ascend"),
        ([3, 3, 9], "output", "must ascend"),
        ([], "output", "a list of 1 to 16 numbers"),
        (list(range(17)), "output", "a list of 1 to 16 numbers"),
        ("1,2,3", "output", "a list of 1 to 16 numbers"),
        ([1, True, 5], "output", "no layer number"),
        ([1, 2.0, 5], "output", "no layer number"),
        ([1, "2", 5], "output", "no layer number"),
        ([1, 2, 10**9], "output", "no layer number"),
        (None, "output", "a list of 1 to 16 numbers"),
    ],
)
def test_what_cannot_be_right_is_refused(ids: object, counting: str, said: str) -> None:
    with pytest.raises(ConfigError, match="some_field") as refusal:
        read_ids(ids, counting, 32, "some_field")  # type: ignore[arg-type]
    assert said in str(refusal.value)


def test_sglang_classes_that_nobody_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="model_type 'brand_new' is not known"):
        sglang_ids((1, 3, 5), "brand_new", 12)
    with pytest.raises(ConfigError, match="fingerprint of the target is missing"):
        sglang_ids((1, 3, 5), None, 12)
    assert sglang_ids((1, 5, 8), None, 12) is None  # the default, on which all agree
    with pytest.raises(ConfigError, match="cannot be named"):
        sglang_ids((-1, 3, 5), "llama", 12)
