"""What a user can set when augmenting a model, as one frozen value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from specdec.errors import ConfigError
from specdec.round.tree import MAX_NODES
from specdec.stats import RoundRecord

Kernels = Literal["auto", "triton", "reference", "off"]
"""What computes the attention of token trees."""

DEFAULT_METHODS: Mapping[str, str] = {
    "tree": "lookahead",
    "chain": "prompt_lookup",
    "plain": "none",
}
"""Method where none is named, by how the target is verified; what lookahead wins as a chain has not
been measured."""


@dataclass(frozen=True)
class SpecConfig:
    """How an augmented model speculates.

    Attributes:
        method: Drafting method, or None for the default: lookahead with sizes chosen by a cost
            probe of about a second on this device (`specdec.cost`).
        options: Options of the method, by name.
        budget: Nodes beyond the root that a round may verify, 4,096 at most; None for the method's
            own size.
        on_round: Called with a `RoundRecord` after every round.
        trace: File to which one JSON line per round is appended; where it cannot be written, a
            warning says so and the call goes on.
        kernels: What computes the attention of token trees: fused kernels in "triton", their plain
            "reference" in torch, or a dense mask in the model's own attention ("off"). "auto" is
            Triton on a CUDA device and off elsewhere. A model that cannot be verified so keeps
            dense masks, and the mode's reason says why.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None
    on_round: Callable[[RoundRecord], None] | None = None
    trace: str | Path | None = None
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        """Checks the ranges; raises `ConfigError`."""
        is_size = hasattr(self.budget, "__index__") and not isinstance(self.budget, bool)
        if self.budget is not None and (not is_size or self.budget < 0):
            raise ConfigError(f"budget must be an integer >= 0, got {self.budget!r}")
        if self.budget is not None and self.budget > MAX_NODES:
            raise ConfigError(f"budget must be at most {MAX_NODES} nodes, got {self.budget!r}")
        if self.on_round is not None and not callable(self.on_round):
            raise ConfigError(f"on_round must be callable, got {self.on_round!r}")
        if not isinstance(self.options, Mapping):
            raise ConfigError(f"options must be a mapping, got {self.options!r}")
        if self.method is not None and not (isinstance(self.method, str) and self.method):
            raise ConfigError(f"method must be a name, got {self.method!r}")
        if self.kernels not in get_args(Kernels):
            raise ConfigError(
                f'kernels must be "auto", "triton", "reference" or "off", got {self.kernels!r:.60}'
            )
        if self.trace is not None:
            if not isinstance(self.trace, str | Path) or not str(self.trace):
                raise ConfigError(f"trace must be the path of a file, got {self.trace!r:.100}")
            object.__setattr__(self, "trace", Path(self.trace))
