"""What lets a run go on as if nothing had happened: random generators, its clock, signals."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(Python's and NumPy's generators as JSON, torch's as tensors)."""
    version, words, spare = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    plain = {
        "python": [version, list(words), spare],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return plain, tensors


def restore_random_state(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Sets all generators to what `random_state` took.

    Raises:
        ConfigError: The state is damaged.
    """
    try:
        version, words, spare = plain["python"]
        random.setstate((version, tuple(words), spare))
        name, keys, position, has_gauss, cached = plain["numpy"]
        np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
        torch.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise ConfigError(f"the checkpoint's random state cannot be used: {problem}") from problem


class Clock:
    """How much of a run is over, by steps or by time.

    Args:
        steps: Steps of the run, or None when `minutes` decide.
        minutes: Minutes of the run.
        spent: Seconds of earlier sessions.
        begun: Seconds that had passed when the schedule began.
    """

    def __init__(
        self, steps: int | None, minutes: float | None, spent: float = 0.0, begun: float = 0.0
    ) -> None:
        self._steps, self._seconds = steps, None if minutes is None else 60 * minutes
        self._spent, self._start = spent, time.monotonic()
        self.reserve, self.begun = 0.0, begun

    @property
    def elapsed(self) -> float:
        """Seconds so far, earlier sessions included."""
        return self._spent + time.monotonic() - self._start

    def begin(self) -> None:
        """The schedule begins now: a warm-up by time must not be over before there are steps."""
        self.begun = self.elapsed

    def share(self, step: int) -> float:
        """Share of the run that is over when `step` steps are done; 1 ends it.

        By time, `reserve` seconds are kept back for the last measurement.
        """
        if self._seconds is not None:
            room = self._seconds - self.reserve - self.begun
            return min((self.elapsed - self.begun) / room, 1.0) if room > 0 else 1.0
        return min(step / (self._steps or 1), 1.0)


class StopSignals:
    """Turns the first SIGTERM or Ctrl-C into a flag; the second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Takes the signals over; does nothing outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
