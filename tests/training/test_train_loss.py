"""The loss: alignment, normalisation, independence of padding, packing and splitting."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from train_helpers import VOCAB, Example, make_examples, make_head, make_target

from specdec_training.contracts import FeatureBatch, TokenBatch
from specdec_training.data.batches import collate
from specdec_training.features.online import OnlineFeatures
from specdec_training.objective import losses
from specdec_training.objective import teacher as teacher_module
from specdec_training.objective.batch import (
    HeadWithLoss,
    LossPlan,
    draft_ids_of,
    spans_of,
    taught_batch,
)
from specdec_training.objective.losses import LossJob, simulated_length, soft_target_loss
from specdec_training.objective.teacher import Slots, likeliest, make_teacher

STEPS = 3


class World:
    """A target and a head in float64."""

    def __init__(self, draft: int = 32) -> None:
        self.target = make_target().double()
        self.head = make_head(self.target, draft).double()
        self.source = OnlineFeatures(self.target, self.head.config.aux_output_layers)
        self.module = HeadWithLoss(self.head, STEPS)

    def loss(
        self, batches: list[TokenBatch], plan: LossPlan | None = None, source: Any = None
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of a global batch in these parts."""
        plan = plan or LossPlan(STEPS)
        parts = [
            taught_batch(b, source or self.source, plan, draft_ids_of(self.head)) for b in batches
        ]
        counts = torch.stack([p.teacher.counts for p in parts]).sum(0).double()
        slots = torch.tensor(float(sum(p.tokens.token_ids.numel() for p in parts)))
        self.head.zero_grad()
        total = 0.0
        mix = torch.full((STEPS,), 0.3, dtype=torch.float64)
        for p in parts:
            job = LossJob(p.teacher, plan.scale(counts, slots), plan.kind, mix)
            loss, _ = self.module(p.tokens.token_ids, p.aux, spans_of(p.tokens), job, p.wanted)
            loss.backward()
            total += float(loss.detach())
        grads = {n: p.grad.clone() for n, p in self.head.named_parameters() if p.grad is not None}
        return total, grads


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def close(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> bool:
    same = one[1].keys() == other[1].keys()
    return (
        same
        and abs(one[0] - other[0]) < 1e-9
        and all(torch.allclose(one[1][k], other[1][k], atol=1e-9, rtol=1e-7) for k in one[1])
    )


def batch_of(examples: list[Example], rows: list[tuple[int, ...]] | None = None) -> TokenBatch:
    return collate(rows or [(i,) for i in range(len(examples))], examples, 64)


def by_definition(world: World, examples: list[Example], kind: str) -> Tensor:
    """The loss, one document and one slot at a time."""
    head, target = world.head, world.target
    ids = draft_ids_of(head)
    sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(STEPS)], [0] * STEPS
    for example in examples:
        tokens = torch.tensor([example.token_ids])
        output = target(tokens, output_hidden_states=True)
        aux = torch.cat([output.hidden_states[i + 1] for i in head.config.aux_output_layers], -1)
        states = head.unroll(tokens, head.features(aux.detach()), STEPS)
        for step, state in enumerate(states):
            logits = head.logits(state)[0]
            for slot in range(tokens.shape[1] - 2 - step):
                wanted, teacher = slot + 2 + step, output.logits[0, slot + 1 + step].detach()
                inside = ids is None or bool((ids == teacher.argmax()).any())
                if not example.loss_mask[wanted] or not inside:
                    continue
                p = (teacher if ids is None else teacher[ids]).softmax(-1)
                log_q = logits[slot].log_softmax(-1)
                ce = -(p * log_q).sum()
                kl = ce + (p * p.log()).sum()
                tv = (p - log_q.exp()).abs().sum() / 2
                value = {"ce": ce, "kl": kl, "tv": tv, "lk": 0.3 * kl + 0.7 * tv}[kind]
                sums[step] = sums[step] + value
                counts[step] += 1
    return sum(0.8**s * sums[s] / max(counts[s], 1) for s in range(STEPS))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["ce", "kl", "tv", "lk"])
@pytest.mark.parametrize("draft", [32, VOCAB])
def test_loss_and_gradient_are_those_of_the_definition(
    kind: Any, draft: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "_SIZES", 999)  # so that slots without a loss are left out
    world = World(draft)
    examples = make_examples(4, 14)
    found = world.loss([batch_of(examples, [(0, 2), (3, 1)])], LossPlan(STEPS, kind))
    world.head.zero_grad()
    wanted = by_definition(world, examples, kind)
    wanted.backward()
    grads = {n: p.grad for n, p in world.head.named_parameters() if p.grad is not None}
    assert close(found, (wanted.item(), grads))


