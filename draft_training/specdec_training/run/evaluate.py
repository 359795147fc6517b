"""Real acceptance length: the head drafts for the target in the loop that users run.

Teacher-forced figures say how well a head predicts given text; this says how many tokens a target
forward yields on the target's own text. Text is counted only up to its first repetition loop, where
every draft is right, and without its last tokens, where the limit cuts rounds short. Every text is
compared with plain `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import specdec
from specdec.audit.loops import loop_start
from specdec.config import SpecConfig
from specdec.hf.compat import input_device
from specdec.stats import RoundRecord

SELECTION = "tree_t0"
"""The mode by which heads are compared."""

_PROMPTS_TOGETHER = 16  # in a batch; more of them are measured in several
_BRIEF = 12  # tokens


@dataclass(frozen=True)
class DraftShape:
    """Sizes of the drafts that are measured.

    Attributes:
        depth: Levels of a draft; a chain has one node on each.
        top_k: Children of a node.
        nodes: Nodes of a tree.
    """

    depth: int = 5
    top_k: int = 8
    nodes: int = 48

    def options(self, head: Any, tree: bool) -> dict[str, Any]:
        """Options of the drafter, for a tree or a chain."""
        if not tree:
            return {"draft": head, "depth": self.depth, "top_k": 1, "nodes": self.depth}
        return {"draft": head, **asdict(self)}


@dataclass(frozen=True)
class Acceptance:
    """What one measurement found.

    Attributes:
        step: Optimiser steps of the head.
        acceptance_length: Mode -> tokens per round, bonus and correction included.
        text_identical: Whether every text was that of plain `generate`.
    """

    step: int
    acceptance_length: Mapping[str, float]
    text_identical: bool

    @property
    def score(self) -> float:
        """What heads are compared by."""
        return self.acceptance_length[SELECTION]


@dataclass
class _Count:
    """Tokens and rounds of one mode, before the texts loop."""

    tokens: int = 0
    rounds: int = 0
    identical: bool = True

    @property
    def length(self) -> float:
        return self.tokens / max(self.rounds, 1)


@dataclass
class AcceptanceMeter:
    """Measures heads on the same prompts again and again; plain texts are made once.

    Attributes:
        target: A Hugging Face model; augmented only while it is measured.
        prompts: Ids of each prompt; some are read together, as a batch.
        new_tokens: Tokens written for each prompt.
        seed: Of the sampled texts.
    """

    target: Any
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    shape: DraftShape = field(default_factory=DraftShape)
    seed: int = 0
    _plain: dict[bool, list[list[int]]] = field(default_factory=dict)

    def measure(self, head: Any, step: int, brief: bool = False) -> Acceptance:
        """Chain and tree, greedy and sampled at temperature 1.

        Args:
            head: A `DraftHead` on the target's device.
            step: Recorded in the result.
            brief: Only the first tokens of each text: enough for a head that knows nothing yet.
        """
        was_training = head.training
        head.eval()
        most = min(self.new_tokens, _BRIEF) if brief else self.new_tokens
        try:
            with specdec.augmented(self.target, "none"):
                counts = {
                    f"{name}_t{int(sample)}": self._count(
                        SpecConfig("eagle3", self.shape.options(head, name == "tree")),
                        sample,
                        most,
                    )
                    for sample in (False, True)
                    for name in ("chain", "tree")
                }
        finally:
            head.train(was_training)
        lengths = {mode: count.length for mode, count in counts.items()}
        return Acceptance(step, lengths, all(count.identical for count in counts.values()))

    def prompt_lookup(self) -> float:
        """Acceptance length of prompt lookup, greedy: what needs no training."""
        with specdec.augmented(self.target, "none"):
            settings = SpecConfig("prompt_lookup")
            return self._count(settings, False, self.new_tokens).length

    def looping_share(self) -> float:
        """Share of the greedy text that was left out because it only repeats itself."""
        with specdec.augmented(self.target, "none"):
            texts = self._plain_texts(sample=False)
        kept = sum(_kept(text) for text in texts)
        return 1 - kept / max(sum(map(len, texts)), 1)

    def _plain_texts(self, sample: bool) -> list[list[int]]:
        if sample not in self._plain:
            self._plain[sample] = [
                text
                for batch in self._batches()
                for text in self._generate(batch, sample, False, self.new_tokens)
            ]
        return self._plain[sample]

    def _batches(self) -> list[Sequence[Sequence[int]]]:
        starts = range(0, len(self.prompts), _PROMPTS_TOGETHER)
        return [self.prompts[start : start + _PROMPTS_TOGETHER] for start in starts]

    def _count(self, settings: SpecConfig, sample: bool, most: int) -> _Count:
        count, expected = _Count(), iter(self._plain_texts(sample))
        for batch in self._batches():
            plain = [next(expected)[:most] for _ in batch]
            # A round that the limit of tokens may cut says nothing about the head.
            stops = [min(_kept(text), max(most - self.shape.depth, 2)) for text in plain]
            rounds: list[list[int]] = [[] for _ in batch]

            def seen(record: RoundRecord, rounds: list[list[int]] = rounds) -> None:
                if record.index == 0:  # the prefill
                    return
                for row, tokens in zip(rounds, record.tokens, strict=True):
                    row.append(len(tokens))

            limit = min(max(stops) + self.shape.depth, most)  # what is not counted costs time
            found = self._generate(batch, sample, replace(settings, on_round=seen), limit)
            count.identical &= found == [text[:limit] for text in plain]
            for row, stop in zip(rounds, stops, strict=True):
                _add(count, row, stop)
        return count

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sample: bool,
        settings: SpecConfig | bool,
        most: int,
    ) -> list[list[int]]:
        """New tokens of some prompts; the global generators are left as they were."""
        device, pad = input_device(self.target), _pad(self.target)
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        how: dict[str, Any] = {"do_sample": False}
        if sample:
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(self.seed)
            output = self.target.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=most,
                pad_token_id=pad,
                specdec=settings,
                **how,
            )
        ends = _ends(self.target)
        return [_until_end(row, ends) for row in output[:, width:].tolist()]


def _kept(text: Sequence[int]) -> int:
    """Tokens before the text's first repetition loop."""
    start = loop_start(text)
    return len(text) if start is None else start


