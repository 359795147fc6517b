"""`specdec demo`: one text coloured by the rounds that made it, then the table of all methods."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from specdec import demo
from specdec.api import capability
from specdec.artifacts.terminal import (
    bold,
    by_round,
    colour_wanted,
    columns,
    dim,
    facts,
    say,
    wrapped,
)
from specdec.cli.options import DemoOptions
from specdec.cli.race import Arm, ArmResult, Race, choose_arms
from specdec.demo.prompts import PROMPTS
from specdec.errors import ConfigError, SpecdecError
from specdec.targets.self_test import Capability

_SHOWN_LINES = 24  # of the example's text; the rest is counted, not printed
_TEMPERATURE = 0.8
_EXACT_DTYPES = ("float32", "float64")


def run_demo(options: DemoOptions) -> int:
    """Runs the demo; 1 when a text differs although this dtype promises identity."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _run(options)
    finally:
        torch.set_num_threads(threads)


def _run(options: DemoOptions) -> int:
    colour = colour_wanted(sys.stdout, options.no_colour)
    tokenizer, model = demo.load_tokenizer(), _load(options)
    prompts = [
        tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        for text in list(PROMPTS.values())[: options.prompts]
    ]
    longest = max(ids.shape[1] for ids in prompts)
    room = model.config.max_position_embeddings - longest
    if options.max_new_tokens > room:
        raise ConfigError(
            f"--max-new-tokens must be at most {room}, got {options.max_new_tokens}: the toy's "
            f"context is {model.config.max_position_embeddings} tokens and the longest prompt "
            f"has {longest}"
        )
    say(bold("specdec demo", colour) + ": the same text in fewer forwards of the model")
    arms, left_out = choose_arms(model)
    race = Race(model, prompts, options.seed, **_generation(options))
    found = capability(model)
    say("\n".join(_setup(options, model, found)))
    if found.mode == "plain":
        raise SpecdecError(
            f"the toy cannot be verified tree by tree in {options.dtype} on {options.device}, so "
            f"there is nothing to compare: {found.reason}"
        )
    _show_example(race, arms, tokenizer, colour)
    runs = len(arms) * len(prompts) * options.repetitions
    with tqdm(
        total=runs, desc="timing", unit="run", delay=2, leave=False, disable=None
    ) as progress:
        results = race.time(arms, options.repetitions, progress.update)
    say("\n".join(_table(results, colour, options.dtype in _EXACT_DTYPES)))
    say()
    for note in _notes(results, left_out, options):
        say(wrapped(note))
    plain = results[0]
    all_identical = all(r.identical_to(plain) == len(prompts) for r in results)
    return 1 if options.dtype in _EXACT_DTYPES and not all_identical else 0


def _load(options: DemoOptions) -> Any:
    model = demo.load_target(options.dtype)
    try:
        model = model.to(options.device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).split("\n")[0]
        raise ConfigError(f"--device {options.device} cannot be used: {reason}") from problem
    # Every run writes all its tokens: equal counts, whatever the toy thinks is an end.
    model.generation_config.eos_token_id = None
    return model


def _generation(options: DemoOptions) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.sample}
    if options.sample:
        chosen["temperature"] = _TEMPERATURE
    return chosen


def _setup(options: DemoOptions, model: Any, found: Capability) -> list[str]:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    how = f"sampled at {_TEMPERATURE}, seed {options.seed}" if options.sample else "greedy"
    threads = f"{options.threads} thread{'s' if options.threads > 1 else ''} (--threads)"
    return facts(
        [
            (
                "model",
                f"the bundled toy: Llama, {millions:.1f} M parameters, knows some Python syntax",
            ),
            ("work", f"{options.prompts} prompts x {options.max_new_tokens} new tokens, {how}"),
            ("device", f"{options.device}, {options.dtype}, {threads}"),
            ("mode", f"{found.mode}: {found.reason}"),
        ]
    )