@pytest.mark.parametrize("keep", [0, 2**30])
@pytest.mark.parametrize("chunk", [200, 2**18])
@pytest.mark.parametrize("tile", [1, 300])
def test_chunks_and_kept_probabilities_change_nothing(
    world: World, keep: int, chunk: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(make_examples(5, 30))
    wanted = world.loss([batch])
    monkeypatch.setattr(teacher_module, "_CHUNK_CPU", chunk)
    monkeypatch.setattr(losses, "_TILE_CPU", tile)
    assert close(world.loss([batch], LossPlan(STEPS, keep_bytes=keep)), wanted)


def test_packed_is_unpacked(world: World) -> None:
    examples = make_examples(6, 20)
    wanted = world.loss([batch_of(examples)])
    assert close(world.loss([batch_of(examples, [(0, 3), (2, 1, 5), (4,)])]), wanted)


def test_padding_changes_nothing(world: World) -> None:
    examples = make_examples(4, 20)
    wanted = world.loss([batch_of(examples)])
    batch = collate([(i,) for i in range(4)], examples, 64, multiple=64)
    assert batch.token_ids.shape[1] == 64
    assert close(world.loss([batch]), wanted)


def test_split_into_micro_batches_changes_nothing(world: World) -> None:
    examples = make_examples(6, 20)
    wanted = world.loss([batch_of(examples)])
    parts = [collate(rows, examples, 64) for rows in ([(0,), (1,)], [(2,)], [(3, 4), (5,)])]
    assert close(world.loss(parts), wanted)


def test_recomputation_changes_nothing(world: World) -> None:
    batch = batch_of(make_examples(4, 20))
    wanted = world.loss([batch])
    world.module._recompute = True
    try:
        assert close(world.loss([batch]), wanted)
    finally:
        world.module._recompute = False


def test_average_over_all_slots_as_specforge(world: World) -> None:
    batch = batch_of(make_examples(4, 20))
    part = taught_batch(batch, world.source, LossPlan(STEPS), draft_ids_of(world.head))
    states = list(world.head.unroll(batch.token_ids, world.head.features(part.aux), STEPS,
                                    batch.spans()))  # fmt: skip
    assert world.head.lm_head is not None
    _, sums = soft_target_loss(
        states, world.head.lm_head.weight, LossJob(part.teacher, torch.ones(STEPS))
    )
    weights = 0.8 ** torch.arange(STEPS, dtype=torch.float64)
    wanted = float((sums[0] * weights).sum() / batch.token_ids.numel())
    assert world.loss([batch], LossPlan(STEPS, over_all=True))[0] == pytest.approx(wanted, rel=1e-6)


class Perturbed:
    """A source whose target says something else after one token."""

    def __init__(self, source: OnlineFeatures, position: int) -> None:
        self._source, self._position = source, position

    def features(self, batch: TokenBatch) -> FeatureBatch:
        found = self._source.features(batch)
        last = found.last_hidden.clone()
        last[0, self._position] = last[0, self._position].flip(0) * 3
        return dataclasses.replace(found, last_hidden=last)

    def target_logits(self, last_hidden: Tensor) -> Tensor:
        return self._source.target_logits(last_hidden)


def test_only_the_targets_of_unmasked_tokens_matter() -> None:
    world = World(VOCAB)
    ids = make_examples(1, 40, seed=9)[0].token_ids[:12]
    assert len(ids) == 12
    mask = [False, True, True, False, True, True, False, False, True, True, True, False]
    batch = batch_of([Example(ids, mask)])
    wanted = world.loss([batch])
    for position in range(12):
        learnt = position + 1 < 12 and mask[position + 1] and position >= 1
        found = world.loss([batch], source=Perturbed(world.source, position))
        assert close(found, wanted) != learnt, position


def test_a_batch_without_anything_to_learn(world: World) -> None:
    example = Example([1, 2, 3, 4, 5, 6], [False] * 6)
    loss, grads = world.loss([batch_of([example])])
    assert loss == 0
    assert set(grads) == {n for n, p in world.head.named_parameters() if p.requires_grad}
    assert all(not grad.any() for grad in grads.values())


def test_slots_of_short_documents() -> None:
    examples = [Example([1, 2], [True, True]), Example([3, 4, 5, 6], [True] * 4)]
    slots = Slots.of(collate([(0, 1)], examples, 64), STEPS)
    # The longer document starts at slot 2; its token 2 is predicted from slot 0, token 3 from both.
    assert slots.position.tolist() == [3, 4]
    assert slots.room.tolist() == [1, 2]
    assert slots.counts == (2, 1, 0)


def test_slots_that_a_loss_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before a learnt token, as deep as the steps go; never the document before."""
    monkeypatch.setattr(teacher_module, "_SIZES", 999)
    mask = [False] * 12 + [True, True] + [False] * 6
    prompt = Example(list(range(20)), mask)
    slots = Slots.of(collate([(0, 1)], [Example([1, 2, 3], [True] * 3), prompt], 64), STEPS)
    reached = slots.reached(23)
    assert reached is not None
    # Token 2 from slot 0; tokens 12 and 13 of the document at slot 3 from its slots 8 to 11.
    assert sorted(reached.tolist()) == [0, 11, 12, 13, 14]
    every = collate([(0,)], [Example(list(range(100)), [True] * 100)], 128)
    assert Slots.of(every, STEPS).reached(100) is None
    monkeypatch.setattr(teacher_module, "_SIZES", 3)
    rounded = slots.reached(23)
    assert rounded is not None
    assert len(set(rounded.tolist())) == 8
    assert set(reached.tolist()) < set(rounded.tolist())
    nothing = collate([(0,)], [Example([1, 2, 3], [False] * 3)], 64)
    assert Slots.of(nothing, STEPS).reached(3) is None


def test_a_prompt_costs_no_more_than_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slots are left out, and nothing else changes."""
    monkeypatch.setattr(teacher_module, "_SIZES", 999)
    world = World()
    examples = [Example(e.token_ids, [i > 9 for i in range(len(e.token_ids))])
                for e in make_examples(5, 20)]  # fmt: skip
    batch = batch_of(examples, [(0, 3), (2, 1), (4,)])
    part = taught_batch(batch, world.source, LossPlan(STEPS), draft_ids_of(world.head))
    assert part.wanted is not None
    assert len(part.wanted) < batch.token_ids.numel() / 2
    found = world.loss([batch])
    monkeypatch.setattr(Slots, "reached", lambda *_: None)
    assert close(found, world.loss([batch]))


@pytest.mark.parametrize("size", [1, 63, 64, 640, 4096])
def test_likeliest_is_argmax(size: int) -> None:
    """Also the first of several."""
    logits = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(size))
    for found in (logits, logits.round(), logits.bfloat16(), torch.zeros_like(logits)):
        assert torch.equal(likeliest(found), found.argmax(-1))


