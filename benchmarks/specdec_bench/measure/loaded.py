"""The model of a run: loaded in one dtype, augmented, with its drafts; and torch's threads."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import GenerationConfig

from specdec.api import augment, restore
from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL, Kind, head_path
from specdec.loading import TOY, load_model
from specdec_bench.checks.text import ReferenceModel
from specdec_bench.measure.options import RunOptions


def is_on_cpu(device: str) -> bool:
    """Whether what `--device` names is the processor."""
    if device == "auto":
        return not torch.cuda.is_available()
    return device.partition(":")[0] == "cpu"


@contextmanager
def torch_threads(device: str, wanted: int | None = None) -> Iterator[None]:
    """Torch's threads for the length of a `with` block.

    Args:
        device: As `--device` has it.
        wanted: How many; None takes one on a CPU and else leaves them alone.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or (1 if is_on_cpu(device) else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Loaded:
    """The target in one dtype, augmented, with its own generation settings taken away."""

    def __init__(self, options: RunOptions, dtype: str) -> None:
        self.dtype = dtype
        self.model = load_model(options.target, dtype, options.device)
        self.ends = frozenset(end_ids(self.model))
        clear_generation_config(self.model)
        augment(self.model, "none")
        self.drafts = drafts_of(options, self)
        self.reference = ReferenceModel()

    def close(self) -> None:
        """Lets go of the model."""
        restore(self.model)
        self.model, self.drafts, self.reference = None, {}, ReferenceModel()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def end_ids(model: Any) -> list[int]:
    """Ids that end a text, as the generation settings or the configuration have them."""
    found = model.generation_config.eos_token_id
    found = model.config.get_text_config().eos_token_id if found is None else found
    return list(found) if isinstance(found, list | tuple) else [] if found is None else [found]


def clear_generation_config(model: Any) -> None:
    """Leaves greedy decoding without an end: warpers and processors would change the text's law."""
    pad = model.generation_config.pad_token_id
    if pad is None:
        pad = next(iter(end_ids(model)), 0)
    model.generation_config = GenerationConfig(pad_token_id=pad)
    model.generation_config.eos_token_id = None


def head_of(options: RunOptions) -> str | None:
    """Draft head of the arms that take one: as given, or the toy's."""
    return options.head or (str(head_path()) if options.target == TOY else None)


def drafts_of(options: RunOptions, loaded: Loaded | None) -> dict[Kind, Callable[[], Any]]:
    """What arms draft with, made when first asked for."""
    made: list[Any] = []
    found: dict[Kind, Callable[[], Any]] = {}
    head = head_of(options)
    if head is not None:
        found[DRAFT_HEAD] = lambda: head

    def draft() -> Any:
        if loaded is None:
            return None
        if not made:
            if options.draft is None:
                model = first_layers(loaded.model).to(loaded.model.device)
            else:
                model = load_model(options.draft, loaded.dtype, str(loaded.model.device))
            clear_generation_config(model)
            made.append(model)
        return made[0]

    if options.draft is not None or options.target == TOY:
        found[DRAFT_MODEL] = draft
    return found


def first_layers(model: Any, layers: int = 1) -> Any:
    """The target with its first `layers` layers only; embeddings, norm and head are copies.

    Where no smaller model of the family is at hand. Nobody trained it as a draft, so it agrees with
    the target less than a real one would.
    """
    config = deepcopy(model.config)
    config.num_hidden_layers = layers
    draft = type(model)(config).to(model.dtype).eval()
    draft.load_state_dict(model.state_dict(), strict=False)
    return draft
