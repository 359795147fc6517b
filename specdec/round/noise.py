"""The noise of plain sampling, kept by step, and the generators that it comes from.

`torch.multinomial(p, 1)` draws exponential noise e and returns argmax(p / e). So the token that
plain sampling would emit as s-th is argmax(p / e_s), whatever the draft: with the noise of step s
kept on a tape, greedy decoding and sampling become the same pick, and the same seed gives the same
text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _generator(device: torch.device) -> Any:
    """What has the generator state of a device."""
    return torch.default_generator if device.type == "cpu" else _DeviceGenerator(device)


class _DeviceGenerator:
    """The default generator of an accelerator, with the two methods of `torch.Generator`."""

    def __init__(self, device: torch.device) -> None:
        self._module, self._device = torch.get_device_module(device), device

    def get_state(self) -> Tensor:
        return self._module.get_rng_state(self._device)  # type: ignore[no-any-return]

    def set_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state, self._device)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Puts torch's generators of the host and of `device` back where the block found them."""
    places = {device, torch.device("cpu")}
    before = [(generator := _generator(place), generator.get_state()) for place in places]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


class NoiseTape:
    """The exponential noise of plain sampling, step by step, kept until every row has used it.

    Step s holds the [B, V] float32 draw that plain `generate` makes for emitted token s.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self._batch, self._device = batch, device
        self._generator = _generator(device)
        self._draws: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}  # generator state before each draw
        self._drawn = 0
        self._left = False

    def step(self, step: int, vocab_size: int) -> Tensor:
        """[B, V] noise of emitted token `step`; draws as far as needed."""
        while not self._left and self._drawn <= step:
            self._states[self._drawn] = self._generator.get_state()
            self._draws[self._drawn] = self._draw(vocab_size)
            self._drawn += 1
        if self._left and step not in self._draws:  # off the tape: drawn when it is asked for
            self._draws[step] = self._draw(vocab_size)
        return self._draws[step]

    def levels(self, starts: Sequence[int], count: int, vocab_size: int) -> Tensor:
        """[B, count, V] noise of `count` steps of each row, from its own `starts[row]` on."""
        # 1. Every step that a row stands at, once.
        rows = [range(start, start + count) for start in starts]
        steps = sorted({step for row in rows for step in row})
        draws = torch.stack([self.step(step, vocab_size) for step in steps])  # [S, B, V]
        # 2. Of each, the row's own part.
        place = {step: index for index, step in enumerate(steps)}
        index = torch.tensor([[place[step] for step in row] for row in rows], device=draws.device)
        return draws[index, torch.arange(len(starts), device=draws.device)[:, None]]

    def _draw(self, vocab_size: int) -> Tensor:
        draw = torch.empty(self._batch, vocab_size, dtype=torch.float32, device=self._device)
        return draw.exponential_(1)

    def leave(self) -> None:
        """Gives up the law of the seed: others draw from the generator too, in their own order.

        Steps are still drawn once each, but the generator stays where the call left it.
        """
        self._left = True
        self._states.clear()

    def release(self, below: int) -> None:
        """Forgets the draws before step `below`."""
        for step in [s for s in self._draws if s < below]:
            del self._draws[step]
            self._states.pop(step, None)

    def finish(self, steps: int) -> None:
        """Leaves the generator where `steps` draws of plain `generate` would leave it."""
        if steps < self._drawn and not self._left:
            self._generator.set_state(self._states[steps])
