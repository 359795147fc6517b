"""Tree attention as programs for a GPU: keys in splits, and what puts the splits together.

A program of `attend_split` takes a block of rows through one split of the keys. Rows are packed
node by node: the GROUP query heads of node 0 that share a key head, then those of node 1, and so
on, so that a key is read once for all of them and neighbours share a word of the mask. bfloat16
appears in loads, stores and operands of `_dot` alone: elsewhere the interpreter computes with its
bits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1.0e30)
"""Score of what a row does not see: finite, so that a tile without a visible key stays a number."""


@triton.jit
def _dot(a, b, UP: tl.constexpr):
    """The product a @ b in float32; UP, for the interpreter, widens its operands first."""
    if UP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b.to(a.dtype), input_precision="ieee")


@triton.jit
def _scores(products, scale, SOFTCAP: tl.constexpr):
    """Scores in units of log2(e), so that exp2 of them is the softmax's weight."""
    if SOFTCAP > 0:
        # tanh through exp2; its series where the difference from 1 would lose the digits.
        x = products * (scale / SOFTCAP)
        square = x * x
        series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
        whole = 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)
        return tl.where(square < 0.04, series, whole) * (SOFTCAP * LOG2E)
    else:
        return products * (scale * LOG2E)


@triton.jit
def _first_seen(depth, prefix, start, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """First position that a node at `depth` sees, counted from `prefix`: negative in the prefix.

    Padding, window and chunk all end what a node sees at its far end; an ancestor is never ahead of
    it.
    """
    first = start - prefix + depth * 0  # one for each of them
    if WINDOW > 0:
        first = tl.maximum(first, depth - WINDOW + 1)
    if CHUNK > 0:
        first = tl.maximum(first, depth - (prefix + depth - start) % CHUNK)
    return first


@triton.jit
def _nothing(ROWS: tl.constexpr, PAD_V: tl.constexpr):
    """The online softmax before its first key: (largest score, sum of weights, weighted values)."""
    most, total = tl.full([ROWS], MASKED, tl.float32), tl.zeros([ROWS], tl.float32)
    return most, total, tl.zeros([ROWS, PAD_V], tl.float32)


@triton.jit
def _absorb(
    q, K, V, slot, real, seen, most, total, mixed, scale, Table, k_b, k_s, v_b, v_s, t_p,
    DK: tl.constexpr, DV: tl.constexpr, PAD_K: tl.constexpr, PAD_V: tl.constexpr,
    PAGE: tl.constexpr, SOFTCAP: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The online softmax after one more tile of keys.

    K and V point at the row and head, with pages at the head; `slot` is read where `real`, and
    `seen` [rows, keys] says which row it counts for.
    """
    # 1. Where the slots lie.
    if PAGE > 0:
        page = tl.load(Table + (slot // PAGE) * t_p, mask=real, other=0).to(tl.int64)
        inside = (slot % PAGE).to(tl.int64)
        k_at, v_at = page * k_b + inside * k_s, page * v_b + inside * v_s
    else:
        k_at, v_at = slot.to(tl.int64) * k_s, slot.to(tl.int64) * v_s
    # 2. Scores of keys [dim, keys]; a dimension that is no power of two is padded by zeros.
    dim, k_real = tl.arange(0, PAD_K), real[None, :]
    if DK < PAD_K:
        k_real = k_real & (dim < DK)[:, None]
    k = tl.load(K + k_at[None, :] + dim[:, None], mask=k_real, other=0.0)
    score = tl.where(seen, _scores(_dot(q, k, UP), scale, SOFTCAP), MASKED)
    # 3. What came before fades by how far the largest score rose.
    larger = tl.maximum(most, tl.max(score, 1))
    weight = tl.where(seen, tl.exp2(score - larger[:, None]), 0.0)
    fade = tl.exp2(most - larger)
    total = total * fade + tl.sum(weight, 1)
    # 4. Values.
    dim_v, v_real = tl.arange(0, PAD_V), real[:, None]
    if DV < PAD_V:
        v_real = v_real & (dim_v < DV)[None, :]
    v = tl.load(V + v_at[:, None] + dim_v[None, :], mask=v_real, other=0.0)
    mixed = mixed * fade[:, None] + _dot(weight.to(q.dtype), v, UP)
    return larger, total, mixed


@triton.jit
def _share(oldest, end, split, KEYS: tl.constexpr):
    """First and last-but-one slot of a split: the splits share [oldest, end) in whole tiles."""
    splits = tl.num_programs(2)
    width = tl.cdiv(tl.cdiv(end - oldest, splits), KEYS) * KEYS
    return oldest + split * width, oldest + (split + 1) * width


@triton.jit
def attend_split(
    Q, K, V, KScale, Words, Depth, Size, Prefix, Start, Table, PartOut, PartLse, scale, nodes,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, w_b, w_t, w_w, d_b, d_t, t_b, t_p,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PAD_K: tl.constexpr, PAD_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_START: tl.constexpr, K_SCALED: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Output and log2-sum-exp of a block of rows over one split of the keys, -inf if it is empty.

    Program (block, row of the batch x key head, split). PartOut [pairs, splits, nodes x GROUP, DV]
    and PartLse without DV are float32.
    """
    block, pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, head = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    prefix, size = tl.load(Prefix + b).to(tl.int32), tl.load(Size + b).to(tl.int32)
    start = tl.load(Start + b).to(tl.int32) if HAS_START else 0
    scale = scale * tl.load(KScale + head) if K_SCALED else scale
    # 1. The rows' queries; padded nodes have none.
    row, dim = block * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD_K)
    node = (row // GROUP).to(tl.int64)
    live = node < size
    q_at = Q + b * q_b + (head * GROUP + row % GROUP) * q_h + node * q_t
    q_real = live[:, None] & (dim < DK)[None, :]
    q = tl.load(q_at[:, None] + dim[None, :], mask=q_real, other=0.0)
    first = _first_seen(tl.load(Depth + b * d_b + node * d_t, mask=live, other=0), prefix, start,
                        WINDOW, CHUNK)  # fmt: skip
    # 2. The splits share what the root sees of the prefix, and the tree, which is the last one's.
    oldest = prefix + _first_seen(0, prefix, start, WINDOW, CHUNK)
    low, high = _share(oldest, prefix + size, split, KEYS)
    busy = block * ROWS < size * GROUP  # a block of padding reads nothing
    high = tl.where(busy, tl.minimum(high, prefix), low)
    tail = tl.where(busy & (split == tl.num_programs(2) - 1), size, 0)
    K, V = K + head * k_h, V + head * v_h
    if PAGE > 0:
        Table += b * t_b
    else:
        K, V = K + b * k_b, V + b * v_b
    most, total, mixed = _nothing(ROWS, PAD_V)
    # 3. The prefix: every row sees it from its own first position on.
    for begin in range(low, high, KEYS):
        slot = begin + tl.arange(0, KEYS)
        seen = (slot < high)[None, :]
        if WINDOW + CHUNK > 0:
            seen = seen & ((slot - prefix)[None, :] >= first[:, None])
        most, total, mixed = _absorb(
            q, K, V, slot, slot < high, seen, most, total, mixed, scale, Table, k_b, k_s, v_b, v_s,
            t_p, DK, DV, PAD_K, PAD_V, PAGE, SOFTCAP, UP)  # fmt: skip
    # 4. The tree: a tile is a part of a word's 64 nodes. Too few of them to be worth staging.
    for begin in tl.range(0, tail, KEYS, num_stages=2):
        other = begin + tl.arange(0, KEYS)
        word = tl.load(Words + b * w_b + node * w_t + begin // 64 * w_w, mask=live, other=0)
        seen = (((word[:, None] >> (other % 64)[None, :]) & 1) != 0) & (other < size)[None, :]
        if WINDOW + CHUNK > 0:
            depth = tl.load(Depth + b * d_b + other * d_t, mask=other < size, other=0)
            seen = seen & (depth[None, :] >= first[:, None])
        most, total, mixed = _absorb(
            q, K, V, prefix + other, other < size, seen, most, total, mixed, scale, Table, k_b, k_s,
            v_b, v_s, t_p, DK, DV, PAD_K, PAD_V, PAGE, SOFTCAP, UP)  # fmt: skip
    _store_part(PartOut, PartLse, pair, split, row, nodes * GROUP, most, total, mixed, DV, PAD_V)


@triton.jit
def _store_part(
    PartOut, PartLse, pair, split, row, rows, most, total, mixed, DV: tl.constexpr,
    PAD_V: tl.constexpr,
):  # fmt: skip
    """Writes a split's output, normalised, and its log2-sum-exp."""
    dim, mine, some = tl.arange(0, PAD_V), row < rows, total > 0
    weights = tl.where(some, total, 1.0)
    at = (pair.to(tl.int64) * tl.num_programs(2) + split) * rows + row
    tl.store(PartLse + at, tl.where(some, most + tl.log2(weights), float("-inf")), mask=mine)
    real = mine[:, None] & (dim < DV)[None, :]
    tl.store(PartOut + at[:, None] * DV + dim[None, :], mixed / weights[:, None], mask=real)


@triton.jit
def combine_splits(
    PartOut, PartLse, VScale, Sinks, Size, Out, Lse, nodes, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, PAD_V: tl.constexpr,
    ROWS: tl.constexpr, HAS_SINKS: tl.constexpr, V_SCALED: tl.constexpr,
):  # fmt: skip
    """Output [B, nodes, Hq, DV] and natural log-sum-exp [B, Hq, nodes] from those of all splits.

    Program (block of rows, row of the batch x key head). Padded nodes become zero and -inf.
    """
    pair = tl.program_id(1)
    b, head = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    row, dim = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD_V)
    node, query, mine = row // GROUP, head * GROUP + row % GROUP, row < nodes * GROUP
    real = mine[:, None] & (dim < DV)[None, :]
    at = pair.to(tl.int64) * splits * nodes * GROUP + row
    # 1. The largest of all, so that no power overflows; a sink is one more score of its head.
    most = tl.full([ROWS], float("-inf"), tl.float32)
    if HAS_SINKS:
        most = tl.load(Sinks + query, mask=mine, other=0.0).to(tl.float32) * LOG2E
    sink = most
    for split in range(splits):
        part = tl.load(PartLse + at + split * nodes * GROUP, mask=mine, other=float("-inf"))
        most = tl.maximum(most, part)
    most = tl.where(most == float("-inf"), 0.0, most)
    # 2. Every split counts by its sum of weights.
    total = tl.exp2(sink - most)
    out = tl.zeros([ROWS, PAD_V], tl.float32)
    for split in range(splits):
        here = at + split * nodes * GROUP
        weight = tl.exp2(tl.load(PartLse + here, mask=mine, other=float("-inf")) - most)
        part = tl.load(PartOut + here[:, None] * DV + dim[None, :], mask=real, other=0.0)
        out += part * weight[:, None]
        total += weight
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    if V_SCALED:
        out = out * tl.load(VScale + head)
    # 3. Padded nodes hold whatever the splits left there.
    live = node < tl.load(Size + b)
    out_at = (b * nodes + node) * (HEADS * GROUP) + query
    out = tl.where(live[:, None], out, 0.0)
    tl.store(Out + out_at[:, None] * DV + dim[None, :], out, mask=real)
    lse = tl.where(live, (most + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(Lse + (b * (HEADS * GROUP) + query) * nodes + node, lse, mask=mine)
