"""Features from the live target: a plain Hugging Face model, no server.

Documents that are packed into rows are taken apart for the target: each is read from position 0 in
a right-padded batch without a mask. Nothing of a causal model looks to the right, so this is exact
for every architecture, also for those that no block mask could tell documents apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.errors import UnsupportedModelError
from specdec.hf.compat import hidden_states_argument, input_device, supports_logits_to_keep
from specdec.hf.states import tapped_states
from specdec_training.contracts import Document, FeatureBatch, TokenBatch

_PADDING = 1.15  # slots over tokens that a forward may have
_MULTIPLE = 32  # of the width of a forward: libraries prepare, and keep, code for every new shape
_PROBE_TOKENS = 5


class OnlineFeatures:
    """Runs the target on every batch; implements `FeatureSource`.

    Args:
        target: A causal language model in evaluation mode; its parameters are frozen.
        layers: Layers, from 0, whose output the head reads; -1 stands for the embeddings.
        device: Where features are wanted; None for the target's own.
        low: Arithmetic of the products that make features where the target is in fp32; None for
            the target's own.

    Raises:
        UnsupportedModelError: The logits cannot be recomputed from the last hidden state.
    """

    def __init__(
        self,
        target: Any,
        layers: Sequence[int],
        device: torch.device | None = None,
        low: torch.dtype | None = None,
    ) -> None:
        self._target = target.eval().requires_grad_(False)
        self._layers = tuple(layers)
        self._place = input_device(target)
        self._device = device or self._place
        config = target.config.get_text_config()
        self._last = config.num_hidden_layers - 1
        self._cap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        self._scale = (scale or 1.0) / (divisor or 1.0)
        self._extra = {"logits_to_keep": 1} if supports_logits_to_keep(target) else {}
        self._low = low if target.dtype == torch.float32 else None
        self._check()

    @torch.no_grad()
    def features(self, batch: TokenBatch) -> FeatureBatch:
        """The batch's features; slots outside all documents hold zeros."""
        aux = last = None
        for group in _groups(batch.documents):
            token_ids = _unpacked(batch.token_ids, group).to(self._place)
            with torch.autocast(self._place.type, self._low, enabled=self._low is not None):
                states = self._forward(token_ids)
            joined = tapped_states(states, self._layers, self._target.config).to(self._device)
            final = states[self._last + 1].to(self._device)
            if aux is None or last is None:
                aux = joined.new_zeros(*batch.token_ids.shape, joined.shape[-1])
                last = final.new_zeros(*batch.token_ids.shape, final.shape[-1])
            for index, document in enumerate(group):
                at = document.row, slice(document.start, document.stop)
                aux[at] = joined[index, : document.stop - document.start]
                last[at] = final[index, : document.stop - document.start]
        if aux is None or last is None:
            raise ValueError("a batch without documents has no features")
        return FeatureBatch(batch, aux, last)

    @torch.no_grad()
    def target_logits(self, last_hidden: Tensor) -> Tensor:
        """[..., V] the target's logits, as its own forward makes them."""
        output = self._target.get_output_embeddings()
        weight = getattr(output, "weight", None)
        inputs = last_hidden
        if weight is not None and not weight.is_meta:
            inputs = last_hidden.to(weight.device, weight.dtype)
        logits: Tensor = output(inputs).to(last_hidden.device)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._cap:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    def _forward(self, token_ids: Tensor) -> Any:
        wanted = hidden_states_argument((*self._layers, self._last))
        return self._target(
            input_ids=token_ids, use_cache=False, output_hidden_states=wanted, **self._extra
        ).hidden_states

    @torch.no_grad()
    def _check(self) -> None:
        """Compares logits made from the last hidden state with the model's own."""
        ids = torch.arange(_PROBE_TOKENS, device=self._place)[None] + 1
        wanted = hidden_states_argument((*self._layers, self._last))
        output = self._target(input_ids=ids, use_cache=False, output_hidden_states=wanted)
        found = self.target_logits(output.hidden_states[self._last + 1].to(self._device))
        own = output.logits.to(found.device)
        away = (found.float() - own.float()).abs().max()
        most = 0.02 * own.float().abs().max() + 1e-3
        if found.shape != own.shape or not bool(away <= most):
            raise UnsupportedModelError(
                f"{type(self._target).__name__} makes its logits in a way that is not known here: "
                f"its output matrix on its last hidden state is off by {float(away):.3g}; please "
                "report this model"
            )


def _groups(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents of similar length, to be read in one forward."""
    group: list[Document] = []
    tokens = 0
    for document in sorted(documents, key=lambda d: d.start - d.stop):
        length = document.stop - document.start
        longest = group[0].stop - group[0].start if group else length
        if (len(group) + 1) * longest > _PADDING * (tokens + length):
            yield group
            group, tokens = [], 0
        group.append(document)
        tokens += length
    if group:
        yield group


def _unpacked(token_ids: Tensor, group: Sequence[Document]) -> Tensor:
    longest = -(-(group[0].stop - group[0].start) // _MULTIPLE) * _MULTIPLE
    found = token_ids.new_zeros(len(group), longest)
    for index, document in enumerate(group):
        ids = token_ids[document.row, document.start : document.stop]
        found[index, : len(ids)] = ids
    return found
