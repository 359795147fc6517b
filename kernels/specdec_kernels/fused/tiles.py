"""Tiles of tree attention by architecture: looked up in a table, never searched for at run time.

Nothing here imports Triton. Which entries hold what they state is shown ahead of time, without a
GPU: no register spills, the shared memory fits, and as many blocks share a multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from specdec_kernels.dispatch import KernelError

LARGEST_DIM = 512
_FIRST_WITH_E4M3 = 89
_MOST_SPLITS = 64
_TILES_A_SPLIT = 4
"""A split reads at least so many tiles: below that its partial result costs more than it saves."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How one program is cut.

    Attributes:
        rows: Query rows of a block, nodes times query heads of a key head.
        keys: Keys of a tile; divides 64.
        warps: Warps of a block.
        stages: Tiles in flight.
        blocks: Blocks that must fit on one multiprocessor side by side.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Use:
    """What a tile is chosen for.

    Attributes:
        rows: Query rows of a row of the batch and key head, T times Hq / Hkv.
        dim: The larger head dimension of keys and values.
        exact: Whether the queries are float32, whose products run outside the tensor cores.
    """

    rows: int
    dim: int
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table: the largest use that a tile is for.

    Attributes:
        rows: Most rows; None for any number.
        dim: Largest head dimension.
        tile: The tile, whatever the window, the pages and the rest of the call.
    """

    rows: int | None
    dim: int
    tile: Tile


# Per architecture, first match wins: half precision, by head dimension and rows.
_AMPERE = (
    Entry(16, 128, Tile(16, 64, 4, 2, 3)),
    Entry(32, 128, Tile(32, 64, 4, 2, 2)),
    Entry(None, 128, Tile(64, 32, 4, 2, 2)),
    Entry(16, 256, Tile(16, 32, 4, 2, 2)),
    Entry(None, 256, Tile(32, 32, 4, 2, 2)),
    Entry(None, LARGEST_DIM, Tile(16, 16, 4, 2, 2)),
)
_LATER = (
    Entry(16, 128, Tile(16, 64, 4, 3, 3)),
    Entry(32, 128, Tile(32, 64, 4, 3, 2)),
    Entry(64, 128, Tile(64, 64, 4, 3, 2)),
    Entry(None, 128, Tile(128, 64, 8, 3, 1)),
    Entry(16, 256, Tile(16, 32, 4, 2, 2)),
    Entry(None, 256, Tile(64, 32, 8, 2, 1)),
    Entry(None, LARGEST_DIM, Tile(16, 16, 4, 2, 2)),
)
TABLE = {80: _AMPERE, 90: _LATER, 100: _LATER}
"""Entries by compute capability times ten. Every tile of 80 also fits the smaller shared memory of
8.6, 8.9 and 12.0."""

EXACT = (
    Entry(None, 128, Tile(16, 16, 4, 2, 4)),
    Entry(None, LARGEST_DIM, Tile(16, 16, 4, 2, 1)),
)
"""float32 on any architecture: plain products, since tensor cores would round the operands."""

ORDERED = (
    Entry(None, 128, Tile(64, 64, 4, 2, 1)),
    Entry(None, 256, Tile(64, 32, 8, 2, 1)),
    Entry(None, LARGEST_DIM, Tile(16, 16, 4, 2, 1)),
)
"""For attention in the order of positions, half precision: whatever the rows of a call are."""

SPAN = 16
"""Tiles of a split there."""


def tile_for(arch: int, use: Use) -> Tile:
    """The tile of a call on compute capability `arch` / 10.

    Raises:
        KernelError: The head dimension is larger than any in the table.
    """
    family = TABLE[90 if 90 <= arch < 100 else 100 if 100 <= arch < 120 else 80]
    for entry in EXACT if use.exact else family:
        if (entry.rows is None or use.rows <= entry.rows) and use.dim <= entry.dim:
            return entry.tile
    raise _too_large(use.dim)


def splits_for(keys: int, programs: int, tile: Tile, processors: int) -> int:
    """Splits that fill the device once, from what the cache holds at most.

    Args:
        keys: Keys that a row can see at most: the cache's capacity, or the window and the tree.
        programs: Programs of one split.
        tile: Of the call.
        processors: Multiprocessors of the device.
    """
    wanted = tile.blocks * processors // programs
    return max(1, min(wanted, -(-keys // (_TILES_A_SPLIT * tile.keys)), _MOST_SPLITS))


def ordered_tile_for(arch: int, dim: int, group: int, exact: bool) -> Tile:
    """The tile of attention in the order of positions: by model and device, never by the call.

    Args:
        arch: Compute capability times ten.
        dim: The larger head dimension of keys and values.
        group: Query heads of a key head, which must fit a block.
        exact: Whether the queries are float32.

    Raises:
        KernelError: The head dimension is larger than any in the table.
    """
    for entry in EXACT if exact else ORDERED:
        if dim <= entry.dim:
            rows = max(entry.tile.rows, 1 << (group - 1).bit_length())
            return replace(entry.tile, rows=rows)
    raise _too_large(dim)


def require_types(arch: int, queries: torch.dtype, cache: torch.dtype) -> None:
    """Raises `KernelError` for types that the kernels have no arithmetic for, here or anywhere."""
    if queries not in (torch.bfloat16, torch.float16, torch.float32):
        raise KernelError(
            f"Triton kernels take bfloat16, float16 or float32, got {queries}: use the reference"
        )
    if cache == torch.float8_e4m3fn and arch < _FIRST_WITH_E4M3:
        raise KernelError(
            f"keys in float8_e4m3fn need compute capability 8.9, this device has {arch / 10}: keep "
            "the cache in float8_e5m2 or bfloat16"
        )


def _too_large(dim: int) -> KernelError:
    return KernelError(
        f"head dimensions of the Triton kernel go up to {LARGEST_DIM}, got {dim}: use the reference"
    )
