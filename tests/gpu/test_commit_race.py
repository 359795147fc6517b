"""The commit on a device, where its threads really run side by side."""

from __future__ import annotations

import pytest
import torch

from helpers.kv_buffers import random_paths
from specdec_kernels import KVBuffers, commit_kv


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_commit_a_thousand_times() -> None:
    """All slots of a path are read before any is written: a race shows only now and then."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 8, 96, 128, generator=generator, dtype=torch.float32)
              .to("cuda", torch.bfloat16) for _ in range(16)]  # fmt: skip
    known = KVBuffers.of(layers)
    kept = [layer.clone() for layer in layers]
    for seed in range(1000):
        path, length = (x.cuda() for x in random_paths(seed, 2, 64, 40))
        prefixes = [torch.tensor([7, 30], device="cuda") for _ in range(2)]
        wanted = [layer.clone() for layer in kept]
        commit_kv(wanted, path, length, prefixes[0], backend="reference")
        for layer, before in zip(layers, kept, strict=True):
            layer.copy_(before)
        commit_kv(known, path, length, prefixes[1], backend="triton")
        assert torch.equal(*prefixes)
        assert all(map(torch.equal, layers, wanted)), seed
