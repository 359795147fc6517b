"""The decoding loop that an augmented model hands to `generate(custom_generate=...)`.

`generate` prepares inputs, processors, criteria and cache as ever; this module maps them onto the
core loop and back: padding, return types, streamer, stop rules, user caches, and the list of calls
that run as plain `generate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList

from specdec import hf_compat
from specdec.config import SpecConfig
from specdec.drafters.base import BatchState, FixedBudget
from specdec.errors import FallbackWarning
from specdec.hf_outputs import (
    PromptLayout,
    Recorder,
    StreamObserver,
    TraceObserver,
    WantedOutputs,
)
from specdec.loop import Call, Observer, speculative_generate
from specdec.registry import methods
from specdec.sampling import NoiseTape, PrefixIds, TokenPicker
from specdec.stats import GenerationStats
from specdec.stop_rules import HostStopRules
from specdec.target import HFTarget, Prompt
from specdec.tree import TokenTree, TreeBatch
from specdec.tree_cache import TreeCache

_KNOWN_MODEL_KWARGS = frozenset({
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "inputs_embeds", "output_hidden_states", "output_attentions", "return_dict",
})  # fmt: skip
_PADDING_CHUNK = 64  # tokens a forward when ended rows are run over their padding


def warn_plain(reason: str) -> None:
    """The one warning of a call that runs as plain `generate`."""
    warnings.warn(
        f"specdec: this call runs as plain generate, because {reason}.",
        FallbackWarning,
        stacklevel=4,
    )


@dataclass
class SpeculativeDecode:
    """A `custom_generate` callable for one call.

    `generate` drops streamer and synced_gpus before it calls a callable, and pops every user
    keyword that the callable names; so they are captured here, and `__call__` names none.

    Attributes:
        settings: How to speculate.
        memory: What drafters keep from call to call.
        streamer: The call's streamer.
        keeps_cache: Whether the KV cache is the user's own.
        stats: Filled in by the call.
    """

    settings: SpecConfig
    memory: dict[str, Any]
    streamer: Any = None
    keeps_cache: bool = False
    stats: GenerationStats = field(default_factory=lambda: GenerationStats("none"))

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        """Decodes a prepared call; returns what plain `generate` would return."""
        prepared = Prepared(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            kwargs,
            self.keeps_cache,
        )
        method = self.settings.method or "none"
        self.stats = GenerationStats(method, mode_reason="its self-test verified a token tree")
        reason = prepared.why_plain()
        if reason is not None:
            warn_plain(reason)
            self.stats.mode, self.stats.mode_reason = "plain", reason
            return hf_compat.plain_decode(
                model,
                input_ids,
                self.streamer,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **kwargs,
            )
        return self._decode(prepared)

    def _decode(self, prepared: Prepared) -> Any:
        drafter = methods.create(
            self.stats.method, methods.configure(self.stats.method, self.settings.options)
        )
        state = prepared.state(self.memory)
        target = prepared.target(drafter.needs.taps)
        prefix = PrefixIds(prepared.input_ids, prepared.max_new_tokens)
        picker = prepared.picker(prefix)
        recorder = Recorder(prepared.wanted_outputs(), prepared.layout(), picker)
        stops = HostStopRules(
            prepared.max_new_tokens,
            prepared.eos_ids,
            prepared.other_criteria,
            prefix,
            recorder.scores_so_far,
        )
        observers: list[Observer] = [recorder] if recorder.wanted else []
        if self.streamer is not None:
            observers.append(StreamObserver(self.streamer, state, prepared.pad_id))
        if self.settings.on_round is not None:
            on_round = self.settings.on_round
            observers.append(lambda _, record: on_round(record))
        if self.settings.trace is not None:
            observers.append(TraceObserver(self.settings.trace))
        budget = self.settings.budget
        call = Call(
            state=state,
            picker=picker,
            stops=stops,
            budget=FixedBudget(drafter.max_nodes if budget is None else budget),
            stats=self.stats,
            observers=observers,
            show_trees=self.settings.on_round is not None or self.settings.trace is not None,
        )
        speculative_generate(target, drafter, call)
        if self.streamer is not None:
            self.streamer.end()
        returns_cache = self.keeps_cache or bool(prepared.generation_config.return_dict_in_generate)
        if returns_cache:
            prepared.pad_ended_rows(state, target)
            prepared.write_back(state, target.cache)
        return prepared.result(state, recorder)


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
        self.cache = self.kwargs.get("past_key_values")
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        given = self.width if self.embeds is None else self.embeds.shape[1]
        config = self.generation_config
        self.total = hf_compat.prompt_length(config, self.mask, given, self.past)
        limits = [hf_compat.max_length_of(criterion) for criterion in self.criteria]
        longest = min([config.max_length, *(n for n in limits if n is not None)])
        if any(n is not None for n in limits):  # a criterion of the user's replaces generate's own
            longest = min(n for n in limits if n is not None)
        self.max_new_tokens = max(longest - self.width, 1)
        self.pad_id = hf_compat.pad_token_id(config)
        ids = [hf_compat.eos_token_ids(criterion) for criterion in self.criteria]
        self.eos_ids = {token for found in ids if found is not None for token in found}
        others = [
            criterion
            for criterion, found in zip(self.criteria, ids, strict=True)
            if found is None and not hf_compat.is_max_length(criterion)
        ]
        self.other_criteria = StoppingCriteriaList(others) if others else None

    def why_plain(self) -> str | None:
        """Why this call must run as plain `generate`, or None."""
        unknown = [
            key
            for key, value in self.kwargs.items()
            if value is not None and key not in _KNOWN_MODEL_KWARGS
        ]
        if unknown:
            return f"the model input {unknown[0]!r} is not one that a token tree can carry"
        if hf_compat.prepares_inputs_itself(self.model):
            return "its input preparation was replaced, as PEFT does to add a learned prompt"
        if self.kwargs.get("output_attentions"):
            return "output_attentions was asked for"
        reason = hf_compat.unsupported_cache(self.cache)
        if reason is not None:
            return reason
        if self.total <= self.past:
            return "the cache already holds the whole prompt"
        if self.mask is not None:
            reason = self._why_mask_is_plain(self.mask)
            if reason is not None:
                return reason
        if not self._default_positions():
            return "position_ids are not those of the attention mask"
        return self._why_batch_is_plain() if self.batch > 1 else None

    def _why_mask_is_plain(self, mask: Tensor) -> str | None:
        if bool((mask[:, -1] == 0).any()):
            return "the batch is padded on the right"
        holes = bool((mask[:, 1:] < mask[:, :-1]).any())
        new = mask[:, self.past :]
        if self.keeps_cache and bool((new[:, 1:] < new[:, :-1]).any()):
            return "its attention mask has holes where the user's cache wants every token"
        windowed = hf_compat.MaskKinds.of(self.model.config)
        if holes and any(map(windowed.is_windowed, windowed.kinds)):
            return "its attention mask has holes and the model has attention windows"
        return None

    def _default_positions(self) -> bool:
        positions = self.kwargs.get("position_ids")
        if positions is None:
            return True
        if self.mask is None:
            wanted = torch.arange(self.total, device=positions.device)[None]
        else:
            wanted = (self.mask.long().cumsum(-1) - 1).masked_fill(self.mask == 0, 0)
        wanted = wanted[:, self.total - positions.shape[-1] :]
        return positions.ndim == 2 and bool((positions == wanted).all())

    def _why_batch_is_plain(self) -> str | None:
        unknown = hf_compat.unknown_processors(self.processors)
        if unknown:
            return f"{unknown[0]} may hold state for the whole batch"
        unknown = hf_compat.unknown_criteria(self.criteria)
        if unknown:
            return f"the stopping criterion {unknown[0]} may look at the whole batch"
        if self.other_criteria is not None and not self.eos_ids:
            return "rows would end without an EOS token to pad them with"
        return None

    def slots(self) -> list[Tensor]:
        """Per row, the columns of the padded prompt layout that hold tokens."""
        if self.mask is None:
            return [torch.arange(self.total)] * self.batch
        return [row.nonzero()[:, 0].cpu() for row in self.mask]

    def layout(self) -> PromptLayout:
        """Where the prompt's new tokens sit in the padded batch."""
        width, chunk = self.total - self.past, self.generation_config.prefill_chunk_size
        return PromptLayout(
            width=width,
            columns=[row[row >= self.past] - self.past for row in self.slots()],
            first=(width - 1) // chunk * chunk if chunk else 0,
        )

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
        ids = self.input_ids.tolist()
        rows = ids
        if self.mask is not None and self.embeds is None:
            skipped = self.total - self.width
            kept = [
                [int(slot) - skipped for slot in row if slot >= skipped] for row in self.slots()
            ]
            rows = [[row[i] for i in index] for row, index in zip(ids, kept, strict=True)]
        device = hf_compat.input_device(self.model)
        last = [row[-1] if row else 0 for row in rows]
        return BatchState(
            tokens=[list(row) for row in rows],
            prompt_lengths=[len(row) for row in rows],
            active=[True] * self.batch,
            pending=torch.tensor(last, device=device),
            lengths=torch.zeros(self.batch, dtype=torch.long, device=device),
            vocab_size=self.model.config.get_text_config().vocab_size,
            max_new_tokens=self.max_new_tokens,
            memory=memory,
        )

    def target(self, taps: tuple[int, ...]) -> HFTarget:
        """The model with an empty or adopted cache and the rest of the prompt."""
        device, slots = hf_compat.input_device(self.model), self.slots()
        old = [row[row < self.past] for row in slots]
        new = [row[row >= self.past] for row in slots]
        cache = TreeCache(self.batch, device, self.total + self.max_new_tokens + 64)
        if self.past:
            hf_compat.adopt_cache(self.cache, cache, old)
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
            hidden_states=self.wanted_outputs().hidden_states,
            prefill_chunk=self.generation_config.prefill_chunk_size,
        )

    def picker(self, prefix: PrefixIds) -> TokenPicker:
        """Chooses tokens as this call's plain decoding would."""
        config, device = self.generation_config, self.input_ids.device
        needs_prefix = not hf_compat.all_stateless(self.processors)
        watched_scores = self.other_criteria is not None and bool(config.output_scores)
        lazy = needs_prefix or watched_scores or (config.do_sample and device.type == "cpu")
        return TokenPicker(
            self.processors if len(self.processors) else None,
            prefix,
            NoiseTape(self.batch, device) if config.do_sample else None,
            along_path=lazy,
            row_processors=hf_compat.processors_by_row(self.processors, self.batch),
        )

    def padded_tails(self, state: BatchState) -> list[list[int]]:
        """Emitted ids by row, ended rows padded as plain `generate` pads them."""
        lengths = state.prompt_lengths
        emitted = [row[start:] for row, start in zip(state.tokens, lengths, strict=True)]
        steps, pad = max(map(len, emitted)), 0 if self.pad_id is None else self.pad_id
        return [row + [pad] * (steps - len(row)) for row in emitted]

    def pad_ended_rows(self, state: BatchState, target: HFTarget) -> None:
        """Runs ended rows over their padding, as plain `generate` does: the cache stays.

        A later turn attends to these slots when its mask does not hide them.
        """
        tails = self.padded_tails(state)
        missing = [tail[state.emitted(row) - 1 : -1] for row, tail in enumerate(tails)]
        while any(missing):
            now = [tokens[:_PADDING_CHUNK] for tokens in missing]
            missing = [tokens[_PADDING_CHUNK:] for tokens in missing]
            trees = [TokenTree.chain(tokens[0], tokens[1:]) if tokens else TokenTree([0], [-1])
                     for tokens in now]  # fmt: skip
            batch = TreeBatch.from_rows(trees, target.lengths.device)
            target.forward_tree(batch)
            kept = [list(range(1, len(tokens))) for tokens in now]
            target.commit(batch.parents[:, :0], kept, [bool(tokens) for tokens in now])

    def write_back(self, state: BatchState, cache: TreeCache) -> None:
        """Puts the call's tokens into the cache that plain `generate` would have filled."""
        length = self.total + max(map(state.emitted, range(self.batch))) - 1
        new = torch.arange(self.total, length)
        slots = [torch.cat([row, new]) for row in self.slots()]
        hf_compat.write_back(cache, self.cache, slots, length)

    def result(self, state: BatchState, recorder: Recorder) -> Any:
        """What plain `generate` returns."""
        tails = torch.tensor(self.padded_tails(state)).to(self.input_ids)
        sequences = torch.cat([self.input_ids, tails], dim=1)
        if not self.generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, past_key_values=self.cache, **recorder.outputs(tails.shape[1])
        )
