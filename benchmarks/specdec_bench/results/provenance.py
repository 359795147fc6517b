"""What was measured, with what and where: the header's facts. Nothing in here can fail a run."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

import specdec
from specdec.artifacts.source_revision import source_revision
from specdec.hf.attention import attention_name
from specdec.hf.compat import input_device

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
_SAMPLED = 64  # values at each end of a weight that go into the target's hash
_HASHED_BYTES = 1 << 20  # of each end of a file of weights
_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def provenance(model: Any, prompts: Sequence[Any], **more: Any) -> dict[str, Any]:
    """Facts about a run, as plain values for JSON.

    Args:
        model: The target.
        prompts: Dataclasses of the prompts.
        **more: Further facts.

    Returns:
        Among them `device` ("cpu" or "cuda"), `device_name`, `threads`, `target_sha256` and
        `prompts_sha256`.
    """
    device = input_device(model)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "specdec": specdec.__version__,
        "revision": source_revision(Path(__file__)),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "device_name": _device_name(device),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "governor": _line(_GOVERNOR),
        "load": _load(),
        "cuda": torch.version.cuda,
        "attention": str(attention_name(model.config)),
        "model_type": str(getattr(model.config, "model_type", None)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "target_sha256": target_hash(model),
        "prompts": len(prompts),
        "prompts_sha256": prompts_hash(prompts),
        **more,
    }


def prompts_hash(prompts: Sequence[Any]) -> str:
    """SHA-256 over ids, categories and texts of all prompts, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(asdict(prompt), sort_keys=True).encode("ascii") + b"\n")
    return digest.hexdigest()


def target_hash(model: Any) -> str:
    """SHA-256 over names, shapes and a few values of all weights, in fp32 so that dtypes agree.

    Empty where some of them are kept elsewhere.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.is_meta:
            return ""
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        ends = torch.cat([flat[:_SAMPLED], flat[-_SAMPLED:]]).cpu().float().contiguous()
        digest.update(ends.numpy().tobytes())
    return digest.hexdigest()


def weights_hash(name: str | None) -> str | None:
    """SHA-256 over the safetensors files of a head or draft model: names, sizes and both ends.

    The beginning of a file describes its tensors; weights that were trained on differ in their
    last bytes. None without a name, empty where there are no such files here.

    Args:
        name: A folder, or the hub id of what was downloaded.
    """
    if name is None:
        return None
    digest, files = hashlib.sha256(), _weight_files(name)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_HASHED_BYTES))
            stream.seek(max(size - _HASHED_BYTES, 0))
            digest.update(stream.read(_HASHED_BYTES))
    return digest.hexdigest() if files else ""


def _weight_files(name: str) -> list[Path]:
    folder = Path(name).expanduser()
    try:
        if not folder.is_dir():
            found = cached_file(name, "config.json", local_files_only=True)
            folder = Path(str(found)).parent
        return sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    except (OSError, ValueError):  # not downloaded, or no name of a repository
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _load() -> float | None:
    """Programs that wanted to run in the last minute, on average."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None
