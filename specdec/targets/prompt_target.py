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

from typing import Any

from torch import Tensor

from specdec.caches.tree_cache import TreeCache
from specdec.caches.user_cache import adopt_cache, own_copy
from specdec.contracts import ShowPrompt, TargetOutput
from specdec.hf.names import CACHE
from specdec.hf.steps import step_inputs
from specdec.targets.prompts import PaddedPrompt, Prompt
from specdec.targets.tree_target import HFTarget

_ADDED_ANEW = (CACHE, "use_cache", "return_dict")


class PromptTarget(HFTarget):
    """Implements `TargetModel`; only the prompt and the positions differ from `HFTarget`.

    Args:
        model: A model whose self-test chose tree mode.
        prompt: The prompt of the call.
        cache: Empty tree cache with room for the prompt.
        taps: Layers whose output hidden states the drafter reads.
        hidden_states: Return all layers' hidden states.
    """

    def __init__(
        self,
        model: Any,
        prompt: PaddedPrompt,
        cache: TreeCache,
        taps: tuple[int, ...] = (),
        hidden_states: bool = False,
    ) -> None:
        rows = Prompt(None, None, [len(kept) for kept in prompt.slots])
        super().__init__(model, rows, cache, taps, hidden_states)
        self._padded = prompt
        offsets = prompt.offsets()
        self._offsets = offsets.to(cache.lengths.device)
        highest = offsets.reshape(-1, offsets.shape[-1]).amax(0)
        self._shifts = highest.expand(len(prompt.slots)).tolist()

    def prefill(self, show: ShowPrompt | None = None) -> TargetOutput:
        """Runs the prompt as plain `generate` runs it; logits [B, 1, V] of the last tokens."""
        own = own_copy(self._padded.kwargs[CACHE])
        with self.taps.collected(self.model) as features:
            output = self._padded.run(self.model, **{CACHE: own}, **self.taps.arguments())
        self.prefill_forwards = len(self._padded.chunks)
        self.adopt(own, release=True)
        self._padded.show(show, features, self.cache.lengths.device)
        # With padding, as plain returns them: of the last chunk.
        return TargetOutput(output.logits[:, -1:], hidden_states=self.taps.every_state(output))

    def adopt(self, cache: Any, *, release: bool = False) -> None:
        """Takes over a cache that holds the whole prompt."""
        adopt_cache(cache, self.cache, self._padded.slots, release=release)

    def _step(
        self, tokens: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor] | None
    ) -> TargetOutput:
        kwargs = {
            **self._padded.kwargs,
            CACHE: self.cache,
            "attention_mask": masks,
            "position_ids": self._offsets[..., None] + positions,
        }
        inputs = step_inputs(self.model, tokens, kwargs, tokens.shape[1])
        return self._forward(**{n: v for n, v in inputs.items() if n not in _ADDED_ANEW})
