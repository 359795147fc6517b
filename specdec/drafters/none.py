"""The loop without speculation: every round verifies the pending token alone."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.contracts import BatchState
from specdec.drafters.row import RowDrafter
from specdec.round.tree import TreeBatch


@dataclass(frozen=True)
class NoneConfig:
    """`none` has no options."""


class NoDraft(RowDrafter):
    """Proposes nothing; what it costs is what the loop costs."""

    Config = NoneConfig
    host_needs = False
    max_nodes = 0

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """Root-only trees, straight from the pending tokens."""
        return TreeBatch.roots(state.pending)
