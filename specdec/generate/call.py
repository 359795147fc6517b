"""A `generate` call as Hugging Face prepared it, translated for the core loop and back.

Left padding is stripped per row, a user's cache is adopted and filled again, and the result has the
layout of plain `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList

from specdec.caches import user_cache
from specdec.caches.tree_cache import TreeCache
from specdec.contracts import BatchState, Drafter, TargetFacts
from specdec.generate.outputs import PromptLayout, Recorder, WantedOutputs
from specdec.hf import compat
from specdec.hf.names import CACHE, cache_argument
from specdec.hf.steps import MULTIMODAL, cached_length
from specdec.round.noise import NoiseTape
from specdec.round.pickers import Picker, picker_of
from specdec.round.prefix import PrefixIds
from specdec.round.tree import TokenTree, TreeBatch, bucket_size
from specdec.targets.chain_target import ChainCall, ChainTarget
from specdec.targets.prompt_target import PlainPrompt, PromptTarget
from specdec.targets.tree_target import HFTarget, Prompt

_FIRST_ROOM = 4096  # new tokens that the KV cache is allocated for at once; it grows beyond
_PADDING_CHUNK = 64  # tokens a forward when ended rows are run over their padding


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


@dataclass
class Prepared:
    """A call as `generate` prepared it, and its translation.

    Attributes:
        model: The model itself, unwrapped.
        input_ids: [B, S] ids, left-padded; empty when only embeddings were given.
        processors: Logits processors, in order.
        criteria: Stopping criteria.
        generation_config: Merged configuration.
        kwargs: Remaining model keyword arguments.
        keeps_cache: Whether the KV cache is the user's own.
    """

    model: Any
    input_ids: Tensor
    processors: Any
    criteria: Any
    generation_config: Any
    kwargs: Mapping[str, Any]
    keeps_cache: bool = False

    def __post_init__(self) -> None:
        """Works out the layout of the prompt."""
        self.batch, self.width = self.input_ids.shape
        self.embeds: Tensor | None = self.kwargs.get("inputs_embeds")
        self.mask: Tensor | None = self.kwargs.get("attention_mask")
        self.cache = cache_argument(self.kwargs)[1]
        self.past = cached_length(self.kwargs)
        self.given = self.width if self.embeds is None else self.embeds.shape[1]
        config = self.generation_config
        self.total = compat.prompt_length(config, self.mask, self.given, self.past)
        # A length criterion of the user's replaces the one that `generate` made from its options.
        limits = [compat.max_length_of(criterion) for criterion in self.criteria]
        longest = min((n for n in limits if n is not None), default=config.max_length)
        self.max_new_tokens = max(math.ceil(longest) - self.width, 1)
        self.pad_id = compat.pad_token_id(config)
        ids = [compat.eos_token_ids(criterion) for criterion in self.criteria]
        self.eos_ids = {token for found in ids if found is not None for token in found}
        others = [
            criterion
            for criterion, found in zip(self.criteria, ids, strict=True)
            if found is None and compat.max_length_of(criterion) is None
        ]
        self.other_criteria = StoppingCriteriaList(others) if others else None

    def slots(self) -> list[Tensor]:
        """Per row, the columns of the padded prompt layout that hold tokens."""
        if self.mask is None:
            return [torch.arange(self.total)] * self.batch
        return [row.nonzero()[:, 0].cpu() for row in self.mask]

    def inputs_given(self) -> list[str]:
        """Model inputs that hold something: without an image, `generate` passes an empty dict."""
        values = self.kwargs.items()
        return [n for n, v in values if v is not None and not (isinstance(v, dict) and not v)]

    @cached_property
    def own_inputs(self) -> list[str]:
        """Inputs that the model has to prepare for the prompt itself: images, odd positions."""
        found = [name for name in self.inputs_given() if name in MULTIMODAL]
        return found if self._default_positions() else [*found, "position_ids"]

    def _default_positions(self) -> bool:
        """Whether positions are, in every dimension, those that the attention mask implies."""
        positions = self.kwargs.get("position_ids")
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

    @property
    def ahead(self) -> int:
        """How far positions run ahead of the slots of their rows."""
        return max(int(self.plain_prompt().offsets().max()), 0) if self.own_inputs else 0

    def plain_prompt(self) -> PlainPrompt:
        """The prompt, for a model that prepares it itself."""
        return PlainPrompt(
            self.input_ids,
            self.generation_config,
            self.kwargs,
            self.slots(),
            self.total,
            self.past,
        )

    def layout(self) -> PromptLayout:
        """Where the prompt's new tokens sit in the padded batch."""
        width, chunk = self.total - self.past, self.generation_config.prefill_chunk_size
        first = (width - 1) // chunk * chunk if chunk else 0
        columns = [row[row >= self.past] - self.past for row in self.slots()]
        if self.runs_plain_prompt:
            columns = [torch.arange(first, width)] * self.batch
        return PromptLayout(width, columns, first)

    @property
    def runs_plain_prompt(self) -> bool:
        """Whether the prompt runs padding and all: by need, or to return its hidden states."""
        padded = self.mask is not None and self.kwargs.get("position_ids") is not None
        return bool(self.own_inputs) or (padded and self.wanted_outputs().hidden_states)

    def wanted_outputs(self) -> WantedOutputs:
        """Which optional outputs the call returns."""
        config = self.generation_config
        returned = bool(config.return_dict_in_generate)
        return WantedOutputs(
            scores=returned and bool(config.output_scores),
            logits=returned and bool(config.output_logits),
            hidden_states=returned and bool(self.kwargs.get("output_hidden_states")),
        )

    def state(self, memory: dict[str, Any]) -> BatchState:
        """Rows at the start of the call; with embeddings only generated ids are known."""
        ids = self.input_ids.tolist() if self.embeds is None else [[] for _ in range(self.batch)]
        rows = ids
        if self.mask is not None and self.embeds is None:
            skipped = self.total - self.width
            kept = [
                [int(slot) - skipped for slot in row if slot >= skipped] for row in self.slots()
            ]
            rows = [[row[i] for i in index] for row, index in zip(ids, kept, strict=True)]
        device = compat.input_device(self.model)
        last = [row[-1] if row else 0 for row in rows]
        return BatchState(
            tokens=[list(row) for row in rows],
            prompt_lengths=[len(row) for row in rows],
            active=[True] * self.batch,
            pending=torch.tensor(last, device=device),
            lengths=torch.zeros(self.batch, dtype=torch.long, device=device),
            vocab_size=compat.vocabulary_size(self.model),
            max_new_tokens=self.max_new_tokens,
            memory=memory,
        )

    def target(self, taps: tuple[int, ...], budget: int) -> HFTarget:
        """The model with an empty or adopted cache, room for `budget` drafts, and the prompt."""
        device, slots = compat.input_device(self.model), self.slots()
        old = [row[row < self.past] for row in slots]
        new = [row[row >= self.past] for row in slots]
        cache = TreeCache(self.batch, device, self._capacity(budget))
        wants_hidden = self.wanted_outputs().hidden_states
        if self.runs_plain_prompt:
            return PromptTarget(self.model, self.plain_prompt(), cache, taps, wants_hidden)
        if self.past:
            user_cache.adopt_cache(self.cache, cache, old)
        counts = [len(row) for row in new]
        source = self.input_ids if self.embeds is None else self.embeds
        source = source.to(device)
        first = self.total - source.shape[1]  # column of the layout that source starts at
        packed = source.new_zeros(self.batch, max(counts), *source.shape[2:])
        for row, index in enumerate(new):
            packed[row, : len(index)] = source[row, (index - first).to(device)]
        prompt = Prompt(
            token_ids=packed if self.embeds is None else None,
            embeds=packed if self.embeds is not None else None,
            counts=counts,
        )
        return HFTarget(
            self.model,
            prompt,
            cache,
            taps=taps,
            hidden_states=wants_hidden,
            prefill_chunk=self.generation_config.prefill_chunk_size,
        )

    def _capacity(self, budget: int) -> int:
        """Slots to allocate at once; for a call with a static cache all that it can ever need."""
        tree = bucket_size(budget + 1)
        if user_cache.is_static(self.cache):
            return self.total + self.max_new_tokens + max(tree, _PADDING_CHUNK)
        return self.total + min(self.max_new_tokens, _FIRST_ROOM) + tree

    def chain_target(self, state: BatchState, taps: tuple[int, ...]) -> ChainTarget:
        """The model in chain mode, which prepares its own inputs and keeps its own cache."""
        padding = [int(row[0]) for row in self.slots()]
        call = ChainCall(
            self.input_ids, self.generation_config, self.kwargs, padding, self.total, self.past
        )
        return ChainTarget(self.model, call, state, taps)

    def picker(self, prefix: PrefixIds) -> Picker:
        """Chooses tokens as this call's plain decoding would."""
        config, device = self.generation_config, self.input_ids.device
        needs_prefix = not compat.all_stateless(self.processors)
        watched_scores = self.other_criteria is not None and bool(config.output_scores)
        lazy = needs_prefix or watched_scores or (config.do_sample and device.type == "cpu")
        return picker_of(
            self.processors if len(self.processors) else None,
            prefix,
            NoiseTape(self.batch, device) if config.do_sample else None,
            along_path=lazy,
            needs_prefix=needs_prefix or watched_scores,
            row_processors=compat.processors_by_row(self.processors, self.batch),
        )

    def padded_tails(self, state: BatchState) -> list[list[int]]:
        """Emitted ids by row, ended rows padded as plain `generate` pads them."""
        lengths = state.prompt_lengths
        emitted = [row[start:] for row, start in zip(state.tokens, lengths, strict=True)]
        steps, pad = max(map(len, emitted)), 0 if self.pad_id is None else self.pad_id
        return [row + [pad] * (steps - len(row)) for row in emitted]

    def pad_ended_rows(self, state: BatchState, target: HFTarget, recorder: Recorder) -> None:
        """Runs ended rows over their padding, as plain `generate` does: the cache stays.

        A later turn attends to these slots when its mask does not hide them.
        """
        tails = self.padded_tails(state)
        missing = [tail[state.emitted(row) - 1 : -1] for row, tail in enumerate(tails)]
        steps = [state.emitted(row) for row in range(self.batch)]
        while any(missing):
            now = [tokens[:_PADDING_CHUNK] for tokens in missing]
            missing = [tokens[_PADDING_CHUNK:] for tokens in missing]
            trees = [TokenTree.chain(tokens[0], tokens[1:]) if tokens else TokenTree([0], [-1])
                     for tokens in now]  # fmt: skip
            batch = TreeBatch.from_rows(trees, target.lengths.device)
            counts = list(map(len, now))
            recorder.add_padding(target.forward_tree(batch), steps, counts, self.pad_id or 0)
            steps = [step + count for step, count in zip(steps, counts, strict=True)]
            kept = [list(range(1, len(tokens))) for tokens in now]
            target.commit(batch.parents[:, :0], kept, [bool(tokens) for tokens in now])

    def write_back(
        self, state: BatchState, target: HFTarget | ChainTarget, recorder: Recorder
    ) -> None:
        """Puts the call's tokens into the cache that plain `generate` would have filled."""
        if isinstance(target, ChainTarget):
            for output, first, counts in target.settle(
                [tail[:-1] for tail in self.padded_tails(state)], bool(recorder.wanted)
            ):
                recorder.add_padding(output, first, counts, self.pad_id or 0)
            target.cache.hand_over(self.cache)
            return
        self.pad_ended_rows(state, target, recorder)
        length = self.total + max(map(state.emitted, range(self.batch))) - 1
        new = torch.arange(self.total, length)
        slots = [torch.cat([row, new]) for row in self.slots()]
        width = self.total - self.past
        chunk = self.generation_config.prefill_chunk_size or width
        prompt = [min(chunk, width - start) for start in range(0, width, chunk)]
        user_cache.write_back(target.cache, self.cache, slots, length, prompt)

    def result(self, state: BatchState, recorder: Recorder) -> Any:
        """What plain `generate` returns."""
        tails = torch.tensor(self.padded_tails(state), device=self.input_ids.device)
        sequences = torch.cat([self.input_ids, tails], dim=1)
        if not self.generation_config.return_dict_in_generate:
            return sequences
        fields = {CACHE: self.cache, **recorder.outputs(tails.shape[1])}
        return GenerateDecoderOnlyOutput(sequences=sequences, **fields)
