"""Answers a batch of prompts by `generate`, and gives back exactly what the target wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec.audit.loops import loop_start
from specdec.loading import context_length


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token.
        top_p: Smallest set with this probability.
        drop_loops: Cut answers where they fall into a repetition loop.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    drop_loops: bool

    def arguments(self) -> dict[str, Any]:
        """For `generate`; nothing of the checkpoint's own sampling settings is left."""
        plain = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        if self.temperature == 0:
            none = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))
            return plain | {"do_sample": False} | none
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return plain | {"do_sample": True, "min_p": 0.0, "typical_p": 1.0} | drawn


@dataclass(frozen=True)
class Answer:
    """What the target wrote.

    Attributes:
        token_ids: With the stop token, where it wrote one.
        finish: `stop`, `length`, or `loop` where a repetition loop was cut off.
    """

    token_ids: list[int]
    finish: str


class Writer:
    """A target that answers.

    Args:
        model: A causal language model, augmented or not.
        stop_ids: Ids that end an answer.
        pad_id: Fills rows to the left; never read.
        sampling: Temperature, nucleus and longest answer of every draw.
    """

    def __init__(self, model: Any, stop_ids: frozenset[int], pad_id: int, sampling: Sampling):
        self._model, self._stops, self._pad = model, stop_ids, pad_id
        self._sampling = sampling
        self._context = context_length(model)

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of a prompt that leaves room for the longest answer; None without a limit."""
        return None if self._context is None else self._context - self._sampling.max_new_tokens

    @property
    def vocab_size(self) -> int:
        """Ids that the model has embeddings for."""
        return len(self._model.get_input_embeddings().weight)

    def room(self, prompt_length: int) -> int:
        """Tokens that an answer to a prompt of this length can have."""
        most = self._sampling.max_new_tokens
        return most if self._context is None else min(most, self._context - prompt_length)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], seed: int) -> list[Answer]:
        """Answers to all prompts at once.

        Args:
            prompts: Token ids, none empty, each with room for an answer.
            seed: The same seed and prompts give the same answers; torch's generators stay.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self._model.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            written = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self.room(width),
                eos_token_id=sorted(self._stops) or None,
                pad_token_id=self._pad,
                **self._sampling.arguments(),
            )
        return [self._finished(row) for row in written[:, width:].tolist()]

    def _finished(self, tokens: list[int]) -> Answer:
        for at, token in enumerate(tokens):
            if token in self._stops:
                tokens, finish = tokens[: at + 1], "stop"
                break
        else:
            finish = "length"
        loop = loop_start(tokens) if self._sampling.drop_loops else None
        return Answer(tokens, finish) if loop is None else Answer(tokens[:loop], "loop")
