"""AdamW, its schedule, and the guard that keeps bad gradients from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import ConfigError, SpecdecError
from specdec_training.run.options import TrainOptions


def make_optimizer(head: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over the head's trainable parameters; vectors are never decayed."""
    found = [p for p in head.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in found if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in found if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in found)
    return torch.optim.AdamW(groups, lr=options.lr or 1e-4, betas=options.betas, fused=fused)


def lr_factor(share: float, warmup: float, final: float) -> float:
    """Share of the peak learning rate when `share` of the run is over: linear, then a cosine."""
    if share < warmup:
        return share / warmup
    along = min(max((share - warmup) / max(1 - warmup, 1e-9), 0.0), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * along)) / 2


def set_lr(optimizer: Any, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: Any, head: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as tensors, by parameter name."""
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    state: Mapping[Any, Mapping[str, Any]] = optimizer.state
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, values in state.items()
        for key, value in values.items()
    }


def load_optimizer_tensors(optimizer: Any, head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives the optimiser the state that `optimizer_tensors` took.

    Raises:
        ConfigError: A parameter is unknown, or a tensor has another shape.
    """
    parameters = dict(head.named_parameters())
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or (part != "step" and tensor.shape != parameter.shape):
            raise ConfigError(f"the checkpoint's optimiser state {key!r} fits no parameter")
        device = parameter.device if part != "step" or _fused(optimizer) else torch.device("cpu")
        optimizer.state[parameter][part] = tensor.to(device)


def _fused(optimizer: Any) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))


class Guard:
    """Counts steps that were skipped because a loss or a gradient was not finite.

    Args:
        most: Such steps in a row that are borne.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.skipped, self.in_a_row = 0, 0

    def passes(self, loss: float, norm: float) -> bool:
        """Whether the optimiser may step."""
        good = math.isfinite(loss) and math.isfinite(norm)
        self.in_a_row = 0 if good else self.in_a_row + 1
        self.skipped += not good
        return good

    def check(self, where: str) -> None:
        """Ends a run that does not recover.

        Raises:
            SpecdecError: Too many steps in a row were skipped.
        """
        if self.in_a_row > self._most:
            raise SpecdecError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite; "
                f"{where} names their examples. Lower --lr, or try --precision fp32"
            )