def _add(count: _Count, rounds: Sequence[int], stop: int) -> None:
    """Counts the rounds that began before `stop`; the prefill emitted the first token."""
    at = 1
    for emitted in rounds:
        if at >= stop or not emitted:
            return
        count.rounds += 1
        count.tokens += emitted
        at += emitted


def _ends(target: Any) -> frozenset[int]:
    found = target.generation_config.eos_token_id
    return frozenset(found if isinstance(found, list) else [found]) - {None}


def _until_end(row: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The tokens up to the first one that ends a text; padding follows it."""
    stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
    return list(row[:stop])


def _pad(target: Any) -> int:
    """A padding id, so that `generate` does not warn on every call."""
    pad = target.generation_config.pad_token_id
    return int(pad) if pad is not None else min(_ends(target), default=0)


@dataclass
class Selection:
    """Which measured head is the best so far, and when to stop looking.

    Attributes:
        patience: Measurements without a gain after which to stop; 0 never does.
        without_gain: Measurements since the best one.
    """

    patience: int
    best: Acceptance | None = None
    without_gain: int = 0
    history: list[Acceptance] = field(default_factory=list)

    def add(self, found: Acceptance) -> bool:
        """Takes a measurement in; whether it is the best so far."""
        self.history.append(found)
        if self.best is None or found.score > self.best.score:
            self.best, self.without_gain = found, 0
            return True
        self.without_gain += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return bool(self.patience) and self.without_gain >= self.patience

    def state(self) -> list[dict[str, Any]]:
        """All measurements as plain JSON."""
        return [asdict(found) for found in self.history]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Goes back to what `state` took."""
        self.history, self.best, self.without_gain = [], None, 0
        for found in state:
            self.add(Acceptance(**found))
