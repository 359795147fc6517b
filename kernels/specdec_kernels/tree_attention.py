"""The entry of tree attention: one contract, checked here, for the reference and for Triton."""

from __future__ import annotations

from torch import Tensor

from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.reference import attention as reference_attention
from specdec_kernels.tree import WORD, Tree


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Tree,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_start: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every node of a token tree to the committed prefix and to its own ancestors.

    Node i of row b sees slot s when `kv_start[b] <= s < prefix[b]`, and slot `prefix[b] + j` when
    it sees node j; with a window or a chunk, only where the positions lie in it. A committed slot's
    position is its index, a node's is `prefix + depth`; both count from kv_start for chunks.
    Lengths are read on the device, and slots that nobody sees may hold NaN.

    Args:
        q: [B, Hq, T, Dk] bfloat16, float16 or float32; any strides but a contiguous last dimension.
        k: [B, Hkv, S, Dk] with `prefix + T <= S`, or pages [P, Hkv, page, Dk] with `block_table`;
            of q's dtype, float8_e4m3fn or float8_e5m2. Hkv divides Hq.
        v: As k, with last dimension Dv.
        tree: The trees of the rows.
        scale: Factor of the scores.
        window: Positions that a node looks back, itself included; 0 for no window.
        chunk: Positions of an attention chunk: a node sees its own chunk only; 0 for none.
        softcap: Scores s become `softcap * tanh(s / softcap)`; 0 for no cap.
        sinks: [Hq] a score of each head that takes weight and has no value (gpt-oss), or None.
        kv_start: [B] int32 or int64 first slot of a left-padded row, or None.
        block_table: [B, pages] int32 page of every `page` slots of a row, or None.
        k_scale: [Hkv] float32 factor of float8 keys, or None.
        v_scale: [Hkv] float32 factor of float8 values, or None.
        return_lse: Also return the log-sum-exp of the scores, sinks included.
        backend: Implementation to run; None for that of the device.

    Returns:
        [B, T, Hq, Dv] of q's dtype, zero at padded nodes; with `return_lse` also [B, Hq, T]
        float32, natural logarithm, -inf at padded nodes.

    Raises:
        KernelError: A shape or dtype is out of the contract.
    """
    _check(q, k, v, tree, block_table, sinks)
    if chosen_backend(q.device, backend) == "triton":
        raise KernelError("there is no Triton kernel yet")
    out, lse = reference_attention.tree_attention(
        q, k, v, tree, scale=scale, window=window, chunk=chunk, softcap=softcap, sinks=sinks,
        kv_start=kv_start, block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, block_table: Tensor | None, sinks: Tensor | None
) -> None:
    """Raises `KernelError` for shapes that no kernel could read; asks no device for a value."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise KernelError(f"q, k and v have four dimensions, got {shapes}")
    batch, heads, size, dim = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[3] != dim or heads % k.shape[1]:
        raise KernelError(
            f"k must be [B, Hkv, S, {dim}] with Hkv dividing {heads}, and v like it but for its "
            f"last dimension, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if block_table is None and k.shape[0] != batch:
        raise KernelError(f"k must have {batch} rows as q has, got {k.shape[0]}")
    if tree.words.shape[1:] != (size, -(-size // WORD)) or tree.words.shape[0] not in (1, batch):
        raise KernelError(
            f"words must be [{batch} or 1, {size}, {-(-size // WORD)}], "
            f"got {tuple(tree.words.shape)}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise KernelError(f"sinks must be [{heads}], one a query head, got {tuple(sinks.shape)}")
