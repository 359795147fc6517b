"""The torch reference of tree attention against float64 from the definition, and its bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.kernel_cases import Call, Case, error, made, one_token
from specdec_kernels import KernelError, Tree, tree_ancestors, tree_attention

CASES = {
    "ragged and padded": Case(20, (5, 61, 16), sizes=(20, 7, 13)),
    "one tree for all rows, pages": Case(70, (9, 30), one_tree=True, page=8),
    "a window": Case(24, (30, 2), window=5, bushy=2),
    "chunks and left padding": Case(20, (40, 44), chunk=16, start=(5, 13), bushy=2),
    "sinks and a softcap": Case(16, (45, 3), (8, 2), sinks=True, softcap=3.0),
    "a float8 cache": Case(9, (20,), dim=24, value_dim=16, cache=torch.float8_e4m3fn),
    "all at once": Case(
        33, (70, 20), (8, 2), 24, 40, (33, 21), (3, 11), 25, 32, 9.0, True, 16, bushy=3
    ),
}  # fmt: skip


def run(call: Call, ordered: bool) -> tuple[Tensor, Tensor]:
    q, k, v, tree = call.arguments
    options = dict(call.options)
    if ordered:
        options["ancestors"] = tree_ancestors(tree.words, tree.depth, q.shape[2])
    found = tree_attention(
        q, k, v, tree, **options, ordered=ordered, return_lse=True, backend="reference"
    )
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_right(name: str, ordered: bool) -> None:
    call = made(CASES[name], torch.float64 if CASES[name].cache is None else torch.float32)
    out, lse = run(call, ordered)
    expected, expected_lse = call.expected()
    assert error(out, expected) <= (1e-12 if out.dtype == torch.float64 else 1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_order_the_bits_depend_on_the_row_alone(dtype: torch.dtype) -> None:
    """Every node against decoding it as one token; the dense reference differs somewhere."""
    differs = False
    rows = 0
    for name, case in CASES.items():
        call = made(case, dtype)
        ordered, dense = run(call, True), run(call, False)
        for row, node in call.live.nonzero().tolist():
            alone = one_token(call, row, node)
            found = run(alone, True)
            assert torch.equal(found[0][0, 0], ordered[0][row, node]), (name, row, node)
            assert torch.equal(found[1][0, :, 0], ordered[1][row, :, node]), (name, row, node)
            differs |= not torch.equal(run(alone, False)[1][0, :, 0], dense[1][row, :, node])
            rows += 1
    assert differs
    assert rows >= 250


def test_paths_of_a_tree() -> None:
    call = made(Case(66, (3, 4), sizes=(66, 30)), torch.float32)
    tree = call.arguments[3]
    path = tree_ancestors(tree.words, tree.depth, 66)
    for row, node in call.live.nonzero().tolist():
        expected, at = [], node
        while at >= 0:
            expected.insert(0, at)
            at = call.parents[row][at]
        assert path[row, node, : len(expected)].tolist() == expected
        assert not path[row, node, len(expected) :].any()


WRONG = {
    "a transposed cache": (lambda q, k, v: (q, k.transpose(2, 3), v), "last dimension"),
    "another type": (lambda q, k, v: (q, k.half(), v), "float16 and torch.float32"),
    "three dimensions": (lambda q, k, v: (q[0], k, v), "four dimensions"),
    "heads that do not divide": (lambda q, k, v: (q[:, :3], k, v), "Hkv dividing 3"),
    "rows that are missing": (lambda q, k, v: (q, k[:1], v[:1]), "must have 2 rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_out_of_the_contract_is_named(name: str) -> None:
    q, k, v, tree = made(Case(16, (5, 7), dim=16), torch.float32).arguments
    change, message = WRONG[name]
    with pytest.raises(KernelError, match=message):
        tree_attention(*change(q, k[:, :, :16], v[:, :, :16]), tree, scale=1.0)


def test_words_and_sinks_of_another_size_are_named() -> None:
    q, k, v, tree = made(Case(16, (5, 7)), torch.float32).arguments
    with pytest.raises(KernelError, match=r"words must be \[2 or 1, 16, 1\]"):
        tree_attention(q, k, v, Tree(tree.words[:, :8], *list_of(tree)), scale=1.0)
    with pytest.raises(KernelError, match=r"sinks must be \[4\]"):
        tree_attention(q, k, v, tree, scale=1.0, sinks=torch.zeros(3))
    with pytest.raises(KernelError, match="needs ancestors"):
        tree_attention(q, k, v, tree, scale=1.0, ordered=True)


def list_of(tree: Tree) -> tuple[Tensor, Tensor, Tensor]:
    return tree.depth, tree.size, tree.prefix
