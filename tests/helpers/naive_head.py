"""An EAGLE-3 head and its dynamic tree by the definition: no cache, no batch, no parallel levels.

Li et al., arXiv 2503.01840 and 2406.16858. Every path is computed from the first token on, in
float64, with nothing of the head but its weights and flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec.heads.eagle3.head import Eagle3Head

Path = tuple[int, ...]
LogProbs = Callable[[Path], Tensor]
"""Log-probabilities over the draft vocabulary of what follows the text and a path."""


def normed(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(states: Tensor, base: float) -> Tensor:
    """Rotary embedding of [heads, T, d], halves layout, at positions 0, 1, ..."""
    half = states.shape[2] // 2
    angles = torch.arange(states.shape[1])[:, None] / base ** (torch.arange(half) / half)
    left, right = states.split(half, -1)
    cos, sin = angles.double().cos(), angles.double().sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


@dataclass(frozen=True)
class NaiveHead:
    """A head beside a text.

    Attributes:
        head: Attached, in float64.
        text: Known tokens, the pending one included.
        aux: [len(text) - 1, F], the target's concatenated states of all of them but the pending
            one: slot t holds the state of token t and is read beside token t + 1.
    """

    head: Eagle3Head
    text: Sequence[int]
    aux: Tensor
    _outputs: dict[Path, Tensor] = field(default_factory=dict)

    def log_probs(self, path: Path) -> Tensor:
        """[D] of what follows the text and `path`."""
        weight = self.head.norm.weight
        after = normed(self._output(path), weight, self.head.config.rms_norm_eps)
        assert self.head.lm_head is not None
        return functional.linear(after, self.head.lm_head.weight).log_softmax(-1)

    def _output(self, path: Path) -> Tensor:
        """[H], the layer's output at the last slot of the text and `path`."""
        if path not in self._outputs:
            above = [self._output(path[:length])[None] for length in range(len(path))]
            if self.head.config.feed_post_norm:
                weight, eps = self.head.norm.weight, self.head.config.rms_norm_eps
                above = [normed(out, weight, eps) for out in above]
            hidden = torch.cat([self._features(), *above])
            self._outputs[path] = self._layer([*self.text[1:], *path], hidden)[-1]
        return self._outputs[path]

    def _features(self) -> Tensor:
        config, head = self.head.config, self.head
        aux = self.aux
        if config.norm_before_fc:
            aux = normed(aux, head.input_norm.weight, config.rms_norm_eps)
        if config.fc_norm:
            norms: Any = head.fc_norm
            parts = aux.split(config.target_hidden_size, -1)
            aux = torch.cat([normed(part, norm.weight, config.rms_norm_eps)
                             for part, norm in zip(parts, norms, strict=True)], -1)  # fmt: skip
        return functional.linear(aux, head.fc.weight, head.fc.bias)

    def _layer(self, tokens: Sequence[int], hidden: Tensor) -> Tensor:
        """[T, H], the layer's output at every slot."""
        config, layer, eps = self.head.config, self.head.layer, self.head.config.rms_norm_eps
        attention, (queries, keys) = layer.self_attn, layer.self_attn.heads
        assert self.head.embed_tokens is not None
        embedded = self.head.embed_tokens.weight[torch.tensor(tokens)].double()
        state = normed(hidden, layer.hidden_norm.weight, eps)
        residual = state if config.norm_before_residual else hidden
        entered = torch.cat([normed(embedded, layer.input_layernorm.weight, eps), state], -1)
        joined = functional.linear(entered, attention.qkv_proj.weight, attention.qkv_proj.bias)
        heads = joined.view(len(tokens), -1, config.head_dim).transpose(0, 1)
        query, key, value = heads.split([queries, keys, keys])
        if config.qk_norm:
            query = normed(query, attention.q_norm.weight, eps)
            key = normed(key, attention.k_norm.weight, eps)
        base = float(config.rope["rope_theta"])
        query, key = turned(query, base), turned(key, base)
        key, value = (one.repeat_interleave(queries // keys, 0) for one in (key, value))
        back = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
        seen = (back >= 0) & (back < (config.sliding_window or len(tokens)))
        weights = query @ key.transpose(1, 2) / config.head_dim**0.5
        attended = weights.masked_fill(~seen, -math.inf).softmax(-1) @ value
        out = residual + functional.linear(
            attended.transpose(0, 1).flatten(1), attention.o_proj.weight
        )
        gate, up = functional.linear(
            normed(out, layer.post_attention_layernorm.weight, eps), layer.mlp.gate_up_proj.weight
        ).chunk(2, -1)
        return out + functional.linear(functional.silu(gate) * up, layer.mlp.down_proj.weight)


@dataclass(frozen=True)
class Sizes:
    """Options of `eagle3`.

    Attributes:
        depth: Levels.
        top_k: Candidates below a continued node; 1 for a chain.
        nodes: Nodes kept.
        beam: Nodes continued at every level.
        confidence_threshold: No level is added where no continued path of any row is as likely.
    """

    depth: int
    top_k: int
    nodes: int
    beam: int
    confidence_threshold: float = 0.0


def dynamic_trees(
    rows: Sequence[LogProbs], target_id: Callable[[int], int], sizes: Sizes
) -> list[list[tuple[Path, float]]]:
    """(path, score) of the nodes of every row's tree, the likeliest first.

    A score is the sum of log-probabilities along the path. The `top_k` best tokens below each of
    the `beam` best paths of a level are the next level; of all levels, the best are kept.
    """
    found: list[list[tuple[Path, float]]] = [[] for _ in rows]
    frontiers: list[list[tuple[Path, float]]] = [[((), 0.0)] for _ in rows]
    for _ in range(sizes.depth):
        likeliest = max(score for frontier in frontiers for _, score in frontier)
        if sizes.confidence_threshold and likeliest < math.log(sizes.confidence_threshold):
            break
        for row, log_probs in enumerate(rows):
            level = []
            for path, score in frontiers[row]:
                values = log_probs(path).tolist()
                best = sorted(range(len(values)), key=lambda index: -values[index])
                for index in best[: sizes.top_k]:
                    level.append(((*path, target_id(index)), score + values[index]))
            found[row] += level
            frontiers[row] = sorted(level, key=lambda one: -one[1])[: sizes.beam]
    return [sorted(row, key=lambda one: -one[1])[: sizes.nodes] for row in found]
