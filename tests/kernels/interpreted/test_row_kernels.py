"""Loss, picks, norm and rotary embedding in Triton, run by its interpreter, against plain torch."""

from __future__ import annotations

import pytest
import torch

from helpers.kernel_rows import awkward_logits, broken_logits, projections
from specdec_kernels import (
    Given,
    expand_topk,
    rms_norm,
    rotate_into_cache,
    row_argmax,
    sampled_picks,
    soft_cross_entropy,
)

BOTH = ("triton", "reference")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1, 7, 2048, 5000])
def test_row_argmax(dtype: torch.dtype, size: int) -> None:
    several = [awkward_logits(3, size, dtype), awkward_logits(size, 4, dtype).T]
    for logits in [*several, broken_logits(size, dtype)] if size > 5 else several:
        found, wanted = (row_argmax(logits, backend=b) for b in BOTH)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "count"), [(9, 9), (300, 4), (4200, 10)])
def test_expansion(dtype: torch.dtype, size: int, count: int) -> None:
    logits = torch.cat([awkward_logits(2, size, dtype), broken_logits(size, dtype)])
    scores, offsets = torch.linspace(-3, 0, 8), torch.arange(size) * 2 + 1
    for target in (None, offsets):
        found, wanted = (expand_topk(logits, scores, target, count, backend=b) for b in BOTH)
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("size", [5, 3000])
def test_sampled_picks(size: int) -> None:
    """Softmax included: at any temperature, other tokens win when it is left out."""
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(2, 7, size, generator=generator) * 4
    scores[1, :6] = broken_logits(size, torch.float32) if size > 5 else 0.0
    noise = torch.empty(2, 3, size).exponential_(generator=generator)
    depth = torch.tensor([[0, 1, 1, 2, 2, 2, 2], [0, 1, 2, 1, 2, 1, 0]], dtype=torch.int32)
    for inputs in ((scores, noise), (scores.mT.contiguous().mT, noise.mT.contiguous().mT)):
        found, wanted = (sampled_picks(*inputs, depth, backend=b) for b in BOTH)
        assert torch.equal(found, wanted)
    assert len(set(found[0].tolist())) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("are_logits", [False, True])
@pytest.mark.parametrize("size", [37, 5000])
def test_loss(dtype: torch.dtype, are_logits: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    states = torch.randn(4, 2, 8, generator=generator).to(dtype)
    weight = torch.randn(size, 8, generator=generator).to(dtype)
    target = torch.randn(4, size, generator=generator) * 2
    target = target if are_logits else target.softmax(-1) / 2  # half the mass: no distribution
    factor = torch.rand(4, 2, generator=generator)
    found = []
    for backend in BOTH:
        inputs = [x.clone().requires_grad_() for x in (states, weight)]
        loss, values = soft_cross_entropy(
            *inputs, Given(target, are_logits), factor, chunk=3, backend=backend
        )
        found.append((loss, values, *torch.autograd.grad(loss, inputs)))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_loss_where_a_block_of_the_vocabulary_cannot_be_said() -> None:
    """Infinities are not subtracted from each other: the rest of the row counts."""
    target = torch.randn(1, 9000, generator=torch.Generator().manual_seed(0))
    target[:, :5000] = float("-inf")
    states, weight = torch.ones(1, 1, 1), torch.zeros(9000, 1)
    found, wanted = (
        soft_cross_entropy(states, weight, Given(target, True), torch.ones(1, 1), backend=b)[1]
        for b in BOTH
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [24, 300])
def test_norm(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    states = torch.randn(3, 2, size, generator=generator).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    for shape in ((size,), (2, size)):
        weight = torch.randn(shape, generator=generator)
        for shown in (states, states.mT.contiguous().mT):
            found, wanted = (rms_norm(shown, weight.to(dtype), 1e-5, backend=b) for b in BOTH)
            torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [12, 64])
def test_rotation_into_the_cache(normed: bool, dim: int) -> None:
    found = []
    for backend in BOTH:
        given = projections(torch.float32, dim)
        query = rotate_into_cache(
            given["joined"], (given["cos"], given["sin"]), given["positions"], given["slots"],
            (given["keys"], given["values"]),
            (given["q_norm"], given["k_norm"]) if normed else None, 1e-5, backend=backend,
        )  # fmt: skip
        found.append((query, given["keys"], given["values"]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
