"""Whether a model's forward is random as it stands, found by looking at it and by running it.

A random forward gives another text whenever more or fewer forwards are run, so such a model runs as
plain `generate`. Configurations are not asked: what counts is what the modules do. Generators of
torch, numpy and Python stand afterwards where they stood before.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specdec.hf.compat import input_device
from specdec.hf.steps import plain_logits, prepared_call
from specdec.round.noise import kept_generators
from specdec.targets.self_test import evaluating

_RATES = ("dropout", "layerdrop", "layer_drop", "drop_path", "droppath", "jitter", "noise")
_OWN_RATES = ("p", "rate", "prob", "drop_prob", "sigma", "std")  # of a module that is itself one
_PROMPT, _STEPS = 6, 2  # tokens of a trial


@torch.no_grad()
def why_random(model: Any) -> str | None:
    """Why the forward is random in the model's present mode, or None when it is not.

    In training mode also why it is another forward than in eval mode, which is what is tested.
    """
    named = list(model.named_modules())
    unused = tuple(f"{name}.lora_" for name, module in named if _is_off(module))
    for name, module in named:
        if not module.training or name.startswith(unused):
            continue
        if (found := _why_module(name, module)) is not None:
            return f"the model is in training mode and {found}; call model.eval() before it"
    return _why_trial(model, any(module.training for _, module in named))


def _why_module(name: str, module: nn.Module) -> str | None:
    """What a module in training mode does at random, as its attributes say."""
    where = f"{name or 'the model'} ({type(module).__name__})"
    if getattr(module, "gradient_checkpointing", False) is True:
        return f"{where} recomputes activations (gradient checkpointing), without a cache"
    if getattr(module, "track_running_stats", False) and len(list(module.buffers(False))):
        return f"{where} updates its running statistics"
    rate = _rate(module)
    return None if rate is None else f"{where} is random, with {rate[0]}={rate[1]:g}"


def _rate(module: nn.Module) -> tuple[str, float] | None:
    """(name, value) of a rate above 0 at which the module drops something or adds noise."""
    kind = type(module).__name__.lower()
    is_one = isinstance(module, nn.modules.dropout._DropoutNd) or any(
        word in kind for word in ("drop", "noise", "jitter")
    )
    for name, value in vars(module).items():
        named = any(word in name.lower() for word in _RATES) or (is_one and name in _OWN_RATES)
        if named and isinstance(value, float | int) and type(value) is not bool and value > 0:
            return name, float(value)
    return None


def _is_off(module: nn.Module) -> bool:
    """Whether it is an adapter's layer that runs the layer below it alone."""
    return any(getattr(module, name, False) is True for name in ("disable_adapters", "merged"))


def _why_trial(model: Any, training: bool) -> str | None:
    """Runs a few plain steps twice, from other states of the generators."""
    places = {p.device for p in model.parameters() if p.device.type != "meta"}
    with _kept_randomness(places), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            before = _states(places)
            first = _logits(model)
            moved = [name for name, state in _states(places).items() if state != before[name]]
            _move(places)
            second = _logits(model)
            tested = first
            if training:
                with evaluating(model):
                    tested = _logits(model)
        except Exception:  # noqa: BLE001 - the self-test says what such a model cannot do
            return None
    mode = "training" if model.training else "eval"
    if moved:
        return f"its forward draws random numbers from {moved[0]} in {mode} mode"
    if not _are_equal(first, second):
        return f"its forward gives other logits for the same tokens each time, in {mode} mode"
    if not _are_equal(first, tested):
        return "its forward in training mode is not that of eval mode; call model.eval() before it"
    return None


def _logits(model: Any) -> Tensor:
    """[1, n, V] logits of a few plain steps over fixed tokens."""
    device, vocab = input_device(model), model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocab, (1, _PROMPT + _STEPS), generator=generator).to(device)
    prompt = tokens[:, :_PROMPT]
    config, kwargs = prepared_call(model, prompt, torch.ones_like(prompt))
    return plain_logits(model, prompt, config, kwargs, tokens[:, _PROMPT:])


def _are_equal(a: Tensor, b: Tensor) -> bool:
    """Up to the last digits, for an accelerator may add in another order."""
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    bound = 4 * torch.finfo(torch.float32).eps if a.device.type == "cpu" else 1e-4
    return float((a - b).abs().max()) <= bound * max(float(a.abs().max()), 1e-6)


def _states(places: set[torch.device]) -> dict[str, Any]:
    """Where every generator stands, by a name for the user."""
    found: dict[str, Any] = {
        "torch's generator": torch.get_rng_state().tolist(),
        "Python's random": random.getstate(),
        "numpy.random": _numpy_state(),
    }
    for place in places:
        if place.type != "cpu":
            state = torch.get_device_module(place).get_rng_state(place)
            found[f"torch's generator of {place}"] = state.tolist()
    return found


def _numpy_state() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=True)
    return tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in state)


def _move(places: set[torch.device]) -> None:
    """Brings every generator to another state."""
    random.random()
    np.random.random()
    for place in {*places, torch.device("cpu")}:
        torch.rand(1, device=place)


@contextmanager
def _kept_randomness(places: set[torch.device]) -> Iterator[None]:
    """Puts all generators back."""
    python, others = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        for place in {*places, torch.device("cpu")}:
            stack.enter_context(kept_generators(place))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(others)
