"""Fused linear and soft-target loss, against dense autograd; and the trainer's own loss."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from specdec_kernels import Given, KernelError, Projected, SoftTarget, soft_cross_entropy
from specdec_training.objective.losses import LossJob, loss_by_kernel, soft_target_loss
from specdec_training.objective.teacher import Teacher

ROWS, STEPS, WIDTH, VOCAB = 11, 3, 8, 37


def plain(states: Tensor, weight: Tensor, q: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The loss with all logits at once; values without the entropies."""
    logits = states @ weight.T
    log_p = logits.log_softmax(-1)
    losses = -(q[:, None] * log_p).sum(-1)
    agreed = logits.argmax(-1) == q.argmax(-1)[:, None]
    accepted = torch.minimum(q[:, None], log_p.exp()).sum(-1)
    return (losses * factor).sum(), torch.stack([losses, agreed.to(losses.dtype), accepted])


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States, weight, hidden states and rows of a target, factors."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    states, weight = random(ROWS, STEPS, WIDTH), random(VOCAB, WIDTH)
    factor = torch.rand(ROWS, STEPS, generator=generator).to(dtype)
    factor[2], factor[:, 1] = 0, 0.25
    return (
        states.requires_grad_(), weight.requires_grad_(), random(ROWS, 5), random(VOCAB, 5), factor
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["probabilities", "logits", "hidden"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_loss_and_gradients_are_those_of_dense_autograd(
    dtype: torch.dtype, form: str, chunk: int | None
) -> None:
    states, weight, hidden, head, factor = case(dtype)
    logits = hidden @ head.T
    q = logits.softmax(-1)
    forms: dict[str, SoftTarget] = {
        "probabilities": Given(q),
        "logits": Given(logits, are_logits=True),
        "hidden": Projected(hidden, head),
    }
    loss, values = soft_cross_entropy(states, weight, forms[form], factor, chunk=chunk)
    wanted, wanted_values = plain(states, weight, q, factor)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss, wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(values[:3], wanted_values, atol=tolerance, rtol=tolerance)
    entropy = torch.special.entr(q).sum(-1)[:, None].expand(ROWS, STEPS)
    torch.testing.assert_close(values[3], entropy, atol=tolerance, rtol=tolerance)
    found = torch.autograd.grad(3 * loss, [states, weight])
    dense = torch.autograd.grad(3 * wanted, [states, weight])
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_a_target_that_is_no_distribution_keeps_its_gradient() -> None:
    """Rows of half the mass, or none at all, and tokens that the draft cannot say."""
    states, weight, hidden, head, factor = case(torch.float64)
    q = (hidden @ head.T).softmax(-1) / 2
    q[4] = 0
    loss, _ = soft_cross_entropy(states, weight, Given(q), factor)
    wanted, _ = plain(states, weight, q, factor)
    for one, other in zip(
        torch.autograd.grad(loss, [states, weight]),
        torch.autograd.grad(wanted, [states, weight]), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_a_gradient_is_a_new_tensor_and_is_taken_once() -> None:
    states, weight, hidden, head, factor = case(torch.float64)
    loss, values = soft_cross_entropy(states, weight, Projected(hidden, head), factor)
    assert not values.requires_grad
    first = torch.autograd.grad(loss, [states], retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, [states], retain_graph=True)[0], kept)
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(loss, [states], create_graph=True)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_the_trainer_s_loss_by_the_kernel(kind: Any) -> None:
    """What training computes on a GPU is what it computes on a CPU."""
    states, weight, hidden, head, _ = case(torch.float64)
    probs = (hidden @ head.T).softmax(-1)
    reached = torch.tensor([[1.0] * ROWS, [1.0] * 9 + [0.0] * 2, [0.0, *[1.0] * 8, 0.0, 0.0]])
    position = torch.arange(ROWS) + STEPS
    teacher = Teacher(position, reached.double(), None, probs, probs.argmax(-1), None, None)  # type: ignore[arg-type]
    job = LossJob(teacher, torch.tensor([0.5, 0.4, 0.3]).double(), kind)
    found, found_sums = loss_by_kernel(states, weight, job)
    rows = [torch.zeros(1, ROWS + STEPS, WIDTH, dtype=torch.float64) for _ in range(STEPS)]
    for step, row in enumerate(rows):
        row[0, position - 1 - step] = states[:, step]
    wanted, wanted_sums = soft_target_loss(rows, weight, job)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found_sums, wanted_sums)
    grads = (torch.autograd.grad(x, [states, weight]) for x in (found, wanted))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


class Memory(TorchDispatchMode):
    """Bytes of all storages that operations made and somebody still holds, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor):
                self._hold(each.untyped_storage())
        return found

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def drop() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, drop)


def test_the_memory_of_a_real_batch() -> None:
    """8,192 positions and 32,000 tokens, on tensors without numbers: the shapes decide."""
    rows, vocab, width = 8192, 32000, 64
    peaks = []
    for fused in (False, True):
        with FakeTensorMode(), Memory() as memory:
            states, hidden = (
                torch.empty(rows, 1, width, requires_grad=True),
                torch.empty(rows, width),
            )
            weight, head = torch.empty(vocab, width, requires_grad=True), torch.empty(vocab, width)
            factor = torch.empty(rows, 1)
            if fused:
                loss, _ = soft_cross_entropy(
                    states, weight, Projected(hidden, head), factor, chunk=1024
                )
            else:
                loss, _ = plain(states, weight, (hidden @ head.T).softmax(-1), factor)
            loss.backward()
        peaks.append(memory.most / 2**30)
    assert peaks[0] > 3.9  # GiB: four tensors of all logits, at least
    assert peaks[1] < 1.0


def test_shapes_are_checked() -> None:
    states, weight, hidden, head, factor = case(torch.float32)
    target = Projected(hidden, head)
    with pytest.raises(KernelError, match=r"\[N, K, H\] and \[V, H\]"):
        soft_cross_entropy(states[0], weight, target, factor)
    with pytest.raises(KernelError, match=r"factor must be \[11, 3\]"):
        soft_cross_entropy(states, weight, target, factor[:, 0])
    with pytest.raises(KernelError, match="at least 1, got 0"):
        soft_cross_entropy(states, weight, target, factor, chunk=0)
