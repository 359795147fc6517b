"""How gradients become steps: in one process, in many with full copies, or through DeepSpeed.

Accelerate hides most of the difference. What it does not hide is that DeepSpeed clips and steps
within its engine and keeps the optimiser's state in pieces, one in each process; here both look
alike, and a checkpoint holds whole tensors by parameter name, whoever wrote it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.artifacts.atomic_files import from_json, read_small
from specdec.errors import ConfigError
from specdec_training.run.optim import load_optimizer_tensors, optimizer_tensors, set_lr

_NOT_SAVED = "embed_tokens"  # the target's, and frozen
_STAGES = (1, 2)
_MOST_CONFIG_BYTES = 1 << 20


class Stepper(Protocol):
    """What the trainer asks of whoever updates the head.

    Attributes:
        module: To be called instead of the module that was given.
        optimizer: Used instead of the optimiser that was given.
    """

    module: Any
    optimizer: Any

    def part(self, is_last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one part of a global batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradient."""
        ...

    def clip(self, most: float) -> Tensor:
        """The whole gradient's norm; what `step` applies is scaled down to `most`."""
        ...

    def step(self, lr: float) -> None:
        """Updates the head."""
        ...

    def clear(self) -> None:
        """Forgets the gradient; called after every step, and instead of one."""
        ...

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(head, optimiser) as whole tensors by name, in the main process; all must call it."""
        ...

    def load(self, head: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave, in every process.

        Raises:
            ConfigError: They are of another head.
        """
        ...


def deepspeed_plugin(path: Path | None) -> Any:
    """What Accelerate takes to use DeepSpeed as a file says; None without a file.

    Raises:
        ConfigError: DeepSpeed is not installed, or the file cannot be read.
    """
    if path is None:
        return None
    from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available

    if not is_deepspeed_available():
        raise ConfigError("--deepspeed needs the package deepspeed: pip install deepspeed")
    try:
        config = from_json(read_small(path.expanduser(), _MOST_CONFIG_BYTES))
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise ConfigError(f"--deepspeed {str(path)!r} cannot be read: {reason}") from problem
    _settle(dict(config))
    return DeepSpeedPlugin(hf_ds_config=config)


def launched_with_deepspeed() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed."""
    from accelerate.utils import parse_flag_from_env

    return bool(parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))


def make_stepper(accelerator: Any, module: nn.Module, head: nn.Module, optimizer: Any) -> Stepper:
    """The stepper that the launcher asks for.

    Args:
        module: What is called in training; holds the head.
        head: What is trained, inside `module`.
        optimizer: Over the head's parameters.

    Raises:
        ConfigError: DeepSpeed is to do what it cannot do here; names the option.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return _PlainStepper(accelerator, module, head, optimizer)
    config = plugin.deepspeed_config
    if _settle(config):
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        module.forward = autocast(module.forward)
    return _ZeroStepper(accelerator, module, head, optimizer)


