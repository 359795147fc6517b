"""Makes a head ready to draft for a target: loads it once, compares, and shares the weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.contracts import TargetFacts
from specdec.errors import ConfigError, HeadWarning
from specdec.heads.checkpoints.load import load_head
from specdec.heads.draft_head import DraftHead
from specdec.heads.promise import Promise

_MEMORY = "eagle3.heads"
_MOST_KEPT = 4  # heads that the memory of one target holds at a time
_CACHED_BYTES = 4 * 2**20  # largest matrix of a head that a processor's cache holds


@dataclass
class ReadyHead:
    """A head that was made ready.

    Attributes:
        source: Where it came from.
        tokenizer: The target's, with which it was compared.
        head: On the target's device, with embeddings.
        probe: The command that finds out how it was trained.
        promise: What it promises and keeps on this target.
    """

    source: Any
    tokenizer: Any
    head: DraftHead
    probe: str
    promise: Promise

    def warn_if_broken(self) -> None:
        """Warns, once, of a head that drafts far worse than it promises."""
        found = self.promise.broken()
        if found:
            name = f" {self.source!r}" if isinstance(self.source, str) else ""
            warnings.warn(
                f"specdec: the draft head{name} drafts far worse than it promises: {found}. The "
                "text is right all the same; the head may be run with a wrong flag or the wrong "
                f"layers, or be another target's: `{self.probe}` tells",
                HeadWarning,
                stacklevel=2,
            )


def ready_head(draft: str | DraftHead, tokenizer: Any, target: TargetFacts) -> ReadyHead:
    """The head, on the target's device and with its embeddings.

    One that is loaded takes the target's dtype, or float32 where a CPU drafts faster in it. What
    had to be assumed about it is said in one warning.

    Args:
        draft: A folder, a hub id, or the head itself, which is used in its own dtype.
        tokenizer: The target's, or None.
        target: What the head drafts for.

    Raises:
        ConfigError: It cannot be loaded, or was not made for this target.
    """
    kept: list[ReadyHead] = target.memory.setdefault(_MEMORY, [])
    for found in kept:
        same = found.source is draft or (isinstance(draft, str) and found.source == draft)
        if same and found.tokenizer is tokenizer and found.head.step_weight.device == target.device:
            return found
    probe = _probe_command(draft, target)
    if isinstance(draft, str):
        fingerprint = TargetFingerprint.of(target.config, tokenizer)
        loaded = load_head(draft, target=fingerprint, dtype=target.dtype, device=target.device)
        _say_assumed(draft, loaded.assumed, probe)
        head = _in_faster_dtype(loaded.head)
    else:
        head = draft.unattached()
    check_fit(head, target)
    head.attach(target.embeddings, target.output_embeddings)
    ready = ReadyHead(draft, tokenizer, head, probe, Promise(head.t2d))
    kept[:] = [*kept[-_MOST_KEPT + 1 :], ready]
    return ready


def _probe_command(draft: str | DraftHead, target: TargetFacts) -> str:
    head = draft if isinstance(draft, str) else "HEAD"
    name = getattr(target.config, "name_or_path", "") or "TARGET"
    return f"specdec inspect {head} --target {name} --probe"


def _say_assumed(name: str, assumed: Sequence[str], probe: str) -> None:
    if assumed:
        listed = "; ".join(f"({i}) {sentence}" for i, sentence in enumerate(assumed, 1))
        warnings.warn(
            f"specdec: the draft head {name!r} leaves something unsaid, which was assumed: "
            f"{listed}. The text is right all the same, but with a wrong flag or wrong layers a "
            f"head drafts badly: `{probe}` tries the likely ones, and `specdec convert --set "
            "NAME=VALUE` writes a head that says what is right",
            HeadWarning,
            stacklevel=2,
        )


def _in_faster_dtype(head: DraftHead) -> DraftHead:
    """The head, in float32 where a CPU goes through it faster token by token than in 16 bits.

    Half precision halves what is read of large weights. Small ones lie in a cache, and there the
    conversions of a CPU's 16-bit products cost more than the products. By a rule and not by the
    clock: two processes must draft the same.
    """
    matrix = head.step_weight
    if matrix.device.type != "cpu" or matrix.dtype not in (torch.bfloat16, torch.float16):
        return head
    native = matrix.dtype == torch.bfloat16 and has_bf16_products()
    is_small = matrix.numel() * torch.float32.itemsize <= _CACHED_BYTES
    return head.float() if is_small or not native else head


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 itself.

    Asked of it and not timed: every process, and every resumed run, must agree.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_fit(head: DraftHead, target: TargetFacts) -> None:
    """Raises `ConfigError` for a head whose sizes are not this target's."""
    config, of = head.config, target.config
    if config.target_hidden_size != of.hidden_size:
        raise ConfigError(
            f"the head reads hidden states of width {config.target_hidden_size}, the target has "
            f"hidden_size {of.hidden_size}; this head is another model's"
        )
    if config.vocab_size > len(target.embeddings):
        raise ConfigError(
            f"the head drafts among vocab_size {config.vocab_size} tokens, the target has "
            f"{len(target.embeddings)}; this head is another model's"
        )
    last = of.num_hidden_layers - 1
    if max(config.aux_output_layers) > last:
        raise ConfigError(
            f"the head reads layers {list(config.aux_output_layers)} of the target, whose last one "
            f"is {last}; this head is another model's"
        )
    if head.step_weight.device != target.device:
        raise ConfigError(
            f"the head is on {head.step_weight.device} and the target on {target.device}; move the "
            "head there"
        )
