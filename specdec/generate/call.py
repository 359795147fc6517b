"""A call as `generate` prepared it, and the parts of the core loop made from it.

Left padding is stripped per row and a user's cache is adopted; `result.py` is the way back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList

from specdec.caches import user_cache
from specdec.caches.tree_cache import TreeCache
from specdec.contracts import BatchState, Drafter, TargetFacts
from specdec.generate.outputs import WantedOutputs
from specdec.generate.stop_rules import Ends
from specdec.hf import compat
from specdec.round.noise import NoiseTape
from specdec.round.pickers import Picker, picker_of
from specdec.round.prefix import PrefixIds
from specdec.round.tree import bucket_size
from specdec.targets.chain_target import ChainTarget
from specdec.targets.prompt_target import PromptTarget
from specdec.targets.prompts import PaddedPrompt
from specdec.targets.self_test import Capability
from specdec.targets.tree_target import HFTarget
from specdec_kernels import Backend

_FIRST_ROOM = 4096  # new tokens that the KV cache is allocated for at once; it grows beyond
PADDING_CHUNK = 64
"""Tokens a forward when ended rows are run over their padding."""


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A call as `generate` prepared it.

    Attributes:
        model: The model itself, unwrapped.
        prompt: Its prompt.
        processors: Logits processors, in order.
        criteria: Stopping criteria.
        keeps_cache: Whether the KV cache is the user's own.
        ends: What ends a row.
        wanted: Which optional outputs it returns.
    """

    model: Any
    prompt: PaddedPrompt
    processors: Any
    criteria: Any
    keeps_cache: bool
    ends: Ends
    wanted: WantedOutputs

    @classmethod
    def of(
        cls,
        model: Any,
        prompt: PaddedPrompt,
        processors: Any,
        criteria: Any,
        keeps_cache: bool = False,
    ) -> PreparedCall:
        """Reads what a call asks for."""
        config = prompt.config
        returned = bool(config.return_dict_in_generate)
        wanted = WantedOutputs(
            scores=returned and bool(config.output_scores),
            logits=returned and bool(config.output_logits),
            hidden_states=returned and bool(prompt.kwargs.get("output_hidden_states")),
        )
        ends = _ends(criteria, config, prompt.input_ids.shape[1])
        return cls(model, prompt, processors, criteria, keeps_cache, ends, wanted)

    @property
    def longest(self) -> int:
        """Columns of the padded layout when the last row has ended, at most."""
        return self.prompt.total + self.ends.max_new_tokens

    @property
    def runs_as_padded(self) -> bool:
        """Whether the prompt runs padding and all: by need, or to return its hidden states."""
        prompt = self.prompt
        padded = prompt.mask is not None and prompt.positions is not None
        return bool(prompt.own_inputs) or (padded and self.wanted.hidden_states)

    def lay_out(self, states: Tensor) -> Tensor:
        """[B, w, H] the prompt's hidden states as plain returns them, from the target's."""
        return states.clone() if self.runs_as_padded else self.prompt.laid_out(states)


def _ends(criteria: Any, config: Any, width: int) -> Ends:
    """What ends a row of a call whose ids are `width` wide.

    A length criterion of the user's replaces the one that `generate` made from its options.
    """
    limits = [compat.max_length_of(criterion) for criterion in criteria]
    longest = min((n for n in limits if n is not None), default=config.max_length)
    ids = [compat.eos_token_ids(criterion) for criterion in criteria]
    others = [
        criterion
        for criterion, found, limit in zip(criteria, ids, limits, strict=True)
        if found is None and limit is None
    ]
    return Ends(
        max_new_tokens=max(math.ceil(longest) - width, 1),
        eos_ids=frozenset(token for found in ids if found is not None for token in found),
        criteria=StoppingCriteriaList(others) if others else None,
        pad_id=compat.pad_token_id(config),
    )


def introduce(drafter: Drafter, model: Any, memory: dict[str, Any]) -> None:
    """Shows the target to a drafter that wants to know it; raises what the drafter refuses."""
    if not hasattr(drafter, "meet"):
        return
    output = model.get_output_embeddings()
    drafter.meet(
        TargetFacts(
            config=model.config.get_text_config(),
            embeddings=model.get_input_embeddings().weight,
            output_embeddings=None if output is None else output.weight,
            device=compat.input_device(model),
            dtype=model.dtype,
            memory=memory,
        )
    )


def batch_state(call: PreparedCall, memory: dict[str, Any]) -> BatchState:
    """Rows at the start of the call; with embeddings only generated ids are known."""
    rows, device = call.prompt.rows(), compat.input_device(call.model)
    return BatchState(
        tokens=rows,
        prompt_lengths=[len(row) for row in rows],
        active=[True] * len(rows),
        pending=torch.tensor([row[-1] if row else 0 for row in rows], device=device),
        lengths=torch.zeros(len(rows), dtype=torch.long, device=device),
        vocab_size=compat.vocabulary_size(call.model),
        max_new_tokens=call.ends.max_new_tokens,
        memory=memory,
    )


def tree_target(
    call: PreparedCall, taps: tuple[int, ...], budget: int, backend: Backend | None
) -> HFTarget:
    """The model with an empty or adopted cache, room for `budget` drafts, and the prompt.

    Behind a prompt with inputs of its own trees keep dense masks.
    """
    prompt, model, device = call.prompt, call.model, compat.input_device(call.model)
    cache = TreeCache(prompt.batch, device, _capacity(call, budget))
    if call.runs_as_padded:
        return PromptTarget(model, prompt, cache, taps, call.wanted.hidden_states)
    if prompt.past:
        old = [row[row < prompt.past] for row in prompt.slots]
        user_cache.adopt_cache(prompt.cache, cache, old)
    return HFTarget(
        model,
        prompt.packed(device),
        cache,
        taps=taps,
        hidden_states=call.wanted.hidden_states,
        prefill_chunk=prompt.config.prefill_chunk_size,
        backend=backend,
    )


def _capacity(call: PreparedCall, budget: int) -> int:
    """Slots to allocate at once; for a call with a static cache all that it can ever need."""
    tree = bucket_size(budget + 1)
    if user_cache.is_static(call.prompt.cache):
        return call.longest + max(tree, PADDING_CHUNK)
    return call.prompt.total + min(call.ends.max_new_tokens, _FIRST_ROOM) + tree


def target_of(
    call: PreparedCall, state: BatchState, found: Capability, taps: tuple[int, ...], budget: int
) -> HFTarget | ChainTarget:
    """The model, in the mode that its self-test chose, with the attention that it passed with."""
    if found.mode == "chain":  # prepares its own inputs and keeps its own cache
        return ChainTarget(call.model, call.prompt, state, taps)
    return tree_target(call, taps, budget, found.backend)


def picker_for(call: PreparedCall, prefix: PrefixIds) -> Picker:
    """Chooses tokens as this call's plain decoding would."""
    config, device = call.prompt.config, call.prompt.input_ids.device
    needs_prefix = not compat.all_stateless(call.processors)
    watched_scores = call.ends.criteria is not None and bool(config.output_scores)
    lazy = needs_prefix or watched_scores or (config.do_sample and device.type == "cpu")
    return picker_of(
        call.processors if len(call.processors) else None,
        prefix,
        NoiseTape(call.prompt.batch, device) if config.do_sample else None,
        along_path=lazy,
        needs_prefix=needs_prefix or watched_scores,
        row_processors=compat.processors_by_row(call.processors, call.prompt.batch),
    )
