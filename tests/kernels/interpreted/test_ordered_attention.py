"""Attention in the order of positions: right, and the same bits whatever is around a row.

The interpreter multiplies matrices by numpy, whose bits depend on where in its block a row stands:
with that product the claim below does not hold, and could not be shown. So it is shown with a
product of one fixed order, which says what the programs do with their rows, not what a device's
matrix instructions do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

from helpers.kernel_cases import Call, Case, error, made, one_token, usual_error
from specdec_kernels import tree_ancestors, tree_attention
from specdec_kernels.fused import ordered as ordered_module
from specdec_kernels.fused.ordered import ordered_tree_attention
from specdec_kernels.fused.tiles import Tile

FLOAT32, BFLOAT = torch.float32, torch.bfloat16
SMALL = Tile(16, 16, 4, 2, 1)  # so that a short text has many tiles and splits
SPAN = 2


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_module, "ordered_tile_for", lambda *_: SMALL)


@pytest.fixture
def fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product whose elements are summed one after the other, each on its own."""

    def create_dot(self: Any, a: Any, b: Any, c: Any, *_: Any) -> Any:
        left, right = a.data.astype(np.float32), b.data.astype(np.float32)
        total = np.zeros((left.shape[0], right.shape[1]), np.float32)
        for at in range(left.shape[1]):
            total += left[:, at : at + 1] * right[at : at + 1]
        return interpreter.TensorHandle(total + c.data.astype(np.float32), c.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def run(call: Call, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in order, with some dead nodes more than the tree has."""
    q, k, v, tree = call.arguments
    nodes = q.shape[2]
    width = int(tree.depth[call.live[:, :nodes]].max()) + 1 if nodes > 1 else 1
    path, depth = tree_ancestors(tree.words, tree.depth, width), tree.depth
    if padding:
        q = torch.nn.functional.pad(q, (0, 0, 0, padding), value=float("nan"))
        path = torch.nn.functional.pad(path, (0, 3, 0, padding), value=7)
        depth = torch.nn.functional.pad(depth, (0, padding), value=5)
    out, lse = ordered_tree_attention(
        q, k, v, path, depth, tree.size, tree.prefix, **call.options, span=SPAN
    )
    assert not out[:, nodes:].any()
    return out[:, :nodes], lse[..., :nodes]


CASES = {
    "prefixes around the tiles": Case(16, (31, 32, 33, 66), (8, 1)),
    "no prefix": Case(20, (0, 3), (8, 2), bushy=2),
    "padded trees": Case(20, (40, 16), (8, 1), sizes=(20, 7)),
    "a window": Case(20, (66, 33), (8, 1), window=20, bushy=2),
    "a window smaller than the tree is deep": Case(20, (50, 5), (8, 1), window=4, bushy=2),
    "chunks": Case(20, (60, 30), (8, 1), chunk=24, bushy=2),
    "sinks and a softcap": Case(20, (50, 17), (8, 2), sinks=True, softcap=3.0),
    "left padding": Case(16, (50, 40), (8, 1), start=(5, 33)),
    "pages": Case(16, (50, 20), (8, 1), page=8),
    "dimensions": Case(12, (40,), (8, 1), dim=24, value_dim=40),
    "all at once": Case(
        20, (66, 40), (8, 2), 24, 16, (20, 15), (3, 11), 25, 32, 9.0, True, 16, bushy=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT])
def test_right(name: str, dtype: torch.dtype) -> None:
    call = made(CASES[name], dtype)
    out, lse = run(call)
    expected, expected_lse = call.expected()
    limit = 1.2e-2 if dtype == BFLOAT else max(2 * usual_error(call), torch.finfo(dtype).eps)
    assert error(out, expected) <= limit
    atol = 1e-2 if dtype == BFLOAT else 2e-6
    torch.testing.assert_close(lse.double(), expected_lse, atol=atol, rtol=2e-6)


def test_a_float8_cache() -> None:
    call = made(Case(16, (40, 20), cache=torch.float8_e4m3fn), BFLOAT)
    assert error(run(call)[0], call.expected()[0]) <= 1.2e-2


@pytest.mark.usefixtures("fixed_order")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "step"), [(FLOAT32, 6), (BFLOAT, 12)])
def test_bits_depend_on_the_row_alone(name: str, dtype: torch.dtype, step: int) -> None:
    """Nodes against decoding each as one token: over 500 rows of queries in all.

    Decoding has a batch of one, no tree, another capacity and no pages; the tree has padding.
    """
    call = made(CASES[name], dtype)
    out, lse = run(call, padding=3)
    for row, node in call.live.nonzero()[::step].tolist():
        alone, alone_lse = run(one_token(call, row, node, spare=1 + node))
        assert torch.equal(alone[0, 0], out[row, node]), (row, node)
        assert torch.equal(alone_lse[0, :, 0], lse[row, :, node]), (row, node)


def test_bits_of_over_500_rows_were_compared() -> None:
    compared = 0
    for case in CASES.values():
        live = sum(case.sizes or [case.nodes] * len(case.prefix))
        compared += sum(-(-live // step) * case.heads[0] for step in (6, 12))
    assert compared >= 500


def test_the_entry_runs_it() -> None:
    call = made(CASES["all at once"], FLOAT32)
    q, k, v, tree = call.arguments
    path = tree_ancestors(tree.words, tree.depth, 24)
    options = {**call.options, "ordered": True, "ancestors": path, "return_lse": True}
    out, lse = tree_attention(q, k, v, tree, **options, backend="triton")
    other, other_lse = tree_attention(q, k, v, tree, **options, backend="reference")
    torch.testing.assert_close(out, other)
    torch.testing.assert_close(lse, other_lse)


def test_the_operator_is_one_of_torch() -> None:
    call = made(Case(5, (9, 4), sinks=True, start=(2, 0), window=6), FLOAT32)
    q, k, v, tree = call.arguments
    path = tree_ancestors(tree.words, tree.depth, 5)
    given = (q, k, v, path, tree.depth, tree.size, tree.prefix)
    torch.library.opcheck(ordered_tree_attention, given, call.options)
