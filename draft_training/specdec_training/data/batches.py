"""Which examples a step sees: a sampler that resumes exactly, packing into rows, collation.

An epoch shuffles the examples, packs them into rows of equal width and shuffles the rows. All
processes know the whole plan; each takes every n-th row of a global batch, so that global batches
do not depend on how many processes there are.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.errors import ConfigError
from specdec_training.contracts import Document, TokenBatch

_WINDOW = 1024  # examples packed together; a larger one fills rows hardly better
_LEAST_TOKENS = 3  # slot 0 predicts token 2


class AnyExample(Protocol):
    """What a row is made of; `specdec_training.data.prepared.Example` is one."""

    @property
    def token_ids(self) -> list[int]:
        """Ids of the target."""
        ...

    @property
    def loss_mask(self) -> list[bool]:
        """Which of them are to be predicted."""
        ...


@dataclass(frozen=True)
class Sizes:
    """What packing needs to know of the examples.

    Attributes:
        lengths: [n] int64 tokens of each example, after cutting.
        learnt: [n] int64 how many of them are to be predicted and can be.
    """

    lengths: NDArray[np.int64]
    learnt: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Any, most: int) -> Sizes:
        """Reads them off the examples' columns, or off the examples one by one.

        Args:
            most: Longer examples are cut at the end.
        """
        if hasattr(examples, "columns"):
            chunks = [(lengths, mask) for lengths, _, mask in examples.columns()]
        else:
            masks = [np.asarray(example.loss_mask, dtype=np.bool_) for example in examples]
            lengths = np.array([len(mask) for mask in masks], dtype=np.int64)
            chunks = [(lengths, np.concatenate(masks) if masks else np.zeros(0, np.bool_))]
        found = [_sizes(lengths, mask, most) for lengths, mask in chunks]
        empty = np.zeros(0, np.int64)
        return cls(
            np.concatenate([empty, *(part.lengths for part in found)]),
            np.concatenate([empty, *(part.learnt for part in found)]),
        )


def _sizes(lengths: NDArray[np.int64], mask: NDArray[np.bool_], most: int) -> Sizes:
    owner = np.repeat(np.arange(len(lengths)), lengths)
    order = np.arange(len(mask)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    counted = mask & (order >= _LEAST_TOKENS - 1) & (order < most)
    learnt = np.bincount(owner[counted], minlength=len(lengths))
    return Sizes(np.minimum(lengths, most), learnt.astype(np.int64))


class RowSampler:
    """Endless rows of examples, in an order that depends on the seed alone.

    Args:
        sizes: Of the examples; those with nothing to predict are left out.
        max_length: Width of a row.
        seed: Decides the order; every pass over the rows has another.

    Raises:
        ConfigError: No example has anything to predict.
    """

    def __init__(self, sizes: Sizes, max_length: int, seed: int) -> None:
        self._lengths, self._width, self._seed = sizes.lengths.tolist(), max_length, seed
        self._used = [i for i, learnt in enumerate(sizes.learnt.tolist()) if learnt > 0]
        if not self._used:
            raise ConfigError(
                f"none of the {len(sizes.lengths)} examples has a token to predict; look at the "
                "loss mask with `specdec data doctor`"
            )
        self.epoch, self.position = 0, 0
        self._rows = self._packed(0)

    @property
    def unused(self) -> int:
        """Examples that have nothing to predict."""
        return len(self._lengths) - len(self._used)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the present epoch."""
        return len(self._rows)

    def next_rows(self, count: int) -> list[tuple[int, ...]]:
        """The next rows, as examples' numbers; a batch may reach into the next epoch."""
        found: list[tuple[int, ...]] = []
        while len(found) < count:
            if self.position == len(self._rows):
                self.epoch, self.position = self.epoch + 1, 0
                self._rows = self._packed(self.epoch)
            stop = min(self.position + count - len(found), len(self._rows))
            found += self._rows[self.position : stop]
            self.position = stop
        return found

    def state(self) -> dict[str, int]:
        """Where it stands, as plain JSON."""
        return {"seed": self._seed, "epoch": self.epoch, "position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
            ConfigError: The state is of another sampler.
        """
        seed, epoch, position = (state.get(name) for name in ("seed", "epoch", "position"))
        if seed != self._seed or type(epoch) is not int or type(position) is not int or epoch < 0:
            raise ConfigError(f"this is no state of a sampler with seed {self._seed}: {state!r}")
        rows = self._packed(epoch)
        if not 0 <= position <= len(rows):
            raise ConfigError(f"the sampler stood at row {position} of {len(rows)}")
        self.epoch, self.position, self._rows = epoch, position, rows

    def _packed(self, epoch: int) -> list[tuple[int, ...]]:
        chosen = random.Random(f"{self._seed} {epoch}")
        order = list(self._used)
        chosen.shuffle(order)
        rows: list[tuple[int, ...]] = []
        for start in range(0, len(order), _WINDOW):
            rows += pack(order[start : start + _WINDOW], self._lengths, self._width)
        chosen.shuffle(rows)
        return rows


def pack(examples: Sequence[int], lengths: Sequence[int], max_length: int) -> list[tuple[int, ...]]:
    """Rows of examples that fit into `max_length` tokens; the longest go first.

    Each goes into the row with the least room that still holds it.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for example in sorted(examples, key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[example], -1))
        if at == len(room):
            left, row = max_length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(example)
        bisect.insort(room, (left - lengths[example], row))
    return [tuple(row) for row in rows]


def own_batches(
    rows: Sequence[tuple[int, ...]], batch_rows: int, rank: int = 0, processes: int = 1
) -> list[list[tuple[int, ...]]]:
    """This process's rows of a global batch, in batches of `batch_rows`."""
    own = list(rows[rank::processes])
    return [own[start : start + batch_rows] for start in range(0, len(own), batch_rows)]


def collate(
    rows: Sequence[tuple[int, ...]],
    examples: Sequence[AnyExample],
    max_length: int,
    multiple: int = 1,
) -> TokenBatch:
    """The examples of these rows as a batch on the CPU, no wider than it needs to be.

    Args:
        rows: For each row of the batch, the numbers of the examples packed into it.
        max_length: Longer examples are cut at the end.
        multiple: The width becomes a multiple of it.
    """
    found = [[(i, examples[i]) for i in row] for row in rows]
    widths = [sum(min(len(e.token_ids), max_length) for _, e in row) for row in found]
    width = -(-max(widths, default=0) // multiple) * multiple
    token_ids = torch.zeros(len(rows), width, dtype=torch.long)
    loss_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    documents = []
    for row, members in enumerate(found):
        start = 0
        for number, example in members:
            ids, mask = example.token_ids[:max_length], example.loss_mask[:max_length]
            stop = start + len(ids)
            token_ids[row, start:stop] = torch.tensor(ids, dtype=torch.long)
            loss_mask[row, start:stop] = torch.tensor(mask, dtype=torch.bool)
            documents.append(Document(number, row, start, stop))
            start = stop
    return TokenBatch(token_ids, loss_mask, tuple(documents))
