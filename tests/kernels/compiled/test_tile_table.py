"""Every line of the tile table, compiled for its GPU: no spills, it fits, as many blocks as stated.

Triton keeps what it compiled by a hash of its sources, its version and the target.
"""

from __future__ import annotations

import pytest
import torch

from specdec_kernels import KernelError
from specdec_kernels.fused.aot import Compiled
from specdec_kernels.fused.attention import Form
from specdec_kernels.fused.attention_ahead import compiled_combine, compiled_ordered, compiled_split
from specdec_kernels.fused.ordered_programs import attend_prefix, attend_rest
from specdec_kernels.fused.tiles import EXACT, ORDERED, TABLE, Entry, Tile, require_types

BFLOAT = torch.bfloat16
ARCHITECTURES = (80, 90, 100)
SHARED_MOST = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may ask for
"""Tiles of 80 serve 8.6, 8.9 and 12.0 too, which have less than 8.0."""


def forms(entry: Entry) -> dict[str, Form]:
    """What a line serves: all that goes together and, at the commonest size, nothing but keys."""
    dim = entry.dim
    everything = Form(
        8, 4, dim, dim, 16, 4096, 8192, 30.0, padded=True, k_scaled=True, v_scaled=True
    )
    keys = {"keys": Form(8, 4, dim, dim)} if dim == 128 else {}
    return {"everything": everything, **keys}


LINES = [
    pytest.param(arch, entry, form, id=f"sm_{arch}-{at}-{name}")
    for arch in ARCHITECTURES
    for at, entry in enumerate(TABLE[arch])
    for name, form in forms(entry).items()
]


def require(made: Compiled, tile: Tile, arch: int) -> None:
    """What every line of the table promises."""
    assert made.spills == 0, made
    assert made.shared <= SHARED_MOST[arch], made
    assert made.blocks >= tile.blocks, made


@pytest.mark.parametrize(("arch", "entry", "form"), LINES)
def test_a_line_of_the_table(arch: int, entry: Entry, form: Form) -> None:
    made = compiled_split(form, entry.tile, arch, BFLOAT)
    require(made, entry.tile, arch)
    assert made.tensor_cores, made


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("entry", EXACT)
def test_float32_is_not_rounded(arch: int, entry: Entry) -> None:
    """Its products are exact, so none of them runs on a tensor core."""
    form = Form(8, 4, entry.dim, entry.dim, window=4096)
    made = compiled_split(form, entry.tile, arch, torch.float32)
    require(made, entry.tile, arch)
    assert not made.tensor_cores, made


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_caches(arch: int, cache: torch.dtype) -> None:
    """Compiled where the architecture has the type, refused by name where it has not."""
    entry = next(line for line in TABLE[arch] if line.rows is None)
    form = Form(8, 4, 128, 128, k_scaled=True, v_scaled=True)
    if arch == 80 and cache == torch.float8_e4m3fn:
        with pytest.raises(KernelError, match=r"compute capability 8\.9, this device has 8\.0"):
            require_types(arch, BFLOAT, cache)
        with pytest.raises(Exception, match="fp8e4nv"):
            compiled_split(form, entry.tile, arch, BFLOAT, cache)
        return
    require_types(arch, BFLOAT, cache)
    made = compiled_split(form, entry.tile, arch, BFLOAT, cache)
    require(made, entry.tile, arch)
    assert made.tensor_cores, made


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dim", [128, 512])
def test_what_puts_splits_together(arch: int, dim: int) -> None:
    made = compiled_combine(Form(8, 4, dim, dim, sinks=True, v_scaled=True), arch, BFLOAT)
    assert made.spills == 0, made
    assert made.blocks >= 4, made


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_half_the_warps_would_spill(arch: int) -> None:
    """The largest tile with four warps: what the check of spills is for."""
    made = compiled_split(Form(8, 4, 128, 128), Tile(128, 64, 4, 3, 1), arch, BFLOAT)
    assert made.spills > 0, made


@pytest.mark.parametrize("arch", [90, 100])
def test_a_stage_more_would_halve_the_blocks(arch: int) -> None:
    """Four tiles in flight: no spills, but a second block no longer fits."""
    tile = Tile(64, 64, 4, 4, 2)
    made = compiled_split(Form(8, 4, 128, 128, window=4096), tile, arch, BFLOAT)
    assert made.spills == 0
    assert made.blocks < tile.blocks, made


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("entry", ORDERED)
def test_in_order_both_programs_run_the_same_instructions(arch: int, entry: Entry) -> None:
    """A tile of keys lies in the prefix or reaches into the tree: its bits must not tell which."""
    form = Form(8, 4, entry.dim, entry.dim, window=4096, sinks=True)
    found = [
        compiled_ordered(program, form, entry.tile, arch, BFLOAT)
        for program in (attend_prefix, attend_rest)
    ]
    for made in found:
        require(made, entry.tile, arch)
        assert made.tensor_cores, made
    assert found[0].tensor_cores == found[1].tensor_cores
