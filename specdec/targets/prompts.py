"""The prompt of a call: as `generate` laid it out, and without its padding.

`PaddedPrompt` is the one place that knows which column of the padded batch is which token of which
row. Trees run rows that are packed to the left (`Prompt`); chains, images and odd positions run the
batch as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from specdec.contracts import ShowPrompt
from specdec.hf import compat
from specdec.hf.names import cache_argument
from specdec.hf.states import tapped_states
from specdec.hf.steps import MULTIMODAL, cached_length, prefill_as_plain, step_inputs


@dataclass(frozen=True, slots=True)
class Prompt:
    """The part of the prompt that is not in the cache yet, rows packed to the left.

    Attributes:
        token_ids: [B, n] int64, right-padded; None when only embeddings were given.
        embeds: [B, n, H] input embeddings that replace the ids, or None.
        counts: New tokens of each row, each at least 1.
    """

    token_ids: Tensor | None
    embeds: Tensor | None
    counts: list[int]

    def chunk(self, start: int, stop: int) -> dict[str, Tensor]:
        """Columns `start:stop` as the model's input argument."""
        if self.embeds is not None:
            return {"inputs_embeds": self.embeds[:, start:stop]}
        if self.token_ids is None:
            raise ValueError("a prompt needs token_ids or embeds")
        return {"input_ids": self.token_ids[:, start:stop]}


@dataclass(frozen=True)
class PaddedPrompt:
    """The prompt as `generate` prepared it, rows padded on the left.

    Attributes:
        input_ids: [B, S] ids; [B, 0] when only embeddings were given.
        config: The call's generation configuration.
        kwargs: Model keyword arguments, cache included.
    """

    input_ids: Tensor
    config: Any
    kwargs: Mapping[str, Any]

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.input_ids)

    @property
    def embeds(self) -> Tensor | None:
        """[B, n, H] input embeddings in the place of ids."""
        return self.kwargs.get("inputs_embeds")

    @property
    def mask(self) -> Tensor | None:
        """[B, total] attention mask; None where nothing is padded."""
        return self.kwargs.get("attention_mask")

    @property
    def positions(self) -> Tensor | None:
        """[..., B, n] positions."""
        return self.kwargs.get("position_ids")

    @property
    def cache(self) -> Any:
        """The cache of the call, or None."""
        return cache_argument(self.kwargs)[1]

    @property
    def given(self) -> int:
        """Columns of ids or embeddings."""
        return self.input_ids.shape[1] if self.embeds is None else self.embeds.shape[1]

    @cached_property
    def past(self) -> int:
        """Columns that the cache already holds."""
        return cached_length(self.kwargs)

    @cached_property
    def total(self) -> int:
        """Columns of the padded layout, what the cache already holds included."""
        return compat.prompt_length(self.config, self.mask, self.given, self.past)

    @cached_property
    def slots(self) -> list[Tensor]:
        """Per row, the columns of the padded layout that hold tokens, in order."""
        if self.mask is None:
            return [torch.arange(self.total)] * self.batch
        return [row.nonzero()[:, 0].cpu() for row in self.mask]

    @property
    def padding(self) -> list[int]:
        """Per row, the columns in front of its first token."""
        return [int(row[0]) for row in self.slots]

    @property
    def chunks(self) -> list[int]:
        """Columns of each of plain's forwards over the prompt."""
        width = self.total - self.past
        step = self.config.prefill_chunk_size or width
        return [min(step, width - start) for start in range(0, width, step)]

    @property
    def inputs_given(self) -> list[str]:
        """Model inputs that hold something: without an image, `generate` passes an empty dict."""
        values = self.kwargs.items()
        return [n for n, v in values if v is not None and not (isinstance(v, dict) and not v)]

    @cached_property
    def own_inputs(self) -> list[str]:
        """Inputs that the model has to prepare for the prompt itself: images, odd positions."""
        found = [name for name in self.inputs_given if name in MULTIMODAL]
        return found if self._has_default_positions() else [*found, "position_ids"]

    def _has_default_positions(self) -> bool:
        """Whether positions are, in every dimension, those that the attention mask implies."""
        positions = self.positions
        if positions is None:
            return True
        if positions.ndim < 2 or positions.shape[-1] > self.total:
            return False
        if positions.shape[-2] not in (1, self.batch):
            return False
        if self.mask is None:
            wanted = torch.arange(self.total, device=positions.device)[None]
        else:
            wanted = (self.mask.long().cumsum(-1) - 1).masked_fill(self.mask == 0, 0)
        wanted = wanted[:, self.total - positions.shape[-1] :]
        return bool((positions == wanted).all())

    def offsets(self) -> Tensor:
        """[..., B] int64 position of each row's last token, less the tokens before it."""
        positions: Tensor = self.kwargs["position_ids"]
        before = [len(kept) - 1 for kept in self.slots]
        return positions[..., -1] - torch.tensor(before, device=positions.device)

    @property
    def ahead(self) -> int:
        """How far positions run ahead of the slots of their rows."""
        return max(int(self.offsets().max()), 0) if self.own_inputs else 0

    def run(self, model: Any, **more: Any) -> Any:
        """The output of plain's forward over the prompt; `more` replaces keyword arguments."""
        return prefill_as_plain(model, self.input_ids, self.config, {**self.kwargs, **more})

    def continued(self, model: Any, tokens: Tensor, **more: Any) -> Tensor:
        """[B, n, V] logits of one forward over `tokens` [B, n] behind a cache with the prompt.

        Mask and positions are those of the model's own preparation; `more` holds the cache.
        """
        width = tokens.shape[1]
        positions = self.kwargs["position_ids"]
        ahead = torch.arange(1, width + 1, device=positions.device)
        mask = self.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), width)], dim=1)
        kwargs = {
            **self.kwargs,
            **more,
            "attention_mask": mask,
            "position_ids": positions[..., -1:] + ahead,
        }
        inputs = step_inputs(model, tokens, kwargs, width)
        logits: Tensor = model(**inputs, return_dict=True).logits
        return logits

    def rows(self) -> list[list[int]]:
        """Known ids by row, without padding; none where embeddings were given."""
        if self.embeds is not None:
            return [[] for _ in range(self.batch)]
        first = self.total - self.given  # column of the layout that the ids start at
        ids = self.input_ids.tolist()
        kept = ([int(slot) - first for slot in row if slot >= first] for row in self.slots)
        return [[row[i] for i in index] for row, index in zip(ids, kept, strict=True)]

    @cached_property
    def counts(self) -> list[int]:
        """New tokens of each row."""
        return [int((kept >= self.past).sum()) for kept in self.slots]

    def pack(self, values: Tensor) -> Tensor:
        """[B, n, ...] new tokens' values without padding, from `values` [B, w, ...] of the last w
        columns; zeros for new tokens in front of those."""
        packed = values.new_zeros(self.batch, max(self.counts), *values.shape[2:])
        first = self.total - values.shape[1]
        for row, kept in enumerate(self.slots):
            new = kept[kept >= self.past]
            there = (new >= first).nonzero()[:, 0]
            packed[row, there.to(values.device)] = values[
                row, (new[there] - first).to(values.device)
            ]
        return packed

    def packed(self, device: torch.device) -> Prompt:
        """The rows without padding and without what the cache holds."""
        if self.embeds is not None:
            return Prompt(None, self.pack(self.embeds.to(device)), self.counts)
        return Prompt(self.pack(self.input_ids.to(device)), None, self.counts)

    def laid_out(self, packed: Tensor) -> Tensor:
        """[B, w, H] padded as plain returns it, from `packed` [B, n, H]: of the last chunk."""
        padded = packed.new_zeros(self.batch, self.total - self.past, packed.shape[-1])
        for row, kept in enumerate(self.slots):
            columns = kept[kept >= self.past] - self.past
            padded[row, columns.to(packed.device)] = packed[row, : len(columns)]
        return padded[:, -self.chunks[-1] :].clone()

    def show(self, show: ShowPrompt | None, features: Sequence[Tensor], device: Any) -> None:
        """Shows the new tokens to a drafter, where there are ids.

        Args:
            show: As `Drafter.observe_prefill`, or None.
            features: [B, w, F] of each forward over the prompt, padded; none without taps.
            device: Of the ids shown.
        """
        if show is None or self.embeds is not None:
            return
        counts, ids = self.counts, self.input_ids.to(device)
        before = [len(kept) - count for kept, count in zip(self.slots, counts, strict=True)]
        shown = self.pack(torch.cat(list(features), 1)) if features else None
        show_rows(show, self.pack(ids), shown, counts, before)


