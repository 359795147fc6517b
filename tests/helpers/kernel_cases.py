"""Inputs of the tree-attention kernels, with the answer in float64 from the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import Tree, tree_words

NAN = float("nan")


def random_parents(size: int, generator: torch.Generator, bushy: int = 6) -> list[int]:
    """Parents of a random tree; the smaller `bushy`, the deeper."""
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    return [-1, *(draw(max(0, node - bushy), node) for node in range(1, size))]


@dataclass(frozen=True)
class Case:
    """What the shapes and features of a call are.

    Attributes:
        nodes: T.
        prefix: Committed slots of each row.
        heads: (query heads, key heads).
        dim: Head dimension of keys, and of values unless `value_dim` is set.
        sizes: Live nodes of each row; None for all of them.
        start: First slot of each row, or None.
        page: Slots of a page; 0 for a contiguous cache.
        cache: Type of the cache; None for that of the queries.
        one_tree: Whether all rows share one tree, through words without a row stride.
        bushy: As in `random_parents`.
    """

    nodes: int
    prefix: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    dim: int = 16
    value_dim: int = 0
    sizes: tuple[int, ...] | None = None
    start: tuple[int, ...] | None = None
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    page: int = 0
    cache: torch.dtype | None = None
    one_tree: bool = False
    bushy: int = 6
    lengths: torch.dtype = torch.int32
    seed: int = 0


@dataclass
class Call:
    """A case made into tensors.

    Attributes:
        arguments: Positional arguments of `tree_attention`: q, k, v and the tree.
        options: Its keyword arguments.
        visible: [B, T, S] bool, by the definition.
        keys: [B, Hkv, S, D] as the definition reads them, `values` too; zero where nobody looks.
        live: [B, T] bool.
        cache: Keys and values [B, Hkv, S, D] as they were before they came in pages.
        parents: Of each row.
    """

    arguments: tuple[Tensor, Tensor, Tensor, Tree]
    options: dict[str, Any]
    visible: Tensor
    keys: Tensor
    values: Tensor
    live: Tensor
    cache: tuple[Tensor, Tensor]
    parents: list[list[int]]
    case: Case

    def expected(self, wide: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T], computed in `wide`."""
        return attention(self, wide)


def made(case: Case, dtype: torch.dtype) -> Call:
    """The tensors of a case; whatever no live node sees is NaN, queries of padding included."""
    generator = torch.Generator().manual_seed(case.seed)
    rows, (query_heads, heads) = len(case.prefix), case.heads
    slots = max(case.prefix) + case.nodes + 3
    slots += -slots % (case.page or 1)
    parents = torch.tensor([random_parents(case.nodes, generator, case.bushy) for _ in range(rows)])
    if case.one_tree:
        parents = parents[:1].expand(rows, -1)
    words, depth = tree_words(parents)
    sizes = torch.tensor(case.sizes or [case.nodes] * rows, dtype=torch.int32)
    live = torch.arange(case.nodes) < sizes[:, None]
    visible = seen_by_definition(case, parents.tolist(), depth.tolist(), slots)
    # 1. Queries as a model hands them over: a transposed view.
    q = torch.randn(rows, case.nodes, query_heads, case.dim, generator=generator)
    q = q.masked_fill(~live[:, :, None, None], NAN).to(dtype).transpose(1, 2)
    # 2. The cache, poisoned.
    value_dim = case.value_dim or case.dim
    seen = visible.any(1)[:, None, :, None]
    scales = torch.rand(2, heads, generator=generator) + 0.5
    kept, read = [], []
    for dim, scale in ((case.dim, scales[0]), (value_dim, scales[1])):
        x = torch.randn(rows, heads, slots, dim, generator=generator).to(case.cache or dtype)
        kept.append(torch.where(seen, x.float(), NAN).to(case.cache or dtype))
        factor = scale[:, None, None].double() if case.cache else 1.0
        read.append(torch.where(seen, x.double() * factor, 0.0))
    # 3. Padding of the tree holds nonsense.
    if not case.one_tree:
        words = words.masked_fill(~live[:, :, None], -1)
        depth = depth.masked_fill(~live, 1 << 20)
    tree = Tree(
        words[:1] if case.one_tree else words, depth[:1] if case.one_tree else depth, sizes,
        torch.tensor(case.prefix, dtype=case.lengths),
    )  # fmt: skip
    options: dict[str, Any] = {
        "scale": case.dim**-0.5, "window": case.window, "chunk": case.chunk,
        "softcap": case.softcap,
    }  # fmt: skip
    if case.sinks:
        options["sinks"] = torch.randn(query_heads, generator=generator).to(dtype)
    if case.start:
        options["kv_start"] = torch.tensor(case.start, dtype=case.lengths)
    if case.cache:
        options["k_scale"], options["v_scale"] = scales
    cache = (kept[0], kept[1])
    if case.page:
        kept, options["block_table"] = paged(kept, case.page, generator)
    return Call((q, kept[0], kept[1], tree), options, visible, read[0], read[1], live, cache,
                parents.tolist(), case)  # fmt: skip


