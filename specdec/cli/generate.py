"""`specdec generate`: continues a prompt or chats, streaming, with any method."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from specdec.api import augment, last_stats
from specdec.artifacts.places import DRAFT_HEAD, TOY
from specdec.artifacts.terminal import bar, facts, say, wrapped
from specdec.cli.options import GenerateOptions
from specdec.cli.reading import chat_lines, check_input, prompt_text
from specdec.config import SpecConfig
from specdec.errors import ConfigError, SpecdecError
from specdec.loading import (
    check_ids,
    check_model,
    check_special_tokens,
    context_length,
    load_model,
    load_tokenizer,
    method_options,
    sentence,
)
from specdec.registry import methods
from specdec.round.noise import kept_generators
from specdec.stats import GenerationStats

_DEFAULT_NEW_TOKENS = 128
_DEFAULT_SEED = 0
_COMPARED_RUNS = 2
_NOT_COMPARED = (
    "whether that was faster than plain generate was not measured: --compare does it on this text, "
    "and `specdec bench run` on many, with intervals"
)
_ANSWER_SHARE = 4  # of the context, what a chat leaves for an answer where nothing is said


def run_generate(options: GenerateOptions) -> int:
    """Runs the command."""
    if options.chat:
        check_input("--chat")
    text = None if options.chat else prompt_text(options)
    check_model(options.model)
    tokenizer = load_tokenizer(options.model)
    pairs = options.option
    drafts_with = None if options.method is None else methods.draft_kind(options.method)
    own_head = drafts_with is DRAFT_HEAD and options.model in (None, TOY)
    if own_head and not any(pair.partition("=")[0].strip() == "draft" for pair in pairs):
        pairs = (f"draft={TOY}", *pairs)  # the toy has a head of its own
    chosen = method_options(options.method, pairs, tokenizer)
    config = SpecConfig(
        method=options.method, options=chosen, budget=options.budget, kernels=options.kernels
    )
    if options.chat and not tokenizer.chat_template:
        raise ConfigError(
            f"--chat needs a tokenizer with a chat template, and that of {_name(options)!r} has "
            "none; use --prompt"
        )
    model = load_model(options.model, options.dtype, options.device)
    check_special_tokens(_name(options), model)
    session = Session(model, tokenizer, options)
    ids = None if text is None else session.encode(text)
    if ids is not None:
        session.room_for(ids.shape[1])  # before the default method's probe takes its second
    augment(model, config=config)
    if ids is None:
        return _chat(session)
    session.answer(ids)
    return 0


def _name(options: GenerateOptions) -> str:
    return options.model or "the bundled toy"


class Session:
    """A model with the generation settings of this run.

    Args:
        model: To be augmented before it answers.
    """

    def __init__(self, model: Any, tokenizer: Any, options: GenerateOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._sampling: dict[str, Any] = {"do_sample": options.sample}
        for name in ("temperature", "top_p", "top_k"):
            if getattr(options, name) is not None:
                self._sampling[name] = getattr(options, name)
        torch.manual_seed(_DEFAULT_SEED if options.seed is None else options.seed)

    def encode(self, text: str) -> Tensor:
        """[1, S] ids of a text to continue."""
        # Without a token, the tokenizer gives floats.
        ids: Tensor = self.tokenizer(text, return_tensors="pt").input_ids.long()
        check_ids(ids, self.model, "the prompt")
        return ids

    def encode_chat(self, messages: list[dict[str, str]]) -> Tensor:
        """[1, S] ids of a conversation, up to where the model is to speak.

        Raises:
            SpecdecError: The chat template, a program that came with the model, fails.
        """
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as problem:
            kind, name = type(problem).__name__, _name(self.options)
            raise SpecdecError(
                f"the chat template of {name!r} fails: {kind}: {sentence(problem)}"
            ) from problem
        ids: Tensor = encoded["input_ids"]
        check_ids(ids, self.model, "the chat")
        return ids

    def encode_newest(self, messages: list[dict[str, str]]) -> Tensor:
        """[1, S] ids of as much of a conversation as leaves room for an answer.

        Turns that do not fit are taken out of `messages`, the oldest first; a system turn and the
        newest one stay. One line says how many are gone.

        Raises:
            SpecdecError: As `encode_chat`.
        """
        ids, context, gone = self.encode_chat(messages), context_length(self.model), 0
        if context is None:
            return ids
        wanted = self.options.max_new_tokens or min(_DEFAULT_NEW_TOKENS, context // _ANSWER_SHARE)
        while ids.shape[1] + wanted > context:
            first = int(messages[0]["role"] == "system")
            # A question goes with its answer: many templates want the two in turn.
            oldest = slice(first, min(first + 2, len(messages) - 1))
            if not messages[oldest]:
                break
            gone += len(messages[oldest])
            del messages[oldest]
            ids = self.encode_chat(messages)
        if gone:
            say(
                f"specdec: warning: the chat has outgrown the model's context of {context:,} "
                f"tokens; its {gone} oldest turns are forgotten",
                sys.stderr,
            )
        return ids

    def answer(self, ids: Tensor) -> str:
        """Generates and streams to standard output; returns the new text."""
        limit = self.room_for(ids.shape[1])
        ids = ids.to(self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        begin = time.perf_counter()
        # The comparison draws the same noise again.
        with kept_generators(ids.device) if self.options.compare else nullcontext():
            new = self._generate(ids, limit, streamer=streamer)
        seconds, stats = time.perf_counter() - begin, last_stats(self.model)
        if self.options.stats:
            print_stats(stats, len(new), seconds)
        if self.options.compare:
            self._compare(ids, limit, new)
        elif self.options.stats:
            say(wrapped(_NOT_COMPARED), sys.stderr)
        text: str = self.tokenizer.decode(new, skip_special_tokens=True)
        return text

    def _compare(self, ids: Tensor, limit: int, new: list[int]) -> None:
        """Runs the same answer plainly and with the method, in turn, without the streamer."""
        seconds, same = {True: 0.0, False: 0.0}, True
        runs = [False, True] * _COMPARED_RUNS
        for left, method in zip(reversed(range(len(runs))), runs, strict=True):
            with kept_generators(ids.device) if left else nullcontext():  # the last one moves it
                begin = time.perf_counter()
                text = self._generate(ids, limit, specdec=None if method else False)
                seconds[method] += time.perf_counter() - begin
            same = same and text == new
        exact = self.model.dtype in (torch.float32, torch.float64)
        print_comparison(seconds[False] / seconds[True], same, exact)

    def _generate(self, ids: Tensor, limit: int, **how: Any) -> list[int]:
        """The new tokens of one call."""
        try:
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                tokenizer=self.tokenizer,  # for stop strings in the model's own settings
                return_dict_in_generate=False,
                **self._sampling,
                **how,
            )
        except SpecdecError:
            raise
        except ValueError as problem:  # what generate says of its arguments and the model's own
            raise SpecdecError(
                f"generate refuses the settings of {_name(self.options)!r}: {problem}"
            ) from problem
        except (TypeError, IndexError, KeyError, AttributeError, OverflowError) as problem:
            kind, name = type(problem).__name__, _name(self.options)
            raise SpecdecError(
                f"generate fails with the settings of {name!r}: {kind}: {sentence(problem)}"
            ) from problem
        new: list[int] = output[0, ids.shape[1] :].tolist()
        return new

    def room_for(self, width: int) -> int:
        """New tokens that are wanted and fit after a prompt of `width` tokens."""
        context, wanted = context_length(self.model), self.options.max_new_tokens
        if width == 0:
            raise SpecdecError("the prompt is empty: it has no tokens; give some text to continue")
        if context is None:
            return wanted or _DEFAULT_NEW_TOKENS
        room = context - width
        if room < 1:
            raise SpecdecError(
                f"the prompt is too long: it has {width:,} tokens, and the model's context is "
                f"{context:,}; shorten it"
            )
        if wanted is not None and wanted > room:
            raise ConfigError(
                f"--max-new-tokens must be at most {room:,}, got {wanted:,}: the model's context "
                f"is {context:,} tokens and the prompt has {width:,}"
            )
        return wanted or min(_DEFAULT_NEW_TOKENS, room)


def _chat(session: Session) -> int:
    """Reads a line, answers, until the input ends."""
    messages: list[dict[str, str]] = []
    for text in chat_lines():
        messages.append({"role": "user", "content": text})
        answer = session.answer(session.encode_newest(messages))
        messages.append({"role": "assistant", "content": answer})
    return 0


def print_comparison(ratio: float, same: bool, exact: bool) -> None:
    """How the method did against plain `generate`, to standard error.

    Args:
        ratio: Seconds of plain `generate` over those of the method; not said of another text.
        same: Whether all runs wrote the same tokens.
        exact: Whether the model's arithmetic is one in which they must.
    """
    speed = f"{ratio:.2f}x of plain generate on this text"
    if ratio < 1:
        speed = f"slower than plain generate on this text: {ratio:.2f}x; try another --method"
    speed = f"{speed} ({_COMPARED_RUNS} runs each, in turn)"
    text = "identical"
    if not same:
        speed = "not said, for the texts differ"
        why = "this is a bug, please report it" if exact else "half precision rounds near-ties"
        text = f"not identical: {why}"
    lines = [("speed", speed), ("text", text)]
    say("", sys.stderr)
    say("\n".join(facts(lines)), sys.stderr)


def print_stats(stats: GenerationStats, tokens: int, seconds: float) -> None:
    """What a call did, to standard error.

    Args:
        tokens: Its new tokens; a call that ran as plain `generate` does not count them.
        seconds: Wall time of the call, prompt included.
    """
    stream = sys.stderr
    lines = [
        ("method", stats.method),
        ("mode", f"{stats.mode}: {stats.mode_reason}"),
        ("new tokens", f"{tokens:,} in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s"),
    ]
    if stats.rounds:
        total = stats.rounds + stats.prefill_forwards
        parts = f"{stats.rounds:,} rounds and {stats.prefill_forwards:,} over the prompt"
        lines += [
            ("forwards", f"{total:,} for {tokens:,} tokens: {parts}"),
            ("acceptance length", f"{stats.acceptance_length:.2f} tokens a round"),
            ("drafted", f"{stats.drafted_nodes:,} nodes"),
        ]
    say("", stream)
    say("\n".join(facts(lines)), stream)
    if stats.rounds:
        _print_counts(stats)


def _print_counts(stats: GenerationStats) -> None:
    stream, rounds = sys.stderr, sum(stats.histogram.values())
    most = max(stats.histogram.values())
    say("tokens a round", stream)
    for length in range(1, max(stats.histogram) + 1):
        times = stats.histogram[length]
        drawn = bar(times / most, stream)
        say(f"  {length:>3}  {times:>6,}  {100 * times / rounds:>3.0f} %  {drawn}".rstrip(), stream)
    say("tokens by source", stream)
    width = max(map(len, stats.tokens_by_source))
    for source, count in stats.tokens_by_source.most_common():
        say(f"  {source.ljust(width)}  {count:>6,}", stream)
    total = sum(stats.seconds.values())
    say("seconds by stage", stream)
    width = max(map(len, stats.seconds))
    for stage, seconds in stats.seconds.most_common():
        say(f"  {stage.ljust(width)}  {seconds:>7.3f}  {100 * seconds / total:>3.0f} %", stream)
