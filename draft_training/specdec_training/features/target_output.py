"""A target's output matrix on its own: logits from last hidden states, without the target."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec.errors import UnsupportedModelError

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_ROUGH = 0.03  # of the largest logit, in 16-bit types
_SAMPLED = 16  # values at each end of every weight that tell fine-tuned siblings apart


@dataclass(frozen=True)
class OutputMatrix:
    """logits = cap(scale * (weight @ hidden + bias)).

    Attributes:
        weight: [V, Ht], Ht the target's hidden size.
        bias: [V]; None where the target has none.
        scale: Factor, as in Cohere and Granite.
        cap: Bound that tanh keeps them within, as in Gemma 2; None without.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., V] logits of hidden states [..., Ht], in the matrix's type."""
        logits = functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def to(self, device: torch.device | str) -> OutputMatrix:
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return OutputMatrix(self.weight.to(device), bias, self.scale, self.cap)

    @classmethod
    def of(cls, model: Any, hidden: Tensor, logits: Tensor) -> OutputMatrix:
        """The output matrix of a model, with what the model does to its products.

        Args:
            model: A causal language model.
            hidden: [..., Ht] what its matrix read in some forward.
            logits: [..., V] what that forward returned.

        Raises:
            UnsupportedModelError: No known rule makes these logits of these hidden states.
        """
        head, text = model.get_output_embeddings(), model.config.get_text_config()
        weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
        scale, divisor = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
        cap = getattr(text, "final_logit_softcapping", None)
        if isinstance(weight, Tensor) and weight.shape[-1] == hidden.shape[-1]:
            found = cls(
                weight.detach(),
                None if bias is None else bias.detach(),
                (scale or 1.0) / (divisor or 1.0),
                float(cap) if cap else None,
            )
            if _agree(found(hidden.to(weight.device)), logits):
                return found
        raise UnsupportedModelError(
            f"the logits of {type(model).__name__} cannot be repeated from its last hidden states; "
            "train it online, without recorded features"
        )


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    theirs = theirs.to(ours.device)
    bound = _TOLERANCE.get(ours.dtype, _ROUGH) * max(1.0, float(theirs.abs().max()))
    return bool((ours.float() - theirs.float()).abs().max() <= bound)


def weights_hash(model: Any) -> str:
    """SHA-256 over the names, shapes and a few values of all weights.

    Empty, which is compared with nothing, where Accelerate keeps some of them elsewhere.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.is_meta:
            return ""
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        ends = torch.cat([flat[:_SAMPLED], flat[-_SAMPLED:]]).cpu()
        digest.update(ends.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
