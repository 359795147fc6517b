"""ChainTarget: models that cannot verify a tree verify one path a row, by snapshot and re-feed.

For convolutional, recurrent and hybrid models, and for attention that cannot place a tree (ALiBi).
Prompt and steps take the way of plain `generate`: the model prepares its own inputs, with masks,
positions and a cache of its own kind. When a draft is rejected, a state cannot be cut: the row goes
back to where it stood, and the tokens that were right are fed again in front of the next draft:
`state length + re-fed tokens == emitted - 1` (I1 for chains). Drafters and statistics never see
the re-fed tokens; a round's budget pays for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.caches.state_cache import check_layers, revocable
from specdec.contracts import BatchState, Shape, ShowPrompt, TargetOutput
from specdec.hf.compat import input_device, max_positions
from specdec.hf.names import cache_argument
from specdec.hf.steps import max_slots, step_inputs
from specdec.round.tree import TreeBatch
from specdec.targets.prompts import PaddedPrompt, Taps

_SETTLING_CHUNK = 64  # tokens a forward when the state is brought up to the end of the text


class ChainTarget:
    """Implements `TargetModel` with chains only.

    Args:
        model: A model whose self-test chose chain mode.
        prompt: The prompt of the call.
        state: The rows; emitted tokens are read from it when they have to be fed again.
        taps: Layers whose output hidden states the drafter reads.
    """

    allowed_shape: Shape = "chain"

    def __init__(
        self, model: Any, prompt: PaddedPrompt, state: BatchState, taps: tuple[int, ...] = ()
    ) -> None:
        self.model, self._prompt, self._state = model, prompt, state
        self._taps = Taps(taps, model.config)
        self.prefill_forwards = 0
        self._cache_name, cache = cache_argument(prompt.kwargs)
        padding = prompt.padding
        self.cache = revocable(cache, padding)
        # Known tokens of each row that the state holds; the pending one never is.
        self._covered = [len(tokens) for tokens in state.tokens]
        self._device = input_device(model)
        self._limit, self._slots = max_positions(model.config), max_slots(model.config)
        self._last_positions: Tensor | None = prompt.positions
        self._known = list(self._covered)
        self._host_lengths = [prompt.total - columns for columns in padding]
        self._lengths = torch.tensor(self._host_lengths, device=self._device)
        self._fed = 0  # tokens a row of the forward that is not committed yet

    @property
    def lengths(self) -> Tensor:
        """[B] int64 position of each row's pending token."""
        return self._lengths

    @property
    def refeed(self) -> int:
        """Accepted tokens that the state of the row furthest behind does not hold."""
        return max(self._missing())

    def _missing(self) -> list[int]:
        """Tokens of each row to be fed again; none for ended rows, whose outcome is ignored."""
        state = self._state
        return [
            len(tokens) - 1 - covered if active else 0
            for tokens, covered, active in zip(
                state.tokens, self._covered, state.active, strict=True
            )
        ]

    def depth_limit(self) -> int:
        """Levels below the root for which every row has a position."""
        longest = max(self._host_lengths)
        return min(self._limit - 1 - longest, self._slots - 1 - self.cache.width)

    def prefill(self, show: ShowPrompt | None = None) -> TargetOutput:
        """Runs the prompt as plain `generate` runs it; logits [B, 1, V] of the last tokens."""
        own = {self._cache_name: self.cache.cache, **self._taps.arguments()}
        with self._taps.collected(self.model) as features:
            output = self._prompt.run(self.model, **own)
        check_layers(self.cache.cache, self._prompt.batch)
        self.prefill_forwards = len(self._prompt.chunks)
        self._prompt.show(show, features, self._device)
        return TargetOutput(output.logits[:, -1:])

    @torch.no_grad()
    def forward_tree(self, trees: TreeBatch) -> TargetOutput:
        """One forward over the tokens to be fed again and the chains below them."""
        missing = self._missing()
        again, size = max(missing), trees.size
        tokens = trees.tokens
        if again:
            tokens = self._behind(tokens, missing)
        output = self._feed(tokens, [n + size for n in missing], size + again - min(missing))
        logits, features = output.logits, self._taps.features(output)
        if len(set(missing)) > 1:
            # The head ran over the last `size + again - min(missing)` tokens of every row.
            rows = torch.arange(size, device=logits.device)
            first = torch.tensor(missing, device=logits.device) - min(missing)
            index = (first[:, None] + rows)[:, :, None]
            cut = logits[:, -(size + again - min(missing)) :]
            logits = cut.gather(1, index.expand(-1, -1, logits.shape[-1]))
            if features is not None:
                cut = features[:, -(size + again - min(missing)) :]
                features = cut.gather(1, index.expand(-1, -1, features.shape[-1]))
            return TargetOutput(logits, features)
        return TargetOutput(logits[:, -size:], None if features is None else features[:, -size:])

    def _behind(self, tokens: Tensor, missing: Sequence[int]) -> Tensor:
        """[B, again + T] every row's missing tokens, then its chain, then filling."""
        again, size = max(missing), tokens.shape[1]
        fed = [
            row[covered : covered + count] + [0] * (again - count)
            for row, covered, count in zip(self._state.tokens, self._covered, missing, strict=True)
        ]
        both = torch.cat([torch.tensor(fed, device=tokens.device), tokens], dim=1)
        order = [
            [*range(count), *range(again, again + size), *[again + size - 1] * (again - count)]
            for count in missing
        ]
        return both.gather(1, torch.tensor(order, device=tokens.device))

    def _feed(self, tokens: Tensor, live: Sequence[int], heads: int) -> Any:
        """Runs `tokens` [B, q] on top of the state, which can be put back until it is committed.

        Row b holds `live[b]` tokens, and filling behind them; the last `heads` get logits.
        """
        self._fed = tokens.shape[1]
        self.cache.hold()
        kwargs = {
            **self._prompt.kwargs,
            self._cache_name: self.cache.cache,
            "attention_mask": self.cache.mask(self._fed, tokens.device),
            "position_ids": self._positions(self._fed, live),
            **self._taps.arguments(),
        }
        return self.model(**step_inputs(self.model, tokens, kwargs, heads), return_dict=True)

    def _positions(self, count: int, live: Sequence[int]) -> Tensor | None:
        """Positions of the coming tokens in the layout of the model, [..., B, count]."""
        known = self._last_positions
        if known is None:
            return None
        fed = [covered - prompt for covered, prompt in zip(self._covered, self._known, strict=True)]
        start = known[..., -1] + 1 + torch.tensor(fed, device=known.device)
        positions = start[..., None] + torch.arange(count, device=known.device)
        # Filling may lie beyond a learned table, and nobody looks at its outcome. The text itself
        # may go beyond what a model declares, as with plain `generate`.
        last = start + torch.tensor(live, device=known.device) - 1
        return positions.minimum(last.clamp(min=self._limit - 1)[..., None]).to(self._device)

    def commit(self, path: Tensor, accepted: Sequence[Sequence[int]], rows: Sequence[bool]) -> None:
        """Keeps what was accepted, or, where a state took a rejected token too, goes back."""
        missing = self._missing()
        right = [
            count + 1 + len(nodes) if active else 0
            for count, nodes, active in zip(missing, accepted, rows, strict=True)
        ]
        if self.cache.has_state:
            right = [count if count == self._fed else 0 for count in right]
        self.cache.keep(right, self._fed)
        self._covered = [c + count for c, count in zip(self._covered, right, strict=True)]
        steps = [
            1 + len(nodes) if active else 0 for nodes, active in zip(accepted, rows, strict=True)
        ]
        self._lengths = self._lengths + torch.tensor(steps, device=self._device)
        self._host_lengths = [n + step for n, step in zip(self._host_lengths, steps, strict=True)]

    def rollback(self) -> None:
        """Returns the state to the last commit (I7)."""
        self.cache.put_back()

    @torch.no_grad()
    def settle(
        self, texts: Sequence[Sequence[int]], logits: bool = False
    ) -> Iterator[tuple[TargetOutput, list[int], list[int]]]:
        """Brings the state up to the end of `texts` [B][n]: tokens after the prompt, padding too.

        Rows need not advance alike: those that are not fed go back.

        Args:
            logits: Whether all logits of the forwards are wanted, or the last ones will do.

        Yields:
            Every forward's output, the step of each row whose token its first node gives, and the
            nodes of each row.
        """
        while True:
            done = [c - prompt for c, prompt in zip(self._covered, self._known, strict=True)]
            left = [list(text[n:]) for text, n in zip(texts, done, strict=True)]
            if not any(left):
                return
            count = min([len(tokens) for tokens in left if tokens] + [_SETTLING_CHUNK])
            fed = [(tokens + [0] * count)[:count] for tokens in left]
            kept = [count if tokens else 0 for tokens in left]
            output = self._feed(
                torch.tensor(fed, device=self._device), kept, count if logits else 1
            )
            self.cache.keep(kept, count)
            self._covered = [c + n for c, n in zip(self._covered, kept, strict=True)]
            if logits:
                steps = [n + 1 for n in done]
                yield TargetOutput(output.logits[:, -count:]), steps, kept
