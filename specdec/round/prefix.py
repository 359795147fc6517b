"""The text that processors and criteria are shown, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


class PrefixIds:
    """The ids that plain `generate` would show to processors and criteria, padding included.

    One row grows independently of the others; writing a token twice is harmless.
    """

    def __init__(self, input_ids: Tensor, max_new_tokens: int) -> None:
        batch, self.prompt_width = input_ids.shape
        self._capacity = self.prompt_width + max_new_tokens
        grown = min(self._capacity, self.prompt_width + 256)
        self._ids = input_ids.new_zeros(batch, grown)
        self._ids[:, : self.prompt_width] = input_ids
        self.device = input_ids.device

    def write(self, row: int, index: int, token: int) -> None:
        """Stores `token` as emitted token number `index` of `row`."""
        position = self.prompt_width + index
        if position >= self._ids.shape[1]:
            room = max(position + 1, 2 * self._ids.shape[1])
            extra = self._ids.new_zeros(self._ids.shape[0], room - self._ids.shape[1])
            self._ids = torch.cat([self._ids, extra], dim=1)
        self._ids[row, position] = token

    def row(self, row: int, emitted: int) -> Tensor:
        """[1, S] ids of `row` after `emitted` tokens."""
        return self._ids[row : row + 1, : self.prompt_width + emitted]
