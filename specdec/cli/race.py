"""Times plain `generate` and every method on the same prompts, and compares their texts.

The arms take turns prompt by prompt in one process, so that a busy machine slows all of them
alike. `specdec bench` measures with confidence intervals; this is the short version.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.api import augment, last_stats
from specdec.artifacts.places import DRAFT_HEAD, head_path
from specdec.config import SpecConfig
from specdec.cost.curve import measure_cost
from specdec.cost.sizes import choose_sizes
from specdec.errors import SpecdecError
from specdec.generate.call import introduce
from specdec.registry import methods

_PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class Arm:
    """One way to generate; no configuration means plain `generate`."""

    name: str
    config: SpecConfig | None = None


@dataclass
class ArmResult:
    """What an arm took and wrote.

    Attributes:
        arm: The way of generating that these are results of.
        seconds: Total of each repetition, over all prompts.
        tokens: New tokens over all runs.
        texts: Prompt -> its new tokens, of the first run.
        unstable: Prompts whose tokens were not those of the first run every time.
        rounds: Target forwards after the prefill, in one repetition.
        histogram: Tokens of a round -> how often.
    """

    arm: Arm
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    texts: dict[int, list[int]] = field(default_factory=dict)
    unstable: set[int] = field(default_factory=set)
    rounds: int = 0
    histogram: Counter[int] = field(default_factory=Counter)

    @property
    def tokens_per_second(self) -> float:
        """Over all runs."""
        return self.tokens / sum(self.seconds)

    @property
    def acceptance_length(self) -> float:
        """Tokens a round."""
        rounds = sum(self.histogram.values())
        return sum(n * times for n, times in self.histogram.items()) / max(rounds, 1)

    def speed_over(self, other: ArmResult) -> float:
        """Tokens a second relative to another arm."""
        return self.tokens_per_second / other.tokens_per_second

    def identical_to(self, other: ArmResult) -> int:
        """On how many prompts every run wrote the other arm's tokens."""
        bad = self.unstable | other.unstable
        return sum(
            tokens == self.texts.get(prompt) and prompt not in bad
            for prompt, tokens in other.texts.items()
        )


def choose_arms(model: Any) -> tuple[list[Arm], dict[str, str]]:
    """Plain `generate` and every registered method, and the methods left out with the reason.

    A method is left out when it cannot run without more information (a draft model, say).
    """
    arms, left_out = [Arm("plain generate")], {}
    for name in methods.names():
        try:
            options = _options_of(name, model)
            introduce(methods.create(name, options), model, {})
        except (SpecdecError, TypeError) as problem:
            left_out[name] = str(problem)
            continue
        arms.append(Arm(name, SpecConfig(method=name, options=options)))
    return arms, left_out


def _options_of(method: str, model: Any) -> Mapping[str, Any]:
    """What a method needs to be told: its head, or sizes that should pay on this device."""
    if methods.draft_kind(method) is DRAFT_HEAD:
        return {"draft": str(head_path())}
    if not methods.priors(method):
        return {}
    choice = choose_sizes(measure_cost(model, _PROBE_SECONDS), method)
    return choice.options if choice.method == method else methods.cpu_sizes(method)


class Race:
    """Runs arms on one model.

    Args:
        model: Is augmented in place.
        prompts: [1, S] ids each.
        seed: Set before every run, so that sampling arms draw alike.
        **generate: Settings of every run, as `generate` takes them.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Tensor], seed: int = 0, **generate: Any
    ) -> None:
        self.model, self.prompts = augment(model, "none"), prompts
        self._seed, self._generate = seed, generate

    def run(self, arm: Arm, prompt: int) -> tuple[list[int], float]:
        """(new tokens, seconds) of one run."""
        ids = self.prompts[prompt]
        config: SpecConfig | bool = False if arm.config is None else arm.config
        torch.manual_seed(self._seed)
        begin = time.perf_counter()
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), specdec=config, **self._generate
        )
        tokens: list[int] = output[0, ids.shape[1] :].tolist()  # the copy waits for the device
        return tokens, time.perf_counter() - begin

    def rounds(self, arm: Arm, prompt: int) -> list[list[int]]:
        """The new tokens of an untimed run, by the round that produced them."""
        if arm.config is None:
            return [[token] for token in self.run(arm, prompt)[0]]
        found: list[list[int]] = []
        config = SpecConfig(
            method=arm.config.method,
            options=arm.config.options,
            on_round=lambda record: found.append(record.tokens[0]),
        )
        self.run(Arm(arm.name, config), prompt)
        return found

    def time(
        self, arms: Sequence[Arm], repetitions: int, tick: Callable[[], object]
    ) -> list[ArmResult]:
        """All arms on all prompts, `repetitions` times; `tick` is called after every run."""
        results = [ArmResult(arm) for arm in arms]
        for repetition in range(repetitions):
            for result in results:
                result.seconds.append(0.0)
            for prompt in range(len(self.prompts)):
                start = (repetition + prompt) % len(results)  # nobody always goes first
                for result in results[start:] + results[:start]:
                    self._add_run(result, prompt, first=repetition == 0)
                    tick()
        return results

    def _add_run(self, result: ArmResult, prompt: int, first: bool) -> None:
        tokens, seconds = self.run(result.arm, prompt)
        result.seconds[-1] += seconds
        result.tokens += len(tokens)
        if tokens != result.texts.setdefault(prompt, tokens):
            result.unstable.add(prompt)
        if first and result.arm.config is not None:
            stats = last_stats(self.model)
            result.rounds += stats.rounds
            result.histogram.update(stats.histogram)