def show_rows(
    show: ShowPrompt,
    token_ids: Tensor,
    features: Tensor | None,
    counts: Sequence[int],
    offsets: Sequence[int],
) -> None:
    """Shows packed rows, those of one length and offset at a time.

    Args:
        show: As `Drafter.observe_prefill`.
        token_ids: [B, n].
        features: [B, n, F], or None.
        counts: Tokens of each row; rows without any are not shown.
        offsets: Position of each row's first token.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (count, offset) in enumerate(zip(counts, offsets, strict=True)):
        if count > 0:
            groups.setdefault((count, offset), []).append(row)
    for (count, offset), rows in groups.items():
        part = None if features is None else features[rows, :count]
        show(rows, token_ids[rows, :count], part, offset)


class Taps:
    """The hidden states that are wanted of a model's forwards.

    Args:
        layers: Layers whose output the drafter reads.
        config: Of the model.
        all_states: Whether the call returns those of all layers.
    """

    def __init__(self, layers: tuple[int, ...], config: Any, all_states: bool = False) -> None:
        self._layers, self._config, self.all_states = layers, config, all_states

    def arguments(self) -> dict[str, Any]:
        """What asks a forward for them."""
        if self.all_states:
            return {"output_hidden_states": True}
        if not self._layers:
            return {}
        return {"output_hidden_states": compat.hidden_states_argument(self._layers)}

    def features(self, output: Any) -> Tensor | None:
        """[B, T, F] of a forward, concatenated; None where the drafter reads none."""
        if not self._layers:
            return None
        return tapped_states(output.hidden_states, self._layers, self._config)

    def every_state(self, output: Any) -> tuple[Tensor, ...] | None:
        """Per layer [B, T, H], when the call returns them."""
        return tuple(output.hidden_states) if self.all_states else None

    @contextmanager
    def collected(self, model: Any) -> Iterator[list[Tensor]]:
        """[B, n, F] features of every forward: a prompt in chunks returns the last one's alone."""
        found: list[Tensor] = []

        def keep(_model: Any, _inputs: Any, output: Any) -> None:
            features = self.features(output)
            if features is not None:
                found.append(features)

        hook = model.register_forward_hook(keep)
        try:
            yield found
        finally:
            hook.remove()
