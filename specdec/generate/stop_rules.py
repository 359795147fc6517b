"""Ends rows exactly where plain `generate` would, token by token, before anything is committed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import Tensor

from specdec.contracts import BatchState
from specdec.round.pickers import raise_unless_finite
from specdec.round.prefix import PrefixIds
from specdec.round.verify import HostVerdict

Criteria = Callable[[Tensor, "tuple[Tensor, ...] | None"], Tensor]
"""Stopping criteria: (ids [1, S], scores or None) -> done [1] bool."""


class HostStopRules:
    """Stop rules of one call.

    Args:
        max_new_tokens: Most tokens of a row, the prompt not counted.
        eos_ids: Tokens that end a row.
        criteria: Everything else (stop strings, time, the user's own), or None.
        prefix: Ids shown to `criteria`.
        scores: The scores tuple that plain `generate` would show for a row.
    """

    def __init__(
        self,
        max_new_tokens: int,
        eos_ids: Collection[int],
        criteria: Criteria | None,
        prefix: PrefixIds,
        scores: Callable[[int], tuple[Tensor, ...] | None],
    ) -> None:
        self._max_new_tokens, self._eos_ids = max_new_tokens, frozenset(eos_ids)
        self._criteria, self._prefix, self._scores = criteria, prefix, scores
        self._answers: dict[tuple[int, int], bool] = {}

    def is_final(self, row: int, index: int, token: int) -> bool:
        """Whether emitted token number `index` ends `row`. Criteria are asked once a token."""
        raise_unless_finite(token)
        answer = self._answers.get((row, index))
        if answer is None:
            answer = token in self._eos_ids or index + 1 >= self._max_new_tokens
            if self._criteria is not None:  # asked even so: it may count its calls
                self._prefix.write(row, index, token)
                ids = self._prefix.row(row, index + 1)
                answer = bool(self._criteria(ids, self._scores(row)).any()) or answer
            self._answers[row, index] = answer
        return answer

    def cut(self, verdict: HostVerdict, state: BatchState) -> HostVerdict:
        """Drops everything after each row's last token and marks ended rows inactive."""
        tokens, paths = [], []
        for row, row_tokens in enumerate(verdict.tokens):
            kept = 0
            start = state.emitted(row)
            while state.active[row] and kept < len(row_tokens):
                kept += 1
                if self.is_final(row, start + kept - 1, row_tokens[kept - 1]):
                    state.active[row] = False
            tokens.append(row_tokens[:kept])
            # The last emitted token is never in the cache (I1).
            paths.append(verdict.paths[row][: max(kept - 1, 0)])
        self._answers.clear()
        # A row that ends inside its path still owes its last token to the draft.
        sources = verdict.sources or [[0] * len(path) for path in verdict.paths]
        return replace(verdict, tokens=tokens, paths=paths, sources=sources)
