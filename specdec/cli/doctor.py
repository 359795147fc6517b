"""`specdec doctor`: what is installed, what the devices can do, and how a model is verified."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import specdec
from specdec.artifacts.terminal import columns, facts, say
from specdec.cli.options import DoctorOptions
from specdec.config import DEFAULT_METHODS
from specdec.cost.curve import measure_cost
from specdec.cost.sizes import choose_sizes
from specdec.hf.names import CACHE, tested_range
from specdec.loading import check_model, context_length, load_model, pick_device
from specdec.registry import methods
from specdec.targets.attention_choice import wanted_backend, with_attention
from specdec.targets.watched_test import self_test
from specdec_kernels import Backend

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
_EXTRAS = (("triton", "kernels on a GPU"), ("accelerate", "several devices, training"))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TIMED_SIZE, _TIMED_RUNS = 256, 12


def run_doctor(options: DoctorOptions) -> int:
    """Runs the command."""
    if options.model is not None:
        check_model(options.model)
    device = pick_device(options.device)
    backend = wanted_backend(options.kernels, device)
    say(f"specdec {specdec.__version__}")
    say("\n".join(facts(_versions(), indent=2)))
    say("devices")
    say("\n".join(facts(_devices(), indent=2)))
    say(f"dtypes on {device} (time of a matrix product relative to float32)")
    say("\n".join(facts(_dtypes(device), indent=2)))
    say(f"attention of token trees on {device}, with kernels {options.kernels}")
    say(f"  {_attention(backend)}")
    say("methods")
    say("\n".join(facts([(name, _describe(name)) for name in methods.names()], indent=2)))
    if options.model is not None:
        _diagnose(options)
    return 0


def _versions() -> list[tuple[str, str]]:
    system = f"{platform.system()} {platform.machine()}"
    lines = [("python", f"{platform.python_version()}, {system}")]
    lines += [(name, _version(name) or "not installed") for name in _PACKAGES]
    lines.append(
        ("tested with", f"transformers {tested_range()}; the KV cache is called {CACHE!r}")
    )
    for name, purpose in _EXTRAS:
        lines.append((name, _version(name) or f"not installed (optional: {purpose})"))
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions = torch.backends.cpu.get_cpu_capability()
    lines = [("cpu", f"{cores} cores, {torch.get_num_threads()} torch threads, {instructions}")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        lines.append((f"cuda:{index}", f"{found.name}, {memory}, sm_{found.major}{found.minor}"))
    if not torch.cuda.is_available():
        lines.append(("cuda", "none"))
    if torch.backends.mps.is_available():
        lines.append(("mps", "available"))
    return lines


def _dtypes(device: torch.device) -> list[tuple[str, str]]:
    lines, reference = [], 0.0
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        try:
            seconds = _product_seconds(device, dtype)
        except (RuntimeError, TypeError) as problem:
            lines.append((name, f"not supported: {str(problem).splitlines()[0][:80]}"))
            continue
        reference = reference or seconds
        promise = "text identical to plain generate"
        if dtype in (torch.bfloat16, torch.float16):
            promise = "text may differ at near-ties, by rounding"
        lines.append((name, f"{seconds / reference:>6.2f}x   {promise}"))
    return lines


def _attention(backend: Backend | None) -> str:
    """What would compute it, for a model that passes its self-test so."""
    if backend is None:
        return "dense masks in the model's own attention"
    return f"fused tree attention, by {'Triton' if backend == 'triton' else 'its torch reference'}"


def _product_seconds(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(_TIMED_SIZE, _TIMED_SIZE, device=device).to(dtype)
    times = []
    for _ in range(_TIMED_RUNS):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # the copy waits for the device
        times.append(time.perf_counter() - begin)
    return min(times[2:])


def _describe(method: str) -> str:
    """The method's options with the defaults that they have here."""
    here = methods.device_defaults(method, pick_device("auto").type == "cpu")
    described = [
        f"{name}={'?' if option.required else here.get(name, option.default)}"
        for name, option in methods.options(method).items()
    ]
    return ", ".join(described) or "no options"


def _diagnose(options: DoctorOptions) -> None:
    model = load_model(options.model, options.dtype, options.device)
    found = with_attention(model, self_test(model), options.kernels)
    say(f"model {options.model}")
    context = context_length(model)
    lines = [
        ("class", type(model).__name__),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("context", f"{context:,} tokens" if context else "not stated"),
        ("runs on", f"{model.device}, {str(model.dtype).removeprefix('torch.')}"),
        ("mode", f"{found.mode}: {found.reason}"),
        ("tree error", f"{found.error:.1e} of the largest logit; rounding {found.noise:.1e}"),
    ]
    say("\n".join(facts(lines, indent=2)))
    if found.mode != "plain":
        _show_cost(model, found.backend)


def _show_cost(model: Any, backend: Backend | None) -> None:
    curve = measure_cost(model, backend=backend)
    rows = [["tokens", "ms", "relative"]]
    for tokens, seconds in curve.seconds.items():
        rows.append([f"{tokens:>6}", f"{1000 * seconds:.2f}", f"{curve.ratio(tokens):.2f}x"])
    say("cost of a forward over some tokens (relative: tokens a round at which it breaks even)")
    say("\n".join("  " + line for line in columns(rows)))
    choice = choose_sizes(curve, DEFAULT_METHODS["tree"])
    chosen = ", ".join(f"{name} {value}" for name, value in choice.options.items())
    say(f"default method here: {choice.method}{f' ({chosen})' if chosen else ''}")
