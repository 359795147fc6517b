"""Eagle3Head: the EAGLE-3 draft head (Li et al., arXiv 2503.01840), for training and for drafting.

    g_t    = fc(target layers at token t)                      a feature
    x_t    = [norm(embedding of token t + 1) ; norm(h_t)]      h_t = g_t, later its own output
    h'     = h_t + attention(x_t);  out = h' + mlp(norm(h'))   one decoder layer
    logits = lm_head(norm(out))                                over the draft vocabulary

Slot t predicts token t + 2. Training unrolls the head on its own output (`unroll`), drafting steps
it through a tree (`begin`, `commit`, `expand`); a test holds both to the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from specdec.caches.tree_cache import TreeCache
from specdec.errors import ConfigError
from specdec.heads.eagle3.causal_block import Spans
from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.draft_masks import ancestors_of_level, last_slots_see, level_sees
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary
from specdec.heads.eagle3.layer import Eagle3Layer, RotaryTable
from specdec.heads.eagle3.norm import RmsNorm, rms_norm
from specdec.heads.eagle3.stepped import SteppedLayer
from specdec.heads.eagle3.unrolled import UnrolledLayer

_NOT_ATTACHED = "the head has no embeddings or lm_head yet; call attach with the target's weights"
_COMMIT_CHUNK = 1024  # tokens of a long prompt that are taken in at a time


@dataclass
class HeadState:
    """Where the drafting of a batch stands.

    Attributes:
        layer: The head's layer, and what comes after it.
        cache: Keys and values of each row's verified slots, then of the levels being drafted.
        verified: Verified slots of each row.
        root: [B, 1, H] output of each row's last verified slot, before the final norm.
        root_fed: [B, 1, H] what that slot feeds to the first level.
        hidden: [B, W, H] what the nodes of the newest level feed to their children.
        levels: Levels drafted since the last commit.
        seen: [B, W, n] drafted nodes that each node of the newest level sees; None for chains.
    """

    layer: SteppedLayer
    cache: TreeCache
    verified: list[int]
    root: Tensor
    root_fed: Tensor
    hidden: Tensor
    levels: int = 0
    seen: Tensor | None = None


class Eagle3Head(nn.Module):
    """Implements `DraftHead`.

    The embedding is the target's and frozen; it is not part of the head until `attach` shares it or
    a checkpoint brings its own. `d2t` maps draft id i to target id i + d2t[i].

    Args:
        config: Shape and flags.
        own_embeddings: Make room for an embedding of the head's own.
        own_lm_head: Make room for an output matrix of the head's own; else `attach` shares rows of
            the target's.

    Attributes:
        owns_embeddings: The embeddings are the head's own and belong in its checkpoint.
        owns_lm_head: So is the output matrix.
    """

    d2t: Tensor | None
    t2d: Tensor | None

    def __init__(
        self, config: Eagle3Config, own_embeddings: bool = False, own_lm_head: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.owns_embeddings, self.owns_lm_head = own_embeddings, own_lm_head
        size, width, eps = config.hidden_size, config.feature_width, config.rms_norm_eps
        if config.hidden_act not in ACT2FN:
            raise ConfigError(f"hidden_act {config.hidden_act!r} is unknown")
        self.fc = nn.Linear(width, size, bias=config.fc_bias)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                RmsNorm(config.target_hidden_size, eps) for _ in config.aux_output_layers
            )
        if config.norm_before_fc:
            self.input_norm = RmsNorm(width, eps)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = RmsNorm(size, eps)
        self.lm_head: nn.Linear | None = None
        if own_lm_head:
            self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.embed_tokens: nn.Embedding | None = None
        if own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, size)
            self.embed_tokens.requires_grad_(False)
        compressed = config.draft_vocab_size < config.vocab_size
        self.register_buffer(
            "d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long) if compressed else None
        )
        self.register_buffer(
            "t2d",
            (torch.arange(config.vocab_size) < config.draft_vocab_size) if compressed else None,
        )
        self._rotary = RotaryTable(config)

    @property
    def step_weight(self) -> Tensor:
        """As `DraftHead` says."""
        return self.layer.mlp.gate_up_proj.weight

    @property
    def layer(self) -> Eagle3Layer:
        """The decoder layer."""
        return cast(Eagle3Layer, self.layers[0])

    def set_vocabulary(self, vocabulary: DraftVocabulary) -> None:
        """Takes over a draft vocabulary; raises `ConfigError` for one of other sizes."""
        wanted = self.config.draft_vocab_size, self.config.vocab_size
        if (len(vocabulary.ids), vocabulary.size) != wanted:
            raise ConfigError(
                f"the head drafts among {wanted[0]} of {wanted[1]} tokens, and its vocabulary "
                f"holds {len(vocabulary.ids)} of {vocabulary.size}; take the one that belongs to it"
            )
        if self.d2t is not None and self.t2d is not None:
            self.d2t.copy_(vocabulary.offsets)
            self.t2d.copy_(vocabulary.mask)

    @property
    def vocabulary(self) -> DraftVocabulary:
        """Its draft vocabulary."""
        order = torch.arange(self.config.draft_vocab_size, device=self.fc.weight.device)
        return DraftVocabulary(self.target_ids(order).cpu(), self.config.vocab_size)

    def attach(self, embeddings: Tensor, output_embeddings: Tensor | None = None) -> None:
        """Shares the target's embeddings [V, H], and its output matrix where the head has none.

        Raises:
            ConfigError: Their sizes do not fit.
        """
        wanted = self.config.vocab_size, self.config.hidden_size
        if self.embed_tokens is None:
            if embeddings.shape[0] < wanted[0] or embeddings.shape[1] != wanted[1]:
                raise ConfigError(
                    f"the head reads embeddings of {wanted[0]} tokens and hidden_size {wanted[1]}, "
                    f"the target has {tuple(embeddings.shape)}; this head is another model's"
                )
            if embeddings.is_meta:
                raise ConfigError(
                    "the target's embeddings are offloaded, and the head has none of its own; keep "
                    "them on a device (device_map), or use a head that brings its own"
                )
            weight = embeddings.detach()[: wanted[0]].to(self.fc.weight.device)
            self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=True)
        if self.lm_head is None:
            if output_embeddings is None or output_embeddings.shape[1] != wanted[1]:
                raise ConfigError("the head has no lm_head, and the target's does not fit it")
            rows = output_embeddings.detach()[: wanted[0]]
            rows = rows if self.t2d is None else rows[self.t2d.to(rows.device)]
            self.lm_head = nn.Linear(rows.shape[1], len(rows), bias=False, device="meta")
            self.lm_head.weight = nn.Parameter(rows.to(self.fc.weight).clone())

    def unattached(self) -> Eagle3Head:
        """As `DraftHead` says; the parameters are shared, so it drafts with what is learnt."""
        own = copy.copy(self)
        own._modules = dict(self._modules)
        if not self.owns_embeddings:
            own.embed_tokens = None
        if not self.owns_lm_head:
            own.lm_head = None
        return own

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Ids of the target for ids of the draft vocabulary."""
        return draft_ids if self.d2t is None else self.d2t.take(draft_ids).add_(draft_ids)

    def features(self, aux: Tensor) -> Tensor:
        """[..., H] from the target's concatenated hidden states [..., F]."""
        aux = aux.to(self.fc.weight.dtype)
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        if self.config.fc_norm:  # all layers at once
            parts = aux.unflatten(-1, (-1, self.config.target_hidden_size))
            weights: list[Tensor] = [cast(nn.RMSNorm, norm).weight for norm in self.fc_norm]
            aux = rms_norm(parts, torch.stack(weights), self.config.rms_norm_eps).flatten(-2)
        found: Tensor = self.fc(aux)
        return found

    def logits(self, normed: Tensor) -> Tensor:
        """[..., D] over the draft vocabulary, from states after the final norm."""
        if self.lm_head is None:
            raise ConfigError(_NOT_ATTACHED)
        found: Tensor = self.lm_head(normed)
        return found

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.embed_tokens is None:
            raise ConfigError(_NOT_ATTACHED)
        found: Tensor = self.embed_tokens(tokens)
        return found.to(self.fc.weight.dtype)  # the target's own may be in another

    def unroll(
        self,
        token_ids: Tensor,
        features: Tensor,
        steps: int,
        spans: Spans | None = None,
        recompute: bool = False,
        wanted: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """States [B, T, H] after the final norm, one TTT step after the other.

        Step s at slot t reads token t + 1 + s and its own state of step s - 1, and predicts token
        t + 2 + s. The last 2 + s slots of a document have nothing to predict.

        Args:
            token_ids: [B, T] int64.
            features: [B, T, H].
            steps: TTT steps.
            spans: Documents packed into each row.
            recompute: Keep no activations inside a step; the backward computes them again.
            wanted: [N] int64 slots, `row * T + t`, whose states are wanted; the others' are zeros.
        """
        length, layer = token_ids.shape[1], self.layer
        ahead = self._embed(functional.pad(token_ids, (0, steps)))
        unrolled = UnrolledLayer(layer, ahead, steps, spans, self.config.sliding_window, wanted)
        hidden = features
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step in range(steps):
            turn = self._rotary(slice(step, step + length), length + steps, features)
            inputs = step, hidden, turn, tuple(keys), tuple(values)
            if recompute and torch.is_grad_enabled():
                out, key, value = checkpoint(unrolled.step, *inputs, use_reentrant=False)
            else:
                out, key, value = unrolled.step(*inputs)
            keys.append(key)
            values.append(value)
            normed = self.norm(out)
            yield unrolled.spread(normed)
            hidden = normed if self.config.feed_post_norm else out

    def train_logits(
        self, token_ids: Tensor, features: Tensor, steps: int, spans: Spans | None = None
    ) -> Iterator[Tensor]:
        """Logits [B, T, D] of every training step, from `unroll`."""
        for normed in self.unroll(token_ids, features, steps, spans):
            yield self.logits(normed)

    def begin(self, rows: int, capacity: int) -> HeadState:
        """An empty state for `rows` rows, with room for `capacity` tokens each at first."""
        if self.embed_tokens is None or self.lm_head is None:
            raise ConfigError(_NOT_ATTACHED)
        outer = self.embed_tokens.weight, self.norm.weight, self.lm_head.weight
        layer, weight = SteppedLayer(self.layer, *outer), self.fc.weight
        cache = TreeCache(rows, weight.device, capacity)
        empty = weight.new_zeros(rows, 1, self.config.hidden_size)
        return HeadState(layer, cache, [0] * rows, empty, empty, empty)

    def commit(
        self, state: HeadState, tokens: Tensor, features: Tensor | None, counts: Sequence[int]
    ) -> Tensor:
        """Takes verified slots in; log-probabilities [B, D] of what follows each row's last one.

        Args:
            state: Of this batch, without drafted levels.
            tokens: [B, n] int64, the token *after* each slot, right-padded. Ids that the target has
                no embedding for are taken for the nearest one.
            features: [B, n, H] of the slots.
            counts: Slots of each row, 0 for a row that stands still.
        """
        if features is None:
            raise ValueError("an EAGLE-3 head drafts from features, got None")
        tokens = tokens.clamp(0, self.config.vocab_size - 1)
        cache, width = state.cache, tokens.shape[1]
        ends = None  # of each row; None where all slots are taken in
        if min(counts) < width:
            ends = torch.tensor(counts, device=tokens.device)[:, None, None]
        last: tuple[Tensor, Tensor] | None = None
        for start in range(0, width, _COMMIT_CHUNK):
            stop = min(start + _COMMIT_CHUNK, width)
            cache.reserve(stop - start)
            alike = cache.start is not None and ends is None
            residual, query, keys, values = self._entered(
                state, tokens[:, start:stop], features[:, start:stop]
            )
            last = _last_slots(residual, query, last, None if ends is None else ends - start)
            cache.set_lengths(
                [v + min(n, stop) for v, n in zip(state.verified, counts, strict=True)]
            )
        if last is None:
            raise ValueError("commit needs at least one slot, got tokens of width 0")
        state.verified = list(cache.host_lengths)
        visible = last_slots_see(cache, self.config.sliding_window, alike)
        out = state.layer.leave(last[1], keys, values, visible, last[0])
        state.root = out if ends is None else torch.where(ends > 0, out, state.root)
        found = self._log_probs(state, state.root)[:, 0]
        state.root_fed = state.hidden
        return found

    def expand(self, state: HeadState, tokens: Tensor, parents: Tensor) -> Tensor:
        """Goes one level deeper; log-probabilities [B, W, D] below its nodes.

        Args:
            state: Of this batch.
            tokens: [B, W] target ids of the level's nodes.
            parents: [B, W] which node of the level above each hangs under; 0 is the last verified
                slot when the level is the first.
        """
        width, level, cache = tokens.shape[1], state.levels, state.cache
        hidden = state.hidden
        if width > 1:
            index = parents[:, :, None].expand(-1, -1, hidden.shape[2])
            hidden = hidden.gather(1, index) if level else hidden.expand(-1, width, -1)
        cache.reserve(width)
        residual, query, keys, values = self._entered(state, tokens, hidden, level)
        if width > 1:
            state.seen = ancestors_of_level(state.seen, parents)
        visible = level_sees(cache, state.verified, state.seen, level, self.config.sliding_window)
        out = state.layer.leave(query, keys, values, visible, residual)
        state.levels += 1
        cache.set_lengths([n + width for n in cache.host_lengths])
        return self._log_probs(state, out)

    def _entered(
        self, state: HeadState, tokens: Tensor, hidden: Tensor, level: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Writes keys and values of [B, n] tokens into the cache.

        Args:
            state: Whose cache has room for them.
            tokens: Beside `hidden`.
            hidden: [B, n, H].
            level: Level of the draft that they are, all at one position; None for verified slots.

        Returns:
            Residual [B, n, H], queries [B, Hq, n, d], all visible keys and values [B, Hkv, K, d].
        """
        cache, width = state.cache, tokens.shape[1]
        positions: Tensor | slice
        if cache.start is not None:
            first = cache.start if level is None else state.verified[0] + level
            positions = slice(first, first + (width if level is None else 1))
        elif level is None:
            positions = cache.slots(width, tokens.device)
        else:
            positions = cache.lengths[:, None] - level * (width - 1)
        turn = self._rotary(positions, max(cache.host_lengths) + width, hidden)
        residual, query, key, value = state.layer.enter(tokens, hidden, turn)
        return residual, query, *cache.layer(0).update(key, value)

    def _log_probs(self, state: HeadState, out: Tensor) -> Tensor:
        """Log-probabilities [B, W, D] after outputs [B, W, H]; keeps what their children read."""
        normed, logits = state.layer.predict(out)
        state.hidden = normed if self.config.feed_post_norm else out
        return logits.float().log_softmax(-1)

    def rewind(self, state: HeadState) -> None:
        """Forgets all levels since the last `commit`."""
        state.cache.set_lengths(state.verified)
        state.seen, state.levels = None, 0
        state.hidden = state.root_fed


def _last_slots(
    residual: Tensor, query: Tensor, before: tuple[Tensor, Tensor] | None, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """([B, 1, H], [B, Hq, 1, d]) of each row's last slot: what comes next hangs on it alone.

    Args:
        residual: [B, n, H] of a chunk.
        query: [B, Hq, n, d] of the chunk.
        before: What was found in the chunks before, for rows that ended there.
        ends: [B, 1, 1] where the rows end, counted from the chunk's first slot; None for the end
            of the chunk.
    """
    if ends is None:
        return residual[:, -1:], query[:, :, -1:]
    index = (ends - 1).clamp(0, residual.shape[1] - 1)
    found = residual.gather(1, index.expand(-1, 1, residual.shape[2]))
    index = index[:, None].expand(-1, query.shape[1], 1, query.shape[3])
    found_query = query.gather(2, index)
    if before is None:
        return found, found_query
    here = ends > 0
    return torch.where(here, found, before[0]), torch.where(here[..., None], found_query, before[1])
