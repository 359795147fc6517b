"""The tree-attention kernel in Triton's interpreter, against float64 from the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from helpers.kernel_cases import Call, Case, error, made, usual_error
from specdec_kernels import KernelError, Tree, tree_attention, tree_words
from specdec_kernels.fused.attention import tree_attention as fused

FLOAT32, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
BFLOAT_ERROR = 1.2e-2  # the interpreter cuts float32 off where a device would round it


def run(call: Call, splits: int = 0) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the kernel, with a number of splits of the test's own."""
    q, k, v, tree = call.arguments
    return fused(
        q, k, v, tree.words, tree.depth, tree.size, tree.prefix, **call.options, splits=splits
    )


def check(case: Case, dtype: torch.dtype, splits: int = 0) -> None:
    """The kernel errs by at most twice of what torch's attention does, and leaves nothing unset."""
    call = made(case, dtype)
    out, lse = run(call, splits)
    expected, expected_lse = call.expected()
    limit = BFLOAT_ERROR
    if dtype != BFLOAT:
        limit = max(2 * usual_error(call), torch.finfo(dtype).eps)
    assert error(out, expected) <= limit
    torch.testing.assert_close(
        lse.double(), expected_lse, atol=1e-2 if dtype == BFLOAT else 2e-6, rtol=2e-6
    )
    assert out.dtype == dtype
    assert not out[~call.live].any()


