"""Packing, sampling, splitting among processes, collation."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from train_helpers import Example, make_examples, make_head, make_target

from specdec.errors import ConfigError
from specdec_training.data.batches import RowSampler, Sizes, collate, own_batches, pack
from specdec_training.features.online import OnlineFeatures


def sampler(count: int = 200, width: int = 64, seed: int = 0) -> RowSampler:
    return RowSampler(Sizes.of(make_examples(count), width), width, seed)


def test_rows_fit_and_hold_every_example_once() -> None:
    lengths = [len(e.token_ids) for e in make_examples(300)]
    rows = pack(range(300), lengths, 64)
    assert Counter(i for row in rows for i in row) == Counter(range(300))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert sum(lengths) / (64 * len(rows)) > 0.9


def test_an_epoch_holds_every_example_once_and_the_next_one_differs() -> None:
    rows = sampler()
    first = rows.next_rows(rows.rows_per_epoch)
    assert Counter(i for row in first for i in row) == Counter(range(200))
    second = rows.next_rows(rows.rows_per_epoch)
    assert first != second
    assert rows.epoch == 1


@pytest.mark.parametrize("stop", [1, 7, 23, 90])
def test_state_resumes_exactly(stop: int) -> None:
    one, other = sampler(), sampler()
    one.next_rows(stop)
    other.restore(json.loads(json.dumps(one.state())))
    assert one.next_rows(70) == other.next_rows(70)


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed 1"):
        sampler(seed=1).restore(sampler(seed=0).state())
    with pytest.raises(ConfigError, match="row 9999"):
        sampler().restore({"seed": 0, "epoch": 0, "position": 9999})


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_a_global_batch(processes: int) -> None:
    rows = sampler().next_rows(6 * processes)
    parts = [own_batches(rows, 2, rank, processes) for rank in range(processes)]
    together = Counter(row for part in parts for batch in part for row in batch)
    assert together == Counter(rows)
    assert all(len(part) == 3 for part in parts)


def test_examples_without_anything_to_predict_are_left_out() -> None:
    examples = [Example([1, 2, 3, 4], [True, True, False, False]), *make_examples(5)]
    assert sampler_of(examples).unused == 1
    with pytest.raises(ConfigError, match="none of the 1 examples"):
        sampler_of(examples[:1])


def sampler_of(examples: list[Example]) -> RowSampler:
    return RowSampler(Sizes.of(examples, 64), 64, 0)


def test_sizes_from_columns_are_those_of_the_examples() -> None:
    examples = make_examples(20)

    class Columns(list):  # type: ignore[type-arg]
        def columns(self):  # type: ignore[no-untyped-def]
            import numpy as np

            for part in (self[:7], self[7:]):
                yield (
                    np.array([len(e.token_ids) for e in part]),
                    None,
                    np.array([m for e in part for m in e.loss_mask]),
                )

    one, other = Sizes.of(examples, 20), Sizes.of(Columns(examples), 20)
    assert one.lengths.tolist() == other.lengths.tolist()
    assert one.learnt.tolist() == other.learnt.tolist()
    assert one.learnt.tolist() == [sum(e.loss_mask[2:20]) for e in examples]


def test_collation_cuts_and_pads() -> None:
    examples = [Example([1, 2, 3, 4], [True] * 4), Example([5] * 9, [False] * 8 + [True])]
    batch = collate([(0, 1), (1,)], examples, 6, multiple=4)
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 0, 0], [5] * 6 + [0] * 6]
    assert batch.spans() == [[(0, 4), (4, 10)], [(0, 6)]]
    assert int(batch.loss_mask.sum()) == 4


def test_features_of_packed_documents_are_those_of_each_alone() -> None:
    target = make_target().double()
    head = make_head(target)
    source = OnlineFeatures(target, head.config.aux_output_layers)
    examples = make_examples(6)
    batch = collate([(0, 1, 2), (3, 4), (5,)], examples, 64)
    found = source.features(batch)
    for document in batch.documents:
        ids = torch.tensor([examples[document.example].token_ids])
        output = target(ids, output_hidden_states=True)
        at = document.row, slice(document.start, document.stop)
        wanted = torch.cat([output.hidden_states[i + 1] for i in head.config.aux_output_layers], -1)
        assert torch.allclose(found.aux[at], wanted[0])
        assert torch.allclose(source.target_logits(found.last_hidden[at]), output.logits[0])
