"""TTT attention as a GPU does it: in blocks of queries, and through a flash kernel's interface."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specdec.heads.eagle3 import causal_block
from specdec.heads.eagle3.causal_block import Engine, FlashEngine, PlainEngine
from specdec.heads.eagle3.ttt_attention import dense_ttt_attention, ttt_attention

LENGTH = 37
SPANS = [[(0, 10), (10, 37)], [(2, 20), (20, 30)]]


def segments(ends: Tensor | None, states: Tensor) -> list[tuple[Tensor, slice]]:
    """Views [n, h, d] of packed states, and where their rows of log-sum-exps are."""
    if ends is None:
        return [(row, slice(None)) for row in states]
    return [(states[a:b], slice(a, b)) for a, b in pairwise(ends.tolist())]


def scores_of(query: Tensor, key: Tensor, scale: float, left: int | None) -> Tensor:
    """[h, n, n] scores of one segment, causal, with `left` slots in sight before each."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    ago = torch.arange(len(query))[:, None] - torch.arange(len(key))
    seen = (ago >= 0) & (ago <= (len(query) if left is None else left))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(~seen, float("-inf"))


def flash(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor | None, ends_k: Tensor | None,
    longest: int, longest_k: int, dropout: float, causal: bool, debug: bool, *,
    scale: float, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What flash attention computes, by its definition, with its arguments."""
    assert causal
    assert window_size_right in (None, 0)
    out, rows = torch.empty_like(query), []
    for (q, _), (k, _), (v, _), (o, _) in zip(
        *(segments(ends, x) for x in (query, key, value, out)), strict=True
    ):
        assert len(q) <= longest == longest_k
        scores = scores_of(q, k, scale, window_size_left)
        rows.append(scores.logsumexp(-1))
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        o.copy_(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    lse = torch.stack(rows) if ends is None else torch.cat(rows, -1)
    return out, lse, torch.zeros(2), torch.zeros(()), torch.empty(0)


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    ends: Tensor | None, ends_k: Tensor | None, longest: int, longest_k: int, dropout: float,
    causal: bool, seed: Tensor, offset: Tensor, *,
    scale: float, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Its gradients, from the output and log-sum-exp that it is given."""
    assert len(seed) == 2
    found = [torch.zeros_like(x) for x in (query, key, value)]
    parts = [segments(ends, x) for x in (grad, query, key, value, out, *found)]
    for number, each in enumerate(zip(*parts, strict=True)):
        (g, _), (q, at), (k, _), (v, _), (o, _), (dq, _), (dk, _), (dv, _) = each
        groups = q.shape[1] // k.shape[1]
        wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        total = lse[number] if ends is None else lse[:, at]
        share = (scores_of(q, k, scale, window_size_left) - total[..., None]).exp()
        delta = (g * o).sum(-1).T[..., None]
        d_score = share * (torch.einsum("qhd,khd->hqk", g, wide_v) - delta) * scale
        dq.copy_(torch.einsum("hqk,khd->qhd", d_score, wide_k))
        for into, grads in ((dk, torch.einsum("hqk,qhd->khd", d_score, q)),
                            (dv, torch.einsum("hqk,qhd->khd", share, g))):  # fmt: skip
            into.copy_(grads.unflatten(1, (-1, groups)).sum(2))
    return found[0], found[1], found[2]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().double().norm() / wanted.detach().double().norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("spans", [None, SPANS], ids=["one", "packed"])
@pytest.mark.parametrize("later", [0, 1, 3, 6])
@pytest.mark.parametrize("engine", [PlainEngine(), FlashEngine()], ids=["plain", "flash"])
def test_every_engine_is_dense_attention(
    engine: Engine, later: int, spans: Any, window: int | None, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Values and gradients; six diagonals reach beyond a window of five."""
    monkeypatch.setattr(causal_block, "_QUERIES", 8)
    monkeypatch.setattr(causal_block, "_FLASH", flash)
    monkeypatch.setattr(causal_block, "_FLASH_BACKWARD", flash_backward)
    generator = torch.Generator().manual_seed(later)

    def random(heads: int) -> Tensor:
        found = torch.randn(2, heads, LENGTH, 16, generator=generator, dtype=torch.float64)
        return found.to(dtype).requires_grad_()

    query = random(4)
    keys, values = ([random(2) for _ in range(later + 1)] for _ in range(2))
    kept = torch.ones(2, 1, LENGTH, 1, dtype=torch.bool)
    if spans is not None:  # padding sees what it likes
        kept[1, :, 30:] = kept[1, :, :2] = False
    found = torch.where(kept, ttt_attention(query, keys, values, spans, window, engine), 0)
    dense = torch.where(kept, dense_ttt_attention(query, keys, values, spans, window), 0)
    grad = torch.randn(found.shape, generator=generator, dtype=torch.float64).to(dtype)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    assert relative(found, dense) < tolerance
    both = (torch.autograd.grad(x, [query, *keys, *values], grad) for x in (found, dense))
    for one, other in zip(*both, strict=True):
        error = float((one - other).norm())
        assert error < tolerance * float(other.norm()) or error < tolerance * 1e-3


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("spans", [None, SPANS], ids=["one", "packed"])
def test_flash_attention_takes_what_it_is_given(spans: Any, window: int | None) -> None:
    """The operators themselves, on tensors without numbers: names, shapes and dtypes fit."""
    with FakeTensorMode():
        query, *both = (
            torch.empty(2, heads, LENGTH, 16, dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, 2, 2, 2, 2)
        )
        out = ttt_attention(query, both[:2], both[2:], spans, window, FlashEngine())
        assert (out.shape, out.dtype) == (query.shape, query.dtype)
        grads = torch.autograd.grad(out, [query, *both], torch.empty_like(out))
    assert [g.shape for g in grads] == [x.shape for x in (query, *both)]
    assert {g.dtype for g in grads} == {torch.bfloat16}


def test_no_mask_of_the_whole_block_is_built() -> None:
    """Of a longer text, nothing has as many elements as a [T, T] mask."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for each in found if isinstance(found, tuple) else (found,):
                if isinstance(each, Tensor):
                    largest = max(largest, each.numel())
            return found

    length = 4096
    with FakeTensorMode(), Watch():
        query, *both = (
            torch.empty(1, 2, length, 16, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(5)
        )
        out = ttt_attention(query, both[:2], both[2:], None, None, FlashEngine())
        out.backward(torch.empty_like(out))
    assert 0 < largest <= query.numel()
