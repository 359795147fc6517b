"""HFTarget: a Hugging Face model behind a `TreeCache`, and the only caller of the model.

One forward verifies a whole batch of token trees: explicit positions (row length + depth), and who
sees whom either as a 4-D additive mask, one by layer type, with sliding and chunked windows taken
by position, or as the tree itself, which fused attention reads. No modelling code is copied or
patched.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from specdec.caches.tree_cache import TreeCache
from specdec.contracts import Shape, ShowPrompt, TargetOutput
from specdec.hf.attention import attention_by, dense_attention
from specdec.hf.compat import MaskKinds, max_positions, supports_logits_to_keep
from specdec.hf.names import CACHE
from specdec.round.tree import TreeBatch
from specdec.targets.prompts import Prompt, Taps, show_rows
from specdec.targets.tree_attention import TreeAttention, placeholders
from specdec_kernels import Backend, Tree, tree_words


class HFTarget:
    """Implements `TargetModel` for a Hugging Face causal language model.

    Args:
        model: Any decoder-only model whose self-test chose tree mode.
        prompt: What `prefill` will run.
        cache: Empty, or holding an adopted prefix.
        taps: Layers whose output hidden states the drafter reads.
        hidden_states: Return all layers' hidden states.
        prefill_chunk: Tokens a prefill forward, or None for all at once.
        backend: What runs tree attention; None for dense masks.

    Attributes:
        reads_in_place: Whether tree attention was given the cache's own buffers, not copies.
    """

    allowed_shape: Shape = "any"
    refeed = 0

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        cache: TreeCache,
        taps: tuple[int, ...] = (),
        hidden_states: bool = False,
        prefill_chunk: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.model, self.prompt, self.cache = model, prompt, cache
        self.prefill_forwards, self.reads_in_place = 0, True
        self._backend = backend
        self._placeholders: dict[torch.dtype, Tensor | dict[str, Tensor]] = {}
        self._prefill_chunk = prefill_chunk
        self.taps = Taps(taps, model.config, hidden_states)
        self._kinds = MaskKinds.of(model.config)
        self._dtype: torch.dtype = model.dtype  # asking walks all parameters
        self._positions = max_positions(model.config)
        self._keeps_logits = supports_logits_to_keep(model)
        self._shifts = [0] * len(prompt.counts)  # highest position of a token, less its slot

    @property
    def lengths(self) -> Tensor:
        """[B] int64 committed slots of each row."""
        return self.cache.lengths

    def depth_limit(self) -> int:
        """Levels below the root for which every row has a position, learned or declared.

        A draft must not index past a learned table where plain decoding would have ended before.
        """
        ahead = zip(self.cache.host_lengths, self._shifts, strict=True)
        return self._positions - 1 - max(length + shift for length, shift in ahead)

    def prefill(self, show: ShowPrompt | None = None) -> TargetOutput:
        """Runs the prompt and returns logits [B, 1, V] of each row's last token."""
        counts, cache = self.prompt.counts, self.cache
        width, before = max(counts), list(cache.host_lengths)
        step = self._prefill_chunk or width
        logits: dict[int, Tensor] = {}
        hidden: list[tuple[Tensor, ...]] = []
        for start in range(0, width, step):
            stop = min(start + step, width)
            ending = {row: n - 1 - start for row, n in enumerate(counts) if start < n <= stop}
            columns = sorted(set(ending.values()))
            output = self._prefill_chunk_forward(start, stop, columns)
            self.prefill_forwards += 1
            for row, column in ending.items():
                kept = columns.index(column) if self._keeps_logits else column
                logits[row] = output.logits[row, kept]
            if output.hidden_states is not None:
                hidden.append(output.hidden_states)
            if show is not None and self.prompt.token_ids is not None:
                shown = [min(count, stop) - start for count in counts]
                offsets = [length + start for length in before]
                show_rows(
                    show, self.prompt.token_ids[:, start:stop], output.features, shown, offsets
                )
            cache.set_lengths([length + stop for length in before])
        cache.set_lengths([n + count for n, count in zip(before, counts, strict=True)])
        last = torch.stack([logits[row] for row in range(len(counts))])[:, None]
        layers = zip(*hidden, strict=True)
        whole = tuple(torch.cat(layer, 1) for layer in layers) if hidden else None
        return TargetOutput(last, hidden_states=whole)

    def _prefill_chunk_forward(self, start: int, stop: int, columns: list[int]) -> TargetOutput:
        width = stop - start
        self.cache.reserve(width, "live")
        device = self.cache.lengths.device
        positions = self.cache.lengths[:, None] + torch.arange(width, device=device)
        masks = None  # rows of one length: Hugging Face builds the causal mask itself
        if self.cache.start is None:
            masks = self._masks(TreeBatch.chains(positions), positions)
        keep: dict[str, Any] = {}
        if self._keeps_logits:
            keep["logits_to_keep"] = torch.tensor(columns or [0], device=device)
        return self._forward(
            **self.prompt.chunk(start, stop), position_ids=positions, attention_mask=masks, **keep
        )

    def forward_tree(self, trees: TreeBatch) -> TargetOutput:
        """One forward over all nodes of all rows; their cache slots stay provisional."""
        if self._backend is not None:
            return self._attend(trees, self._backend)
        self.cache.reserve(trees.size)
        if trees.size == 1 and self.cache.start is not None:
            return self._step(trees.tokens, self.cache.lengths[:, None], None)
        positions = self.cache.lengths[:, None] + trees.depths()
        return self._step(trees.tokens, positions, self._masks(trees, positions))

    def _attend(self, trees: TreeBatch, backend: Backend) -> TargetOutput:
        """As `forward_tree`, by fused attention: no mask, and no length that the host knows."""
        cache = self.cache
        cache.reserve(trees.size, "capacity")
        words, depth = tree_words(trees.parents)
        tree = Tree(words, depth, trees.sizes, cache.lengths)
        attention = TreeAttention(tree, self._kinds, cache, backend)
        dtype = self._mask_dtype(words.device)
        if dtype not in self._placeholders:
            self._placeholders[dtype] = placeholders(self._kinds, dtype, words.device)
        with attention_by(self.model, attention.attend):
            positions = cache.lengths[:, None] + depth
            output = self._step(trees.tokens, positions, self._placeholders[dtype])
        attention.check_calls()
        self.reads_in_place = self.reads_in_place and attention.in_place
        return output

    def _step(
        self, tokens: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor] | None
    ) -> TargetOutput:
        """A forward over `tokens` [B, T]; `positions` count from the row's first slot."""
        return self._forward(input_ids=tokens, position_ids=positions, attention_mask=masks)

    def _forward(self, **inputs: Any) -> TargetOutput:
        inputs |= self.taps.arguments()
        masked = inputs.get("attention_mask") is not None
        with dense_attention(self.model) if masked else nullcontext():
            output = self.model(**inputs, **{CACHE: self.cache}, use_cache=True, return_dict=True)
        taps = self.taps
        return TargetOutput(output.logits, taps.features(output), taps.every_state(output))

    def _masks(self, trees: TreeBatch, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """Additive masks [B, 1, T, K]: float, because some families add what they are given."""
        dtype = self._mask_dtype(positions.device)
        floor = torch.finfo(dtype).min
        seen: Tensor | None = None
        masks = {}
        for kind in self._kinds.kinds:
            if self.cache.start is not None and not self._kinds.reaches(kind, self.cache.stop):
                masks[kind] = self._tail_mask(trees, dtype, floor)
                continue
            seen = self._seen(trees) if seen is None else seen
            windowed = self._kinds.is_windowed(kind)
            visible = seen & self._window(kind, positions) if windowed else seen
            masks[kind] = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, floor)[
                :, None
            ]
        return masks if self._kinds.as_dict else masks[self._kinds.kinds[0]]

    def _tail_mask(self, trees: TreeBatch, dtype: torch.dtype, floor: float) -> Tensor:
        """The mask of rows of one length, no window in reach: only tree against tree matters."""
        ancestors = trees.ancestor_mask()
        batch, width, _ = ancestors.shape
        mask = torch.zeros(batch, 1, width, self.cache.stop, dtype=dtype, device=ancestors.device)
        mask[:, 0, :, -width:].masked_fill_(~ancestors, floor)
        return mask

    def _seen(self, trees: TreeBatch) -> Tensor:
        """[B, T, K] bool: committed slots of the row, and the node's ancestors."""
        cache, width = self.cache, trees.size
        written = cache.slots(width, cache.lengths.device)
        slots = torch.arange(cache.stop, device=cache.lengths.device)
        seen = (slots < cache.lengths[:, None])[:, None, :].expand(-1, width, -1)
        return seen.scatter(2, written[:, None, :].expand(-1, width, -1), trees.ancestor_mask())

    def _window(self, kind: str, positions: Tensor) -> Tensor:
        """[B, T, K] bool: slots whose position lies in the layer type's window."""
        cache = self.cache
        written = cache.slots(positions.shape[1], positions.device)
        keys = torch.arange(cache.stop, device=positions.device).expand(len(written), -1)
        keys = keys.scatter(1, written, positions)
        return self._kinds.within(kind, positions[:, :, None], keys[:, None, :])

    def _mask_dtype(self, device: torch.device) -> torch.dtype:
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self._dtype

    def commit(self, path: Tensor, accepted: Sequence[Sequence[int]], rows: Sequence[bool]) -> None:
        """Keeps root and accepted nodes: then the cache holds all but the pending token (I1)."""
        self.cache.commit(path, accepted, rows)

    def rollback(self) -> None:
        """Nothing to undo: provisional slots lie beyond the committed lengths (I7)."""