def _settle(config: dict[str, Any]) -> bool:
    """Checks and completes a DeepSpeed configuration; whether the head computes in bfloat16."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in _STAGES:
        raise ConfigError(
            f"zero_optimization.stage of the DeepSpeed configuration must be 1 or 2, got "
            f"{zero.get('stage')}; a head is too small to be worth stage 3"
        )
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device", "none") != "none":
            raise ConfigError(f"zero_optimization.{name} of the DeepSpeed configuration must go")
    if config.get("gradient_accumulation_steps", "auto") not in ("auto", 1):
        raise ConfigError(
            "gradient_accumulation_steps of the DeepSpeed configuration must be 1 or auto, got "
            f"{config['gradient_accumulation_steps']}; say --accumulate instead"
        )
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ConfigError(
                f"{name} of the DeepSpeed configuration must go; --lr and its like decide"
            )
    if config.get("fp16", {}).get("enabled") is True:
        raise ConfigError("fp16 of the DeepSpeed configuration must go; say --precision bf16")
    bf16 = config.get("bf16", {}).get("enabled") is True
    # Not DeepSpeed's own way, which turns the weights into bfloat16: ours stay in fp32.
    config["bf16"] = {"enabled": False}
    config["train_micro_batch_size_per_gpu"] = 1  # must be there; only a speed is made of it
    return bf16


class _PlainStepper:
    """One process, or a full copy in each of many."""

    def __init__(self, accelerator: Any, module: nn.Module, head: nn.Module, optimizer: Any):
        self._accelerator, self._head, self._raw = accelerator, head, optimizer
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self._trained = [p for p in head.parameters() if p.requires_grad]

    def part(self, is_last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients in the last part only."""
        if is_last:
            return contextlib.nullcontext()
        found: AbstractContextManager[None] = self._accelerator.no_sync(self.module)
        return found

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, most: float) -> Tensor:
        norm: Tensor = self._accelerator.clip_grad_norm_(self._trained, most)
        return norm

    def step(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return _saved(self._head), optimizer_tensors(self._raw, self._head)

    def load(self, head: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        _load_head(self._head, head)
        load_optimizer_tensors(self._raw, self._head, optimizer)


class _ZeroStepper:
    """DeepSpeed's ZeRO, stages 1 and 2: each process holds a piece of the optimiser's state."""

    def __init__(self, accelerator: Any, module: nn.Module, head: nn.Module, optimizer: Any):
        self._head = head
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self._engine, self._zero = self.module, self.module.optimizer
        self._parameters = {n: p for n, p in head.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def part(self, is_last: bool) -> Any:
        """Tells the engine when the gradient is whole."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        # Accelerate's backward would step at once, before anybody has seen the norm.
        self._engine.backward(loss)

    def clip(self, most: float) -> Tensor:
        self._zero.clip_grad = most
        norm = torch.as_tensor(self._zero.scaled_global_norm())
        return torch.where(norm < 0, torch.inf, norm)  # below 0 stands for "not finite"

    def step(self, lr: float) -> None:
        set_lr(self._zero, lr)
        self._engine.step()

    def clear(self) -> None:
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        zero.micro_step_id = -1

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        head = _saved(self._head) | {n: self._whole(p) for n, p in self._parameters.items()}
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for key, value in self._state(parameter).items():
                whole = value if value.ndim == 0 else self._whole(parameter, key)
                optimizer[f"{name}/{key}"] = whole.clone()
        return head, optimizer

    def load(self, head: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        _load_head(self._head, head)
        for name, parameter in self._parameters.items():
            self._set(parameter, self._flat(parameter), head[name])
        for name, value in optimizer.items():
            parameter_name, _, key = name.rpartition("/")
            found = self._parameters.get(parameter_name)
            if found is None or (value.ndim and value.shape != found.shape):
                raise ConfigError(f"the checkpoint's optimiser state {name!r} fits no parameter")
            self._load_state(found, key, value)

    def _load_state(self, parameter: Tensor, key: str, value: Tensor) -> None:
        flat, state = self._flat(parameter), self._state(parameter)
        if value.ndim == 0:
            fused = any(group.get("fused") for group in self._zero.optimizer.param_groups)
            state[key] = value.to(flat.device if fused else "cpu").clone()
            return
        if key not in state:
            state[key] = torch.zeros_like(flat)
        self._set(parameter, state[key], value)

    def _flat(self, parameter: Any) -> Tensor:
        """This process's piece of the parameter's group, fp32."""
        group = next(
            number
            for number, members in enumerate(self._zero.bit16_groups)
            if any(member is parameter for member in members)
        )
        flat: Tensor = self._zero.single_partition_of_fp32_groups[group]
        return flat

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The optimiser's state of that piece."""
        state: dict[str, Tensor] = self._zero.optimizer.state[self._flat(parameter)]
        return state

    def _whole(self, parameter: Any, key: str | None = None) -> Tensor:
        """A parameter, or a part of its optimiser state, from all processes' pieces."""
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        pieces = parameter._hp_mapping
        if pieces is not None:  # else no part of it is in this process's piece
            flat = self._flat(parameter) if key is None else self._state(parameter)[key]
            here, there = pieces.hp_fragment_address, pieces.lp_fragment_address
            whole[there.start : there.start + there.numel] = flat.detach()[
                here.start : here.start + here.numel
            ]
        torch.distributed.all_reduce(whole)
        return whole.reshape(parameter.shape).cpu()

    def _set(self, parameter: Any, flat: Tensor, value: Tensor) -> None:
        """Copies this process's piece of a whole tensor."""
        pieces = parameter._hp_mapping
        if pieces is not None:
            here, there = pieces.hp_fragment_address, pieces.lp_fragment_address
            flat.detach()[here.start : here.start + here.numel] = value.reshape(-1)[
                there.start : there.start + there.numel
            ].to(flat)


def _saved(head: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in head.state_dict().items() if not n.startswith(_NOT_SAVED)}


def _load_head(head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        missing, unknown = head.load_state_dict(tensors, strict=False)
    except RuntimeError as problem:  # shapes
        raise ConfigError(f"the checkpoint is of another head: {problem}") from problem
    if unknown or any(not name.startswith(_NOT_SAVED) for name in missing):
        raise ConfigError(f"the checkpoint is of another head: {[*missing, *unknown][:3]}")
