"""Tree attention whose sums have one order, that of positions: programs for a GPU.

A row reads its keys in tiles of positions that begin at its first slot; SPAN tiles are a split, and
splits are merged first to last. So the bits of a row depend on its query, its keys and its position
alone: not on the batch, on the other nodes, on where its ancestors lie in the tree or on how much
the cache could hold, and they are those that decoding one token a time would give.

`attend_prefix` reads the tiles that hold committed slots only, for all rows together.
`attend_rest` reads, node by node, the few tiles that reach into the tree, where a key is looked up
by the ancestor at its position, and merges. Both work in tiles of one shape, so that on a device a
tile runs the same instructions on whichever side of that border it lies.
"""

import triton
import triton.language as tl

from specdec_kernels.fused.attention_programs import (
    LOG2E,
    MASKED,
    _absorb,
    _first_seen,
    _nothing,
)


@triton.jit
def _whole_tiles(split, oldest, whole, KEYS: tl.constexpr, SPAN: tl.constexpr):
    """Tiles [low, high) of a split that hold committed slots only, from position `oldest` on."""
    return tl.maximum(split * SPAN, oldest // KEYS), tl.minimum(split * SPAN + SPAN, whole)


@triton.jit
def attend_prefix(
    Q, K, V, KScale, Depth, Size, Prefix, Start, Table, PartOut, PartMost, PartTotal, scale, nodes,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, d_b, d_t, t_b, t_p,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PAD_K: tl.constexpr, PAD_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPAN: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_START: tl.constexpr, K_SCALED: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """State of the softmax of a block of rows after one split's whole tiles of committed slots.

    Program (block, row of the batch x key head, split); writes nothing where there is no such tile.
    PartOut [pairs, splits, nodes x GROUP, DV] is not normalised; PartMost and PartTotal have no DV.
    """
    block, pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, head = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    prefix, size = tl.load(Prefix + b).to(tl.int32), tl.load(Size + b).to(tl.int32)
    start = tl.load(Start + b).to(tl.int32) if HAS_START else 0
    scale = scale * tl.load(KScale + head) if K_SCALED else scale
    # 1. The rows' queries.
    row, dim, dim_v = tl.arange(0, ROWS) + block * ROWS, tl.arange(0, PAD_K), tl.arange(0, PAD_V)
    node = (row // GROUP).to(tl.int64)
    live = node < size
    q_at = Q + b * q_b + (head * GROUP + row % GROUP) * q_h + node * q_t
    q_real = live[:, None] & (dim < DK)[None, :]
    q = tl.load(q_at[:, None] + dim[None, :], mask=q_real, other=0.0)
    first = _first_seen(tl.load(Depth + b * d_b + node * d_t, mask=live, other=0), prefix, start,
                        WINDOW, CHUNK)  # fmt: skip
    # 2. Tiles are counted from the row's first slot; what the root does not see nobody sees.
    whole = (prefix - start) // KEYS
    oldest = prefix + _first_seen(0, prefix, start, WINDOW, CHUNK)
    low, high = _whole_tiles(split, oldest - start, whole, KEYS, SPAN)
    high = tl.where(block * ROWS < size * GROUP, high, low)
    K, V = K + head * k_h, V + head * v_h
    if PAGE > 0:
        Table += b * t_b
    else:
        K, V = K + b * k_b, V + b * v_b
    most, total, mixed = _nothing(ROWS, PAD_V)
    for tile in range(low, high):
        slot = start + tile * KEYS + tl.arange(0, KEYS)
        seen = (slot - prefix)[None, :] >= first[:, None]
        most, total, mixed = _absorb(
            q, K, V, slot, slot >= oldest, seen, most, total, mixed, scale, Table, k_b, k_s, v_b,
            v_s, t_p, DK, DV, PAD_K, PAD_V, PAGE, SOFTCAP, UP)  # fmt: skip
    # 3. The state, for the rows that go on from it.
    at = (pair.to(tl.int64) * tl.num_programs(2) + split) * nodes * GROUP + row
    mine = row < tl.where(low < high, nodes * GROUP, 0)
    tl.store(PartMost + at, most, mask=mine)
    tl.store(PartTotal + at, total, mask=mine)
    real = mine[:, None] & (dim_v < DV)[None, :]
    tl.store(PartOut + at[:, None] * DV + dim_v[None, :], mixed, mask=real)


@triton.jit
def _merged(most, total, mixed, other_most, other_total, other_mixed):
    """Two states of the softmax as one, the first before the second."""
    larger = tl.maximum(most, other_most)
    fade, weight = tl.exp2(most - larger), tl.exp2(other_most - larger)
    mixed = mixed * fade[:, None] + other_mixed * weight[:, None]
    return larger, total * fade + other_total * weight, mixed


@triton.jit
def attend_rest(
    Q, K, V, KScale, VScale, Sinks, Ancestors, Depth, Size, Prefix, Start, Table, PartOut, PartMost,
    PartTotal, Out, Lse, scale, nodes, splits,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, a_b, a_t, a_d, d_b, d_t, t_b, t_p,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PAD_K: tl.constexpr, PAD_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPAN: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_START: tl.constexpr, K_SCALED: tl.constexpr, UP: tl.constexpr,
    HAS_SINKS: tl.constexpr, V_SCALED: tl.constexpr,
):  # fmt: skip
    """Output [B, nodes, Hq, DV] and natural log-sum-exp [B, Hq, nodes] of one node's query heads.

    Program (node, row of the batch x key head). Goes on from each split's state, if it has one.
    """
    node, pair = tl.program_id(0), tl.program_id(1)
    b, head = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    prefix, live = tl.load(Prefix + b).to(tl.int32), node < tl.load(Size + b)
    start = tl.load(Start + b).to(tl.int32) if HAS_START else 0
    scale = scale * tl.load(KScale + head) if K_SCALED else scale
    # 1. The node's queries, its position and the first that it sees.
    row, dim, dim_v = tl.arange(0, ROWS), tl.arange(0, PAD_K), tl.arange(0, PAD_V)
    mine, query = row < tl.where(live, GROUP, 0), head * GROUP + row
    q_at = Q + b * q_b + query * q_h + node.to(tl.int64) * q_t
    q = tl.load(q_at[:, None] + dim[None, :], mask=mine[:, None] & (dim < DK)[None, :], other=0.0)
    depth = tl.load(Depth + b * d_b + node * d_t, mask=live, other=0)
    first, position = _first_seen(depth, prefix, start, WINDOW, CHUNK), prefix + depth - start
    oldest = prefix + _first_seen(0, prefix, start, WINDOW, CHUNK) - start
    begin, end = (prefix + first - start) // KEYS, tl.where(live, position // KEYS + 1, 0)
    whole, Path = (prefix - start) // KEYS, Ancestors + b * a_b + node * a_t
    K, V = K + head * k_h, V + head * v_h
    if PAGE > 0:
        Table += b * t_b
    else:
        K, V = K + b * k_b, V + b * v_b
    # 2. Split after split: what is stored of it, then its tiles that reach into the tree.
    most, total, mixed = _nothing(ROWS, PAD_V)
    for split in range(begin // SPAN, (end + SPAN - 1) // SPAN):
        low, high = _whole_tiles(split, oldest, whole, KEYS, SPAN)
        at = ((pair.to(tl.int64) * splits + split) * nodes + node) * GROUP + row
        stored = row < tl.where(low < high, GROUP, 0)
        m = tl.load(PartMost + at, mask=stored, other=MASKED)
        t = tl.load(PartTotal + at, mask=stored, other=0.0)
        real = stored[:, None] & (dim_v < DV)[None, :]
        x = tl.load(PartOut + at[:, None] * DV + dim_v[None, :], mask=real, other=0.0)
        for tile in range(tl.maximum(split * SPAN, whole), tl.minimum(split * SPAN + SPAN, end)):
            ahead = start + tile * KEYS + tl.arange(0, KEYS) - prefix
            seen = (ahead >= first) & (ahead <= depth)
            other = tl.load(Path + ahead * a_d, mask=seen & (ahead >= 0), other=0)
            slot = prefix + tl.where(ahead < 0, ahead, other)
            m, t, x = _absorb(
                q, K, V, slot, seen, seen[None, :], m, t, x, scale, Table, k_b, k_s, v_b, v_s, t_p,
                DK, DV, PAD_K, PAD_V, PAGE, SOFTCAP, UP)  # fmt: skip
        most, total, mixed = _merged(most, total, mixed, m, t, x)
    # 3. A sink is one more score of its head.
    if HAS_SINKS:
        sink = tl.load(Sinks + query, mask=mine, other=0.0).to(tl.float32) * LOG2E
        one = tl.full([ROWS], 1.0, tl.float32)
        most, total, mixed = _merged(most, total, mixed, sink, one, tl.zeros_like(mixed))
    _store_rows(Out, Lse, VScale, b, head, node, nodes, live, most, total, mixed, HEADS, GROUP, DV,
                PAD_V, ROWS, V_SCALED)  # fmt: skip


@triton.jit
def _store_rows(
    Out, Lse, VScale, b, head, node, nodes, live, most, total, mixed,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, PAD_V: tl.constexpr,
    ROWS: tl.constexpr, V_SCALED: tl.constexpr,
):  # fmt: skip
    """Writes a node's output and log-sum-exp; zero and -inf for padding."""
    row, dim = tl.arange(0, ROWS), tl.arange(0, PAD_V)
    mine, query = row < GROUP, head * GROUP + row
    out = mixed / tl.where(total > 0, total, 1.0)[:, None]
    if V_SCALED:
        out = out * tl.load(VScale + head)
    out_at = ((b * nodes + node) * (HEADS * GROUP) + query) * DV
    real = mine[:, None] & (dim < DV)[None, :]
    tl.store(Out + out_at[:, None] + dim[None, :], tl.where(live, out, 0.0), mask=real)
    lse = tl.where(live, (most + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(Lse + (b * (HEADS * GROUP) + query) * nodes + node, lse, mask=mine)
