"""The entry of the commit: accepted nodes move next to the prefix, in all layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.reference import commit as reference_commit


@dataclass(frozen=True, slots=True)
class KVBuffers:
    """The keys and values of a cache, and where they lie, told to the device once.

    Whoever replaces a buffer makes this anew; nothing notices a table that is out of date.

    Attributes:
        tensors: [B, heads, S, dim] each, contiguous in the last dimension; heads, S, dim and dtype
            may differ. Each buffer once.
        table: [N, 6] int64 on their device: address, strides of row, head and slot, heads and dim,
            all in units.
        unit: Bytes of a unit, the most that divides all of these: 8, 4, 2 or 1.
        heads: Most heads of a buffer.
        dim: Most units of a slot of one head.
    """

    tensors: tuple[Tensor, ...]
    table: Tensor
    unit: int
    heads: int
    dim: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> KVBuffers:
        """Uploads where the buffers lie: one small copy.

        Raises:
            KernelError: A buffer has another shape, batch or device than the contract says.
        """
        first = tensors[0] if tensors else None
        for tensor in tensors:
            if (
                first is None
                or tensor.dim() != 4
                or tensor.stride(-1) != 1
                or (len(tensor), tensor.device) != (len(first), first.device)
            ):
                raise KernelError(
                    "buffers must be [B, heads, S, dim] with one B, on one device, contiguous in "
                    f"the last dimension, got {tuple(tensor.shape)} with strides "
                    f"{tensor.stride()} on {tensor.device}"
                )
        if first is None:
            raise KernelError("there are no buffers to commit; a cache has at least one layer")
        # 1. In bytes: address, strides, bytes of a slot. Of offsets, the greatest common unit.
        rows = [_in_bytes(tensor) for tensor in tensors]
        unit = math.gcd(8, *(number for row in rows for number in row))
        # 2. Addresses stay as they are, the rest counts units; what is moved has no dtype then.
        heads = [tensor.shape[1] for tensor in tensors]
        table = torch.tensor(
            [
                [address, *(step // unit for step in strides), count, size // unit]
                for (address, *strides, size), count in zip(rows, heads, strict=True)
            ],
            dtype=torch.int64,
        )
        dim = max(row[-1] for row in rows) // unit
        return cls(tuple(tensors), table.to(first.device), unit, max(heads), dim)


def _in_bytes(tensor: Tensor) -> list[int]:
    """Address, strides of row, head and slot, and one slot of one head."""
    size = tensor.element_size()
    strides = (stride * size for stride in tensor.stride()[:3])
    return [tensor.data_ptr(), *strides, tensor.shape[3] * size]


def commit_kv(
    buffers: KVBuffers | Sequence[Tensor],
    path: Tensor,
    length: Tensor,
    prefix: Tensor,
    *,
    backend: Backend | None = None,
) -> None:
    """Keeps root and accepted nodes of every row, in place; one launch moves all layers.

    In row b, slot `prefix + path[d - 1]` moves to slot `prefix + d` for d = 1 .. length[b]; the
    root stays where it is. Then `prefix += length + 1`. Nothing is read on the host, and a path
    whose nodes already stand in order costs no traffic.

    Args:
        buffers: Keys and values of all layers. Plain tensors cost an upload of their addresses.
        path: [B, P] int32 or int64 accepted nodes from depth 1 down, each above the one before.
        length: [B] int32 or int64 nodes to keep, at most P: all, or fewer where a stop rule cuts.
            -1 for a row that is not active, which keeps its prefix and its slots.
        prefix: [B] int32 or int64 committed slots; advanced in place.
        backend: Implementation to run; None for that of the device.

    Raises:
        KernelError: A shape is out of the contract.
    """
    known = buffers if isinstance(buffers, KVBuffers) else KVBuffers.of(buffers)
    batch = len(known.tensors[0])
    if path.dim() != 2 or len(path) != batch or not path.shape[:1] == length.shape == prefix.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (path, length, prefix))
        raise KernelError(
            f"path, length and prefix must be [{batch}, P], [{batch}] and [{batch}], got {shapes}"
        )
    chosen = chosen_backend(prefix.device, backend)
    sizes = [known.unit, known.heads, known.dim]
    _commit_kv(list(known.tensors), known.table, sizes, path, length, prefix, chosen)


@torch.library.custom_op("specdec::commit_kv", mutates_args=("tensors", "prefix"))
def _commit_kv(
    tensors: Sequence[Tensor],
    table: Tensor,
    sizes: Sequence[int],
    path: Tensor,
    length: Tensor,
    prefix: Tensor,
    backend: str,
) -> None:
    if path.shape[1]:
        if backend == "triton":
            from specdec_kernels.fused import commit as fused_commit

            fused_commit.move(table, sizes, path, length, prefix)
        else:
            reference_commit.move(tensors, path, length, prefix)
    prefix.add_(length + 1)


@_commit_kv.register_fake
def _(
    tensors: Sequence[Tensor],
    table: Tensor,
    sizes: Sequence[int],
    path: Tensor,
    length: Tensor,
    prefix: Tensor,
    backend: str,
) -> None:
    return None
