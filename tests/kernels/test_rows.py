"""Picks, expansion, norm and rotary embedding in plain torch, against what decoding computes."""

from __future__ import annotations

import pytest
import torch

from helpers.kernel_rows import awkward_logits, broken_logits, projections
from helpers.random_trees import random_trees
from specdec import TreeBatch
from specdec.heads.eagle3.norm import rms_norm as head_norm
from specdec.heads.eagle3.stepped import _rotated
from specdec.round.noise import NoiseTape
from specdec.round.pickers import NOT_A_NUMBER, picker_of
from specdec.round.prefix import PrefixIds
from specdec_kernels import (
    KernelError,
    expand_topk,
    rms_norm,
    rotate_into_cache,
    row_argmax,
    sampled_picks,
)
from specdec_kernels.picks import NOT_A_NUMBER as KERNELS_NOT_A_NUMBER


class Rows:
    """State and stop rules of rows that have emitted some tokens and never end."""

    active = (True, True, True)

    def emitted(self, row: int) -> int:
        return 2 * row

    def is_final(self, row: int, index: int, token: int) -> bool:
        return False


def test_sampled_picks_are_those_of_the_picker() -> None:
    """Same noise, same tokens, bit for bit, with rows that are not numbers among them."""
    trees = TreeBatch(*random_trees(2, 3, 33)[:3], 33)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 33, 50, generator=generator) * 3
    logits[1, 4, 7] = float("nan")
    filtered = torch.rand(33, 50, generator=generator) < 0.9
    logits[2] = logits[2].masked_fill(filtered, float("-inf"))
    torch.manual_seed(5)
    tape, prefix = NoiseTape(3, logits.device), PrefixIds(torch.zeros(3, 1, dtype=torch.long), 99)
    picker = picker_of(None, prefix, tape, along_path=False)
    wanted = picker.picks(trees, logits, Rows(), Rows()).ids  # type: ignore[arg-type]
    noise = tape.levels([0, 2, 4], trees.max_depth + 1, 50)
    assert torch.equal(sampled_picks(logits, noise, trees.depths()), wanted)
    assert KERNELS_NOT_A_NUMBER == NOT_A_NUMBER == int(wanted[1, 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_best_token_is_argmax(dtype: torch.dtype) -> None:
    for logits in (awkward_logits(7, 333, dtype), broken_logits(333, dtype)):
        assert torch.equal(row_argmax(logits), logits.float().argmax(-1))
    assert row_argmax(logits.view(2, 3, 333)).shape == (2, 3)


def test_expansion_is_a_stable_order_of_log_probabilities() -> None:
    logits = awkward_logits(5, 300, torch.float32)
    scores, offsets = torch.randn(5), torch.arange(300) * 2
    tokens, found = expand_topk(logits, scores, offsets, 10)
    for row in range(5):
        order = sorted(range(300), key=lambda index: (-float(logits[row, index]), index))[:10]
        assert tokens[row].tolist() == [3 * index for index in order]
        wanted = scores[row] + logits[row].log_softmax(-1)[order]
        torch.testing.assert_close(found[row], wanted, atol=1e-6, rtol=0)
    assert torch.equal(expand_topk(logits, scores, None, 10)[0] * 3, tokens)


def test_the_norm_is_the_head_s() -> None:
    states, weight = torch.randn(2, 5, 3, 24), torch.randn(3, 24)
    torch.testing.assert_close(rms_norm(states, weight, 1e-5), head_norm(states, weight, 1e-5))
    narrow = rms_norm(states.bfloat16(), weight.bfloat16(), 1e-5)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), head_norm(states, weight, 1e-5), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_turn_as_the_head_turns_them(normed: bool) -> None:
    given = projections(torch.float64)
    norms = (given["q_norm"], given["k_norm"]) if normed else None
    states = given["joined"].transpose(1, 2)
    turning, value = states[:, :6], states[:, 6:]
    if norms is not None:
        both = zip((turning[:, :4], turning[:, 4:]), norms, strict=True)
        turning = torch.cat([head_norm(part, weight, 1e-5) for part, weight in both], 1)
    turn = tuple(given[name][given["positions"]][:, None] for name in ("cos", "sin"))
    turned = _rotated(turning, turn)  # type: ignore[arg-type]
    keys, values = given["keys"].clone(), given["values"].clone()
    for row, slot in enumerate(given["slots"].tolist()):
        keys[row, :, slot : slot + 5] = turned[row, 4:]
        values[row, :, slot : slot + 5] = value[row]
    query = rotate_into_cache(
        given["joined"], (given["cos"], given["sin"]), given["positions"], given["slots"],
        (given["keys"], given["values"]), norms, 1e-5,
    )  # fmt: skip
    for found, wanted in (
        (query, turned[:, :4]), (given["keys"], keys), (given["values"], values)
    ):  # fmt: skip
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_they_are_operators_with_fakes() -> None:
    ops, logits = torch.ops.specdec, awkward_logits(3, 40, torch.float32)
    given = projections(torch.float32)
    names = ("joined", "cos", "sin", "positions", "slots", "keys", "values", "q_norm", "k_norm")
    noise, depth = torch.rand(1, 2, 40), torch.tensor([[0, 1, 1]])
    for op, inputs in (
        (ops.row_argmax, (logits,)),
        (ops.expand_topk, (logits, torch.zeros(3), torch.arange(40), 4)),
        (ops.sampled_picks, (logits[None], noise, depth)),
        (ops.rms_norm, (torch.randn(3, 8), torch.randn(8), 1e-5)),
        (ops.rotate_into_cache, (*(given[name] for name in names), 1e-5)),
    ):
        torch.library.opcheck(op.default, (*inputs, "reference"))


def test_shapes_are_checked() -> None:
    logits, given = torch.zeros(2, 5), projections(torch.float32)
    turn, cache = (given["cos"], given["sin"]), (given["keys"], given["values"])
    with pytest.raises(KernelError, match="V > 0"):
        row_argmax(logits[:, :0])
    with pytest.raises(KernelError, match="from 1 to 5, got 6"):
        expand_topk(logits, torch.zeros(2), None, 6)
    with pytest.raises(KernelError, match=r"offsets must be \[5\]"):
        expand_topk(logits, torch.zeros(2), torch.arange(4), 3)
    with pytest.raises(KernelError, match=r"\[N, D\] and \[N\]"):
        expand_topk(logits, torch.zeros(3), None, 3)
    with pytest.raises(KernelError, match="scores, noise and depth"):
        sampled_picks(logits[None], torch.ones(1, 3, 4), torch.zeros(1, 2))
    with pytest.raises(KernelError, match="shape of weight"):
        rms_norm(logits, torch.ones(4), 1e-5)
    with pytest.raises(KernelError, match="even d"):
        rotate_into_cache(
            given["joined"][..., :11], turn, given["positions"], given["slots"], cache
        )
    with pytest.raises(KernelError, match="2 Hkv below 4"):
        rotate_into_cache(
            given["joined"][:, :, :4], turn, given["positions"], given["slots"], cache
        )
    with pytest.raises(KernelError, match="positions and slots"):
        rotate_into_cache(given["joined"], turn, given["slots"], given["slots"], cache)
