"""A teacher-forced pass over a head: by the library, and by formulas without it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from helpers import foreign_heads as foreign
from specdec.heads.eagle3.head import Eagle3Head

STEPS = 3


def logits(head: Eagle3Head) -> list[Tensor]:
    """Of a teacher-forced pass over random ids and features."""
    gen = torch.Generator().manual_seed(7)
    ids = torch.randint(0, foreign.V, (2, 11), generator=gen)
    aux = torch.randn(2, 11, head.config.feature_width, generator=gen)
    head.attach(foreign.embeddings())
    with torch.no_grad():
        return list(head.train_logits(ids, head.features(aux), STEPS))


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def reference(kind: foreign.Variant) -> list[Tensor]:
    """The same pass by formulas, with nothing of the library in it."""
    w = foreign.tensors(kind)
    gen = torch.Generator().manual_seed(7)
    ids = torch.randint(0, foreign.V, (2, 11), generator=gen)
    aux = torch.randn(2, 11, 3 * kind.target, generator=gen)
    emb, length = foreign.embeddings(), 11

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    def heads(x: Tensor, name: str, count: int, shift: int) -> Tensor:
        out = functional.linear(
            x,
            w[f"layers.0.self_attn.{name}_proj.weight"],
            w.get(f"layers.0.self_attn.{name}_proj.bias"),
        )
        out = out.view(2, length, count, kind.dim)
        if kind.qk_norm and name != "v":
            out = norm(out, w[f"layers.0.self_attn.{name}_norm.weight"])
        out = out.transpose(1, 2)
        if name == "v":
            return out
        inv = 5000.0 ** (-torch.arange(0, kind.dim, 2).float() / kind.dim)
        angle = (torch.arange(length) + shift)[:, None].float() * inv
        angle = torch.cat([angle, angle], -1)
        left, right = out.chunk(2, -1)
        return out * angle.cos() + torch.cat([-right, left], -1) * angle.sin()

    if kind.norm_before_fc:
        aux = norm(aux, w["input_norm.weight"])
    if kind.fc_norm:
        parts = aux.chunk(3, -1)
        aux = torch.cat([norm(x, w[f"fc_norm.{i}.weight"]) for i, x in enumerate(parts)], -1)
    hidden = functional.linear(aux, w["fc.weight"], w.get("fc.bias"))
    tokens, keys, values, found = ids, [], [], []
    causal = torch.full((length, length), float("-inf")).triu(1)
    for step in range(STEPS):
        tokens = functional.pad(tokens[:, 1:], (0, 1))
        normed = norm(hidden, w["layers.0.hidden_norm.weight"])
        x = torch.cat([norm(emb[tokens], w["layers.0.input_layernorm.weight"]), normed], -1)
        query = heads(x, "q", kind.heads, step)
        group = kind.heads // kind.kv
        keys.append(heads(x, "k", kind.kv, step).repeat_interleave(group, 1))
        values.append(heads(x, "v", kind.kv, step).repeat_interleave(group, 1))
        scores = [query @ keys[0].transpose(-1, -2) / kind.dim**0.5 + causal]
        scores += [(query * k).sum(-1, keepdim=True) / kind.dim**0.5 for k in keys[1:]]
        weights = torch.cat(scores, -1).softmax(-1)
        out = weights[..., :length] @ values[0]
        for i, v in enumerate(values[1:]):
            out = out + weights[..., length + i, None] * v
        out = functional.linear(
            out.transpose(1, 2).flatten(2),
            w["layers.0.self_attn.o_proj.weight"],
            w.get("layers.0.self_attn.o_proj.bias"),
        )
        middle = (normed if kind.nbr else hidden) + out
        y = norm(middle, w["layers.0.post_attention_layernorm.weight"])
        gate, up = (
            functional.linear(
                y, w[f"layers.0.mlp.{name}_proj.weight"], w.get(f"layers.0.mlp.{name}_proj.bias")
            )
            for name in ("gate", "up")
        )
        out = middle + functional.linear(
            functional.silu(gate) * up,
            w["layers.0.mlp.down_proj.weight"],
            w.get("layers.0.mlp.down_proj.bias"),
        )
        after = norm(out, w["norm.weight"])
        found.append(functional.linear(after, w["lm_head.weight"]))
        hidden = after if kind.post else out
    return found
