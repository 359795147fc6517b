"""Draft models for measurements where no smaller model of the family is at hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any


def first_layers(model: Any, layers: int = 1) -> Any:
    """The target with its first `layers` layers only; embeddings, norm and head are copies.

    Nobody trained it as a draft, so it agrees with the target less than a real one would.
    """
    config = deepcopy(model.config)
    config.num_hidden_layers = layers
    draft = type(model)(config).to(model.dtype).eval()
    draft.load_state_dict(model.state_dict(), strict=False)
    return draft
