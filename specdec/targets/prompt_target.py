"""PromptTarget: token trees behind a prompt that runs as plain `generate` runs it.

For prompts with images, whose attention need not be causal and whose positions may have several
dimensions, and for positions of the user's own. The model prepares its inputs itself, in a cache of
its own kind and with padding where the batch is padded; the tree cache then takes over the rows
without their padding. Behind the prompt plain decoding goes on by one position a token in every
dimension, so a node's position is its slot plus an offset that stays.

An id that stands for a part of an image is a token like any other behind the prompt, in a draft as
in plain decoding: `generate` hands the image to the prompt's forward only, and the model embeds the
id as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.caches.tree_cache import TreeCache
from specdec.caches.user_cache import adopt_cache, own_copy
from specdec.contracts import ShowPrompt, TargetOutput
from specdec.hf.names import CACHE
from specdec.hf.steps import prefill_as_plain, step_inputs
from specdec.targets.tree_target import HFTarget, Prompt

_ADDED_ANEW = (CACHE, "use_cache", "return_dict")


@dataclass(frozen=True, slots=True)
class PlainPrompt:
    """What `generate` prepared.

    Attributes:
        input_ids: [B, S] left-padded ids; [B, 0] when only embeddings were given.
        kwargs: Model keyword arguments as `generate` prepared them, cache included.
        slots: Per row, the columns of the padded layout that hold tokens, in order.
        total: Columns of the padded layout, what the cache already holds included.
        past: Columns that the cache already holds.
    """

    input_ids: Tensor
    generation_config: Any
    kwargs: Mapping[str, Any]
    slots: Sequence[Tensor]
    total: int
    past: int = 0

    def run(self, model: Any, cache: Any, **more: Any) -> Any:
        """The output of plain's forward over the prompt, in `cache`."""
        kwargs = {**self.kwargs, CACHE: cache, **more}
        return prefill_as_plain(model, self.input_ids, self.generation_config, kwargs)

    def continued(self, model: Any, cache: Any, tokens: Tensor) -> Tensor:
        """[B, n, V] logits of one forward over `tokens` [B, n] in a cache that holds the prompt.

        Mask and positions are those of the model's own preparation.
        """
        width = tokens.shape[1]
        positions = self.kwargs["position_ids"]
        ahead = torch.arange(1, width + 1, device=positions.device)
        mask = self.kwargs.get("attention_mask")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), width)], dim=1)
        kwargs = {
            **self.kwargs,
            CACHE: cache,
            "attention_mask": mask,
            "position_ids": positions[..., -1:] + ahead,
        }
        inputs = step_inputs(model, tokens, kwargs, width)
        logits: Tensor = model(**inputs, return_dict=True).logits
        return logits

    def offsets(self) -> Tensor:
        """[..., B] int64 position of each row's last token, less the tokens before it."""
        positions: Tensor = self.kwargs["position_ids"]
        before = [len(kept) - 1 for kept in self.slots]
        return positions[..., -1] - torch.tensor(before, device=positions.device)

    def new_columns(self) -> list[Tensor]:
        """Per row, where its new tokens sit in what the forward over the prompt returns."""
        return [kept[kept >= self.past] - self.past for kept in self.slots]

    @property
    def forwards(self) -> int:
        """Forwards that the prompt takes."""
        chunk = self.generation_config.prefill_chunk_size
        return -(-(self.total - self.past) // chunk) if chunk else 1


class PromptTarget(HFTarget):
    """Implements `TargetModel`; only the prompt and the positions differ from `HFTarget`.

    Args:
        model: A model whose self-test chose tree mode.
        cache: Empty tree cache with room for the prompt.
        taps: Layers whose output hidden states the drafter reads.
        hidden_states: Return all layers' hidden states.
    """

    def __init__(
        self,
        model: Any,
        prompt: PlainPrompt,
        cache: TreeCache,
        taps: tuple[int, ...] = (),
        hidden_states: bool = False,
    ) -> None:
        rows = Prompt(None, None, [len(kept) for kept in prompt.slots])
        super().__init__(model, rows, cache, taps, hidden_states)
        self._plain = prompt
        offsets = prompt.offsets()
        self._offsets = offsets.to(cache.lengths.device)
        highest = offsets.reshape(-1, offsets.shape[-1]).amax(0)
        self._shifts = highest.expand(len(prompt.slots)).tolist()

    def prefill(self, show: ShowPrompt | None = None) -> TargetOutput:
        """Runs the prompt as plain `generate` runs it; logits [B, 1, V] of the last tokens."""
        own = own_copy(self._plain.kwargs[CACHE])
        with self._collected_features() as features:
            output = self._plain.run(self.model, own, **self._wanted_states())
        self.prefill_forwards = self._plain.forwards
        self.adopt(own, release=True)
        self._show_prompt(show, torch.cat(features, 1) if features else None)
        # With padding, as plain returns them: of the last chunk.
        hidden = tuple(output.hidden_states) if self._all_hidden else None
        return TargetOutput(output.logits[:, -1:], hidden_states=hidden)

    @contextmanager
    def _collected_features(self) -> Iterator[list[Tensor]]:
        """[B, n, F] features of every forward: a prompt in chunks returns the last one's alone."""
        found: list[Tensor] = []

        def keep(_model: Any, _inputs: Any, output: Any) -> None:
            features = self._features(output)
            if features is not None:
                found.append(features)

        hook = self.model.register_forward_hook(keep)
        try:
            yield found
        finally:
            hook.remove()

    def adopt(self, cache: Any, *, release: bool = False) -> None:
        """Takes over a cache that holds the whole prompt."""
        adopt_cache(cache, self.cache, self._plain.slots, release=release)

    def _packed(self, states: Tensor) -> Tensor:
        """[B, n, H] a row's states without padding, from those of plain's last forward."""
        columns = self._plain.new_columns()
        missing = self._plain.total - self._plain.past - states.shape[1]  # of earlier chunks
        packed = states.new_zeros(len(columns), max(map(len, columns)), states.shape[-1])
        for row, index in enumerate(columns):
            there = (index >= missing).nonzero()[:, 0]
            packed[row, there.to(states.device)] = states[
                row, (index[there] - missing).to(states.device)
            ]
        return packed

    def _show_prompt(self, show: ShowPrompt | None, features: Tensor | None) -> None:
        """Shows the prompt, rows of one length and offset at a time."""
        prompt = self._plain
        if show is None or prompt.kwargs.get("inputs_embeds") is not None:
            return
        ids = prompt.input_ids.to(self.cache.lengths.device)
        first = prompt.total - ids.shape[1]  # column of the layout that the ids start at
        groups: dict[tuple[int, int], list[int]] = {}
        columns = prompt.new_columns()
        for row, (new, kept) in enumerate(zip(columns, prompt.slots, strict=True)):
            groups.setdefault((len(new), len(kept) - len(new)), []).append(row)
        shown = None if features is None else self._packed(features)
        for (size, offset), rows in groups.items():
            at = torch.stack([columns[row] for row in rows]).to(ids.device) + prompt.past - first
            part = ids[rows].gather(1, at)
            show(rows, part, None if shown is None else shown[rows, :size], offset)

    def _step(
        self, tokens: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor] | None
    ) -> TargetOutput:
        kwargs = {
            **self._plain.kwargs,
            CACHE: self.cache,
            "attention_mask": masks,
            "position_ids": self._offsets[..., None] + positions,
        }
        inputs = step_inputs(self.model, tokens, kwargs, tokens.shape[1])
        return self._forward(**{n: v for n, v in inputs.items() if n not in _ADDED_ANEW})
