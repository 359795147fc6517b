"""The decoding loop that an augmented model hands to `generate(custom_generate=...)`.

`generate` prepares inputs, processors, criteria and cache as ever; the loop's parts are made from
them here, and what cannot be done goes back to the plain loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from specdec.config import SpecConfig
from specdec.contracts import Drafter, FixedBudget
from specdec.generate.call import (
    PreparedCall,
    batch_state,
    introduce,
    picker_for,
    target_of,
)
from specdec.generate.fallback import warn_plain, why_prepared_is_plain
from specdec.generate.outputs import Recorder, StreamObserver
from specdec.generate.result import result_of
from specdec.generate.stop_rules import HostStopRules
from specdec.generate.trace import traced
from specdec.hf import compat
from specdec.loop import Call, Observer, speculative_generate
from specdec.registry import methods
from specdec.round.prefix import PrefixIds
from specdec.stats import GenerationStats
from specdec.targets.prompt_target import PromptTarget
from specdec.targets.prompts import PaddedPrompt
from specdec.targets.self_test import Capability


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
        found: The model's self-test.
        stats: Filled in by the call.
    """

    settings: SpecConfig
    memory: dict[str, Any]
    found: Capability
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
        prompt = PaddedPrompt(input_ids, generation_config, kwargs)
        call = PreparedCall.of(model, prompt, logits_processor, stopping_criteria, self.keeps_cache)
        method, options = self.settings.method or "none", dict(self.settings.options)
        self.stats = GenerationStats(method, self.found.mode, self.found.reason, options=options)
        drafter = methods.create(method, options)
        introduce(drafter, model, self.memory)
        reason = why_prepared_is_plain(call, self.found, drafter.shape)
        if reason is not None:
            warn_plain(reason)
            self.stats.mode, self.stats.mode_reason = "plain", reason
            return compat.plain_decode(
                model,
                input_ids,
                self.streamer,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **kwargs,
            )
        return self._decode(call, drafter, methods.samples_drafts(method, options))

    def _decode(self, call: PreparedCall, drafter: Drafter, sampled_drafts: bool) -> Any:
        settings, taps = self.settings, drafter.needs.taps
        budget = drafter.max_nodes if settings.budget is None else settings.budget
        state = batch_state(call, self.memory)
        target = target_of(call, state, self.found, taps, budget)
        if self.found.backend is not None and isinstance(target, PromptTarget):
            self.stats.mode_reason += "; behind such a prompt, with dense masks"
        prefix = PrefixIds(call.prompt.input_ids, call.ends.max_new_tokens)
        picker = picker_for(call, prefix)
        recorder = Recorder(call.wanted, state, picker, call.lay_out)
        observers: list[Observer] = [recorder] if any(call.wanted) else []
        if self.streamer is not None:
            observers.append(StreamObserver(self.streamer, state, call.ends.pad_id))
        if settings.on_round is not None:
            on_round = settings.on_round
            observers.append(lambda _, record: on_round(record))
        with traced(settings.trace, self.memory) as trace:
            speculative_generate(
                target,
                drafter,
                Call(
                    state=state,
                    picker=picker,
                    stops=HostStopRules(call.ends, prefix, recorder.scores_so_far),
                    budget=FixedBudget(budget),
                    stats=self.stats,
                    observers=[*observers, *trace],
                    show_trees=settings.on_round is not None or bool(trace),
                    sampled_drafts=sampled_drafts,
                ),
            )
        if self.streamer is not None:
            self.streamer.end()
        return result_of(call, state, target, recorder)
