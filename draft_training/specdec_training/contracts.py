"""What the parts of the trainer hand each other: token batches, feature batches, their source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Document:
    """Where an example stands in a packed batch.

    Attributes:
        example: Its number in the prepared data.
        row: Row of the batch.
        start: First slot.
        stop: Slot after its last one.
    """

    example: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Examples packed into rows of equal width.

    Attributes:
        token_ids: [B, T] int64; padding holds 0.
        loss_mask: [B, T] bool, tokens that the assistant wrote; False in padding.
        documents: Every example in the batch, in order.
    """

    token_ids: Tensor
    loss_mask: Tensor
    documents: tuple[Document, ...]

    @property
    def filled(self) -> int:
        """Slots that are no padding."""
        return sum(document.stop - document.start for document in self.documents)

    def spans(self) -> list[list[tuple[int, int]]]:
        """For every row the [start, stop) of its documents, as the attention takes them."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(len(self.token_ids))]
        for document in self.documents:
            found[document.row].append((document.start, document.stop))
        return found


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """A token batch with what the target says about it.

    Attributes:
        tokens: The batch that the target has read.
        aux: [B, T, F] the tapped layers' hidden states, concatenated.
        last_hidden: [B, T, Ht] what the target's output matrix reads.
    """

    tokens: TokenBatch
    aux: Tensor
    last_hidden: Tensor


class FeatureSource(Protocol):
    """Where features come from: the target itself (online) or a folder (offline)."""

    def features(self, batch: TokenBatch) -> FeatureBatch:
        """The batch's features, on the batch's device."""
        ...

    def target_logits(self, last_hidden: Tensor) -> Tensor:
        """[..., V] the target's logits for hidden states [..., Ht], without gradient."""
        ...