def one_token(call: Call, row: int, node: int, spare: int = 1) -> Call:
    """A node as the next token of a text: its path is committed, and nothing else is in the batch.

    The cache is contiguous, and has `spare` slots more than the text takes.
    """
    q, _, _, tree = call.arguments
    path, at = [node], node
    while (at := call.parents[row][at]) >= 0:
        path.insert(0, at)
    prefix = int(tree.prefix[row])
    text = [*range(prefix), *(prefix + other for other in path)]
    kept = []
    for x in call.cache:
        slots = torch.full((1, x.shape[1], len(text) + spare, x.shape[3]), NAN).to(x.dtype)
        for place, slot in enumerate(text):
            slots[0, :, place] = x[row, :, slot]
        kept.append(slots)
    alone = Tree(
        torch.ones(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32), torch.tensor([len(text) - 1]),
    )  # fmt: skip
    options = {name: value for name, value in call.options.items() if name != "block_table"}
    if "kv_start" in options:
        options["kv_start"] = options["kv_start"][row : row + 1]
    query = q[row : row + 1, :, node : node + 1]
    return replace(call, arguments=(query, kept[0], kept[1], alone), options=options)


def seen_by_definition(
    case: Case, parents: list[list[int]], depth: list[list[int]], slots: int
) -> Tensor:
    """[B, T, S] bool, node by node: the committed slots in reach, itself and its ancestors."""
    visible = torch.zeros(len(case.prefix), case.nodes, slots, dtype=torch.bool)
    for row, prefix in enumerate(case.prefix):
        start = case.start[row] if case.start else 0
        for node in range(case.sizes[row] if case.sizes else case.nodes):
            keys = {slot: slot for slot in range(start, prefix)}
            at = node
            while at >= 0:
                keys[prefix + at] = prefix + depth[row][at]
                at = parents[row][at]
            own = prefix + depth[row][node]
            for slot, position in keys.items():
                near = not case.window or own - position < case.window
                same = (
                    not case.chunk
                    or (own - start) // case.chunk == (position - start) // case.chunk
                )
                visible[row, node, slot] = near and same
    return visible


def attention(call: Call, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Masked softmax attention with every product and sum in `wide`."""
    q = call.arguments[0].nan_to_num().to(wide)
    group = q.shape[1] // call.keys.shape[1]
    keys = call.keys.to(wide).repeat_interleave(group, 1)
    values = call.values.to(wide).repeat_interleave(group, 1)
    scores = q @ keys.transpose(-1, -2) * call.options["scale"]
    if call.case.softcap:
        scores = call.case.softcap * torch.tanh(scores / call.case.softcap)
    scores = scores.masked_fill(~call.visible[:, None], -math.inf)
    if "sinks" in call.options:
        sink = call.options["sinks"].to(wide)[None, :, None, None]
        scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1)
    lse = scores.logsumexp(-1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[2]]
    out = (weights @ values).transpose(1, 2)
    out = out.masked_fill(~call.live[:, :, None, None], 0.0)
    return out, lse.masked_fill(~call.live[:, None], -math.inf)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error, over the whole tensor."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def usual_error(call: Call) -> float:
    """What torch's own attention errs by on the same inputs, in their type."""
    q, k, _, _ = call.arguments
    dtype, expected = q.dtype, call.expected()[0]
    if call.case.softcap or call.case.sinks:  # which torch's fused attention does not have
        return error(attention(call, dtype)[0], expected)
    found = torch.nn.functional.scaled_dot_product_attention(
        q.nan_to_num(), call.keys.to(dtype), call.values.to(dtype), call.visible[:, None],
        scale=call.options["scale"], enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    found = found.transpose(1, 2).masked_fill(~call.live[:, :, None, None], 0.0)
    return error(found, expected)


def paged(
    caches: list[Tensor], page: int, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """The caches [B, H, S, D] as pages [P, H, page, D] in a random order, and the block table."""
    rows, heads, slots, _ = caches[0].shape
    count = rows * slots // page
    order = torch.randperm(count, generator=generator)
    pages = []
    for x in caches:
        cut = x.view(rows, heads, slots // page, page, -1).transpose(1, 2).flatten(0, 1)
        pool = torch.empty_like(cut)
        for place, content in zip(order.tolist(), cut, strict=True):
            pool[place] = content
        pages.append(pool)
    return pages, order.view(rows, -1).int()