def test_features_of_an_fp32_target_in_bf16() -> None:
    target = make_target()
    batch = batch_of(make_examples(3, 20))
    for double in (False, True):
        target = target.double() if double else target
        wanted, found = (OnlineFeatures(target, (0, 1), low=low).features(batch)
                         for low in (None, torch.bfloat16))  # fmt: skip
        assert found.aux.dtype == wanted.aux.dtype
        assert torch.equal(found.aux, wanted.aux) == double
        torch.testing.assert_close(found.last_hidden, wanted.last_hidden, atol=0.1, rtol=0.1)


def test_accuracy_and_expected_acceptance(world: World) -> None:
    """A head that says what the target says agrees everywhere."""
    target = world.source
    batch = batch_of(make_examples(3, 20))
    full = World(VOCAB)
    found = full.source.features(batch)
    slots = Slots.of(batch, 1)
    teacher = make_teacher(target, found.last_hidden, slots, 1, None, 2**30)
    # The state at slot p - 1 is what the output matrix makes the distribution at p from.
    states = torch.zeros_like(found.last_hidden).flatten(0, 1)
    states[slots.position - 1] = found.last_hidden.flatten(0, 1)[slots.position]
    weight = full.target.lm_head.weight
    _, sums = soft_target_loss(
        [states.view_as(found.last_hidden)], weight, LossJob(teacher, torch.ones(1))
    )
    count = float(slots.counts[0])
    assert sums[1].item() == count
    assert sums[2].item() == pytest.approx(count, rel=1e-6)


def test_simulated_length() -> None:
    assert simulated_length([1.0, 1.0, 1.0]) == 4
    assert simulated_length([0.5, 0.5]) == 1.75
    assert simulated_length([0.0, 1.0]) == 1


def test_bfloat16_autocast_is_close() -> None:
    target = make_target()
    head = make_head(target)
    source = OnlineFeatures(target, head.config.aux_output_layers)
    batch = batch_of(make_examples(4, 20))
    part = taught_batch(batch, source, LossPlan(STEPS), draft_ids_of(head))
    module = HeadWithLoss(head, STEPS)
    job = LossJob(part.teacher, LossPlan(STEPS).scale(part.teacher.counts, torch.tensor(1.0)))
    wanted, _ = module(batch.token_ids, part.aux, batch.spans(), job)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = module(batch.token_ids, part.aux, batch.spans(), job)
    found.backward()
    assert float(found) == pytest.approx(float(wanted), rel=0.05)
