"""What training and drafting ask of a draft head; a new kind of head implements this once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from specdec.heads.eagle3.ttt_attention import Spans


class DraftHead(Protocol):
    """A head that drafts from the target's hidden states.

    `features` and `train_logits` are what a trainer needs; `begin`, `commit` and `expand` are what
    a drafter needs. A head that drafts all levels in one pass answers `expand` from what it worked
    out in `commit`.

    Attributes:
        config: Its shape; names the target layers that it reads.
    """

    config: Any

    def features(self, aux: Tensor) -> Tensor:
        """What the head makes of the target's concatenated hidden states [..., F]: [..., H]."""
        ...

    def train_logits(
        self, token_ids: Tensor, features: Tensor, steps: int, spans: Spans | None = None
    ) -> Iterator[Tensor]:
        """Logits [B, T, D] of every training step: step s at slot t predicts token t + 2 + s."""
        ...

    def begin(self, rows: int, capacity: int) -> Any:
        """An empty draft state for a batch, with room for this many tokens a row."""
        ...

    def commit(self, state: Any, tokens: Tensor, features: Tensor, counts: Sequence[int]) -> Tensor:
        """Takes verified tokens in; returns log-probabilities [B, D] of what follows."""
        ...

    def expand(self, state: Any, tokens: Tensor, parents: Tensor) -> Tensor:
        """Goes one level deeper; returns log-probabilities [B, W, D] below each of its nodes."""
        ...

    def rewind(self, state: Any) -> None:
        """Forgets all levels since the last `commit`."""
        ...