NODES, PREFIXES = (1, 2, 7, 16, 33, 64), (0, 1, 15, 16, 17, 129)
HEADS, DIMS = ((1, 1), (4, 2), (8, 1)), (16, 64, 80, 128)
TYPES = (FLOAT32, HALF, BFLOAT)
GRID = [
    (nodes, prefix, HEADS[(i + 2 * j) % 3], DIMS[(i + j) % 4], TYPES[(i + i // 3 + j) % 3])
    for i, nodes in enumerate(NODES)
    for j, prefix in enumerate(PREFIXES)
]


@pytest.mark.parametrize(("nodes", "prefix", "heads", "dim", "dtype"), GRID)
def test_shapes(
    nodes: int, prefix: int, heads: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    check(Case(nodes, (prefix,), heads, dim, seed=nodes + prefix), dtype, splits=1 + prefix % 3)


def test_every_two_values_of_the_grid_meet() -> None:
    axes = (NODES, PREFIXES, HEADS, DIMS, TYPES)
    for first, second in combinations(range(5), 2):
        met = {(cell[first], cell[second]) for cell in GRID}
        assert len(met) == len(axes[first]) * len(axes[second]), (axes[first], axes[second])


FEATURES = {
    "ragged and padded trees": Case(20, (5, 61, 16), sizes=(20, 7, 13)),
    "a row without live nodes": Case(9, (5, 20), sizes=(9, 0)),
    "left padding": Case(12, (40, 40, 37), (8, 4), start=(0, 37, 16)),
    "one tree for all rows": Case(12, (9, 30), one_tree=True),
    "a tree of two words": Case(100, (31,), (4, 2)),
    "a tree of four words, deep": Case(200, (5,), (1, 1), bushy=2),
    "int64 lengths": Case(7, (9, 20), start=(0, 3), lengths=torch.int64),
    "a window": Case(24, (90, 51), window=33),
    "a window smaller than the tree is deep": Case(24, (30, 2), window=5, bushy=2),
    "a window of one": Case(6, (10,), window=1),
    "a window wider than the text": Case(6, (10,), window=100),
    "a window and left padding": Case(16, (40, 50), window=20, start=(30, 5), bushy=2),
    "chunks": Case(24, (90, 51), chunk=16, bushy=3),
    "chunks that begin inside the tree": Case(30, (30, 32), chunk=8, bushy=2),
    "chunks and left padding": Case(20, (40, 44), chunk=16, start=(5, 13), bushy=2),
    "a softcap": Case(16, (45,), softcap=2.0),
    "a mild softcap": Case(16, (45,), softcap=50.0),
    "sinks": Case(16, (45, 3), (8, 2), sinks=True),
    "sinks and a window": Case(16, (45, 0), (8, 2), sinks=True, window=9, bushy=2),
    "values narrower than keys": Case(9, (20,), dim=24, value_dim=16),
    "values wider than keys": Case(9, (20,), dim=16, value_dim=40),
    "pages": Case(20, (50, 33), page=16),
    "pages, a window, left padding": Case(20, (50, 33), page=16, window=15, start=(4, 0)),
    "pages smaller than a tile, chunks, sinks": Case(
        20, (50, 33), page=8, chunk=16, sinks=True, bushy=2
    ),
    "all at once": Case(
        33, (70, 20), (8, 2), 24, 40, (33, 21), (3, 11), 25, 32, 9.0, True, 16, bushy=3
    ),
}  # fmt: skip


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, splits: int) -> None:
    check(FEATURES[name], FLOAT32, splits)


@pytest.mark.parametrize("name", ["pages, a window, left padding", "all at once", "sinks"])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_features_in_half_precision(name: str, dtype: torch.dtype) -> None:
    check(FEATURES[name], dtype, 2)


@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("page", [0, 16])
def test_a_float8_cache_with_a_factor_a_head(cache: torch.dtype, page: int) -> None:
    for dtype, softcap in ((BFLOAT, 0.0), (FLOAT32, 3.0)):
        check(Case(20, (50, 33), page=page, cache=cache, softcap=softcap), dtype, 3)


def test_more_splits_than_tiles() -> None:
    check(Case(8, (33,)), FLOAT32, 9)


def test_many_rows_of_a_head() -> None:
    """More rows than one block has, the last of them padding alone."""
    check(Case(40, (20, 9), (8, 1), sizes=(40, 3)), FLOAT32, 2)


def test_strides_of_every_kind() -> None:
    """Queries, keys, values, words and depths in memory of other shapes."""
    call = made(Case(12, (40, 21), (4, 2)), FLOAT32)
    q, k, v, tree = call.arguments
    wide = torch.full((2, 12, 9, 4, 16), math.nan)
    wide[:, :, 3] = q.transpose(1, 2)
    both = torch.full((k.shape[2], 2, 2, 2, 20), math.nan)
    both[..., :16] = torch.stack([k, v], 2).permute(3, 2, 0, 1, 4)
    words = torch.full((12, 3, 2), -1)
    words[:, 1] = tree.words[..., 0].T
    depth = torch.full((12, 2), 99, dtype=torch.int32)
    depth[:] = tree.depth.T
    moved = (
        wide[:, :, 3].transpose(1, 2),
        *(both[:, at].permute(1, 2, 0, 3)[..., :16] for at in (0, 1)),
        Tree(words[:, 1].T[..., None], depth.T, tree.size, tree.prefix),
    )
    expected, found = run(call, 2), run(replace(call, arguments=moved), 2)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])


FAR = {
    "rows": (Case(8, (40, 35, 40)), (1_200_000_000, 1000, 16, 1)),
    "slots": (Case(4, (40,), (2, 1)), (0, 0, 60_000_000, 1)),
}


@pytest.mark.parametrize("name", FAR)
def test_offsets_beyond_32_bits(name: str) -> None:
    """Rows or slots so far apart that the last lie past 2^31 elements, by strides of 32 bits.

    The memory is mapped and hardly touched. As much of it lies before the first element, so that an
    offset that wraps around reads zeros there.
    """
    case, strides = FAR[name]
    call = made(case, HALF)
    q, k, _, tree = call.arguments
    near, room = torch.where(k.isnan(), 0, k).to(torch.float8_e5m2), 1 << 31
    reach = sum((size - 1) * stride for size, stride in zip(k.shape, strides, strict=True))
    assert reach > room
    memory = torch.empty(room + reach + 1, dtype=torch.float8_e5m2)
    far = memory.as_strided(k.shape, strides, room).copy_(near)
    expected = run(replace(call, arguments=(q, near, near, tree)), 2)
    found = run(replace(call, arguments=(q, far, far, tree)), 2)
    assert expected[0].any()
    assert torch.equal(found[0], expected[0])


def test_the_entry_runs_the_kernel_where_it_is_asked_to() -> None:
    call = made(FEATURES["all at once"], FLOAT32)
    out, lse = tree_attention(*call.arguments, **call.options, return_lse=True, backend="triton")
    other, other_lse = tree_attention(*call.arguments, **call.options, return_lse=True)
    torch.testing.assert_close(out, other)
    torch.testing.assert_close(lse, other_lse)
    alone = tree_attention(*call.arguments, **call.options, backend="triton")
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, out)


def test_the_operator_is_one_of_torch() -> None:
    """Its schema, its fake and what torch.compile makes of it agree with the kernel."""
    call = made(Case(5, (9, 4), sinks=True, start=(2, 0), window=6), FLOAT32)
    q, k, v, tree = call.arguments
    given = (q, k, v, tree.words, tree.depth, tree.size, tree.prefix)
    torch.library.opcheck(fused, given, call.options)
    compiled = torch.compile(lambda *x: fused(*x, **call.options)[0] * 2, fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    assert torch.equal(compiled(*given), run(call)[0] * 2)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    with pytest.raises(KernelError, match="float64"):
        run(made(Case(2, (3,)), torch.float64))
    with pytest.raises(KernelError, match=r"up to 512, got 513"):
        run(made(Case(2, (3,), dim=513), FLOAT32))


def test_words_and_depths_of_a_tree() -> None:
    """What the kernel's word of 64 nodes holds at its ends."""
    chain = torch.arange(-1, 69)[None]
    words, depth = tree_words(chain)
    assert words.shape == (1, 70, 2)
    assert depth[0].tolist() == list(range(70))
    assert words[0, 63].tolist() == [-1, 0]
    assert words[0, 64].tolist() == [-1, 1]
