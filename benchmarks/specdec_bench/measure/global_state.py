"""What a run changes for the whole process, and gives back: a library must leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging


@contextmanager
def as_before() -> Iterator[None]:
    """Torch's random numbers and the verbosity of transformers are afterwards what they were.

    Arms seed the generators for every sampled answer, and loading a model silences the library.
    """
    verbosity = logging.get_verbosity()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
