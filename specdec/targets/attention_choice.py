"""What computes the attention of a token tree: fused tree attention, or a dense mask.

Fused attention is used where a call wants it and the model's self-test passes with it. There is no
list of models: one whose layers do not call transformers' attention interface, or that comes out
otherwise, keeps dense masks.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from specdec.config import Kernels
from specdec.errors import ConfigError
from specdec.hf.compat import input_device
from specdec.targets.self_test import Capability, probe_attention
from specdec_kernels import Backend, KernelError, chosen_backend
from specdec_kernels.dispatch import VARIABLE


def wanted_backend(kernels: Kernels, device: torch.device) -> Backend | None:
    """What `kernels` asks for on a device: "triton", "reference", or None for dense masks.

    "auto" is Triton on a CUDA device where it is installed, and off elsewhere; the environment
    variable SPECDEC_KERNELS replaces that choice.

    Raises:
        ConfigError: What is asked for cannot run there.
    """
    if kernels == "off":
        return None
    try:
        if kernels != "auto":
            return chosen_backend(device, kernels)
        found = chosen_backend(device)
    except KernelError as problem:
        raise ConfigError(f"kernels={kernels!r} cannot run on {device}: {problem}") from problem
    return found if found == "triton" or os.environ.get(VARIABLE) else None


def with_attention(model: Any, found: Capability, kernels: Kernels) -> Capability:
    """What was found of a model, with what computes its attention in a call, and the reason.

    Tests tree attention where that has not been done.

    Raises:
        ConfigError: As `wanted_backend`.
    """
    backend = wanted_backend(kernels, input_device(model))
    if backend is None or found.mode != "tree":
        return found
    if backend not in found.attention:
        found.attention[backend] = probe_attention(model, backend)
    test = found.attention[backend]
    if test.refused is not None:
        why = f"by tree attention ({backend}) {test.refused}"
        return replace(found, reason=f"{found.reason} with dense masks; {why}")
    where = "" if test.in_place else ", on copies of its keys"
    reason = f"{found.reason} with tree attention ({backend}){where}"
    return replace(found, reason=reason, backend=backend)