def _show_example(race: Race, arms: Sequence[Arm], tokenizer: Any, colour: bool) -> None:
    """Each method's text of the first prompt; also the warm-up of every arm."""
    title, prompt = next(iter(PROMPTS.items()))
    say()
    say(f"Prompt 1 of {len(race.prompts)}, {title!r}:")
    say(dim(prompt.rstrip("\n"), colour))
    for arm in arms:
        rounds = race.rounds(arm, 0)
        if arm.config is None or arm.name == "none":
            continue  # one token a round: nothing to see
        tokens = sum(map(len, rounds))
        marks = "a new colour" if colour else "a bar"
        say()
        say(
            f"{bold(arm.name, colour)}: {tokens} tokens in {len(rounds)} forwards, {marks} for each"
        )
        say(_shortened(by_round(_pieces(rounds, tokenizer), colour)))
    say()


def _pieces(rounds: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """Text of each round; a character split between rounds goes to the later one."""
    pieces: list[str] = []
    ids: list[int] = []
    written = 0
    for number, tokens in enumerate(rounds, 1):
        ids += tokens
        text = tokenizer.decode(ids)
        if number < len(rounds):
            text = text.rstrip("\ufffd")
        pieces.append(text[written:])
        written = max(written, len(text))
    return pieces


def _shortened(text: str) -> str:
    lines = text.split("\n")
    if len(lines) <= _SHOWN_LINES:
        return text
    return "\n".join([*lines[:_SHOWN_LINES], f"... and {len(lines) - _SHOWN_LINES} lines more"])


def _table(results: Sequence[ArmResult], colour: bool, promised: bool) -> list[str]:
    plain = results[0]
    loop = next((r for r in results if r.arm.name == "none"), None)
    header = [
        "method", "tokens/s", "vs plain", "vs none", "tokens/round", "rounds", "text identical",
    ]  # fmt: skip
    lines = columns([header, *(_row(result, plain, loop, promised) for result in results)])
    return [bold(lines[0], colour), *lines[1:]]


def _row(result: ArmResult, plain: ArmResult, loop: ArmResult | None, promised: bool) -> list[str]:
    same, prompts = result.identical_to(plain), len(plain.texts)
    speculates = result.arm.config is not None
    verdict = "yes" if same == prompts else f"{same} of {prompts}"
    if promised and same != prompts:
        verdict = f"NO ({verdict})"
    # A speed-up means nothing for another text: it is printed only when some text was the same.
    speeds = [f"{result.speed_over(r):.2f}x" if r and same else "-" for r in (plain, loop)]
    return [
        result.arm.name,
        f"{result.tokens_per_second:,.1f}",
        *speeds,
        f"{result.acceptance_length:.2f}" if speculates else "-",
        f"{result.rounds:,}" if speculates else "-",
        verdict if speculates else "-",
    ]


def _notes(
    results: Sequence[ArmResult], left_out: Mapping[str, str], options: DemoOptions
) -> list[str]:
    plain, notes = results[0], []
    if options.repetitions > 1:
        ratios = [
            [p / s for p, s in zip(plain.seconds, r.seconds, strict=True)] for r in results[1:]
        ]
        spread = max((max(row) - min(row)) / 2 / (sum(row) / len(row)) for row in ratios)
        notes.append(
            f"Total times of {options.repetitions} interleaved repetitions; between them the "
            f"speed-ups moved by up to ±{100 * spread:.0f} %."
        )
    for result in results:
        settings = result.arm.config.options if result.arm.config else {}
        if settings:
            sizes = ", ".join(f"{name} {value}" for name, value in settings.items())
            notes.append(f"{result.arm.name} ran with {sizes}.")
    notes += [f"{name} was left out: {reason}." for name, reason in left_out.items()]
    if options.dtype not in _EXACT_DTYPES:
        notes.append(
            f"{options.dtype} rounds forwards over several tokens differently, so that near-ties "
            "may fall the other way; --dtype float32 gives identical text."
        )
    notes.append(
        "The prompts repeat themselves, and so does the toy, which suits drafts taken from the "
        "text: this shows that it works, not what your model gains."
    )
    return notes
