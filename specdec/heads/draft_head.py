"""What drafting and training ask of whatever drafts level by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class DraftSteps(Protocol):
    """What drafts level by level behind a cache of its own: a draft head, or a whole model.

    A state is what `begin` made; between rounds it stands at the last verified token.
    """

    def begin(self, rows: int, capacity: int) -> Any:
        """An empty state for a batch, with room for this many tokens a row at first."""
        ...

    def commit(
        self, state: Any, tokens: Tensor, features: Tensor | None, counts: Sequence[int]
    ) -> Tensor:
        """Takes verified tokens in; log-probabilities [B, D] of what follows each row's last one.

        Args:
            state: Of this batch, without drafted levels.
            tokens: [B, n] int64, right-padded.
            features: [B, n, H] of the token before each, as `DraftHead.features` made them; None
                for what reads none.
            counts: Tokens of each row, 0 for a row that stands still.
        """
        ...

    def expand(self, state: Any, tokens: Tensor, parents: Tensor) -> Tensor:
        """Goes one level deeper; log-probabilities [B, W, D] below its nodes.

        Args:
            state: Of this batch.
            tokens: [B, W] target ids of the level's nodes.
            parents: [B, W] which node of the level above each hangs under; 0 in the first level.
        """
        ...

    def rewind(self, state: Any) -> None:
        """Forgets all levels since the last `commit`."""
        ...

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Ids of the target for ids that can be drafted, of any shape."""
        ...


class HeadConfig(Protocol):
    """What is asked of a head's configuration to tell whose head it is."""

    @property
    def hidden_size(self) -> int:
        """Width H of the head."""
        ...

    @property
    def target_hidden_size(self) -> int:
        """Width of the target."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids of the target that it reads."""
        ...

    @property
    def aux_output_layers(self) -> tuple[int, ...]:
        """Layers of the target whose output it reads, as `Needs.taps` counts them."""
        ...


class DraftHead(DraftSteps, Protocol):
    """A trained head that drafts from the target's hidden states; a new kind implements this once.

    A head that drafts all levels in one pass answers `expand` from what it worked out in `commit`.
    It is a `torch.nn.Module`, too: a trainer needs its parameters.

    Attributes:
        t2d: [V] bool, target ids that it can draft; None for all.
        lm_head: The output matrix [D, H], as a linear layer; None before `attach` lends one.
    """

    t2d: Tensor | None
    lm_head: nn.Linear | None

    @property
    def config(self) -> HeadConfig:
        """Its shape."""
        ...

    @property
    def step_weight(self) -> Tensor:
        """The largest matrix that a level goes through, but for `lm_head`; where the head lies."""
        ...

    def features(self, aux: Tensor) -> Tensor:
        """What it makes of the target's concatenated hidden states [..., F]: [..., H]."""
        ...

    def unroll(
        self,
        token_ids: Tensor,
        features: Tensor,
        steps: int,
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        recompute: bool = False,
        wanted: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """States [B, T, H] that `lm_head` reads, of every training step.

        Step s at slot t predicts token t + 2 + s.

        Args:
            token_ids: [B, T] int64.
            features: [B, T, H].
            steps: How many.
            spans: Documents packed into each row, as [start, stop); None for one a row.
            recompute: Keep no activations inside a step.
            wanted: [N] int64 slots, `row * T + t`, whose states are wanted; None for all.
        """
        ...

    def attach(self, embeddings: Tensor, output_embeddings: Tensor | None = None) -> None:
        """Shares the target's embeddings [V, H], and its output matrix where the head has none.

        Raises:
            ConfigError: Their sizes do not fit.
        """
        ...

    def unattached(self) -> Self:
        """The same layers without what a target lent: this head stays as it is."""
        ...

    def float(self) -> Self:
        """The head in float32."""
        ...
