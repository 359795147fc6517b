"""`specdec inspect --probe`: drafts in every likely way and says how the head was trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from specdec.artifacts.input_files import read_input_text
from specdec.artifacts.terminal import bold, colour_wanted, columns, say, wrapped
from specdec.cli.head_options import InspectOptions
from specdec.demo.prompts import PROMPTS
from specdec.errors import ConfigError
from specdec.heads.checkpoints.load import HeadDescription
from specdec.heads.checkpoints.probe import STEPS, Score, candidates, probe
from specdec.heads.eagle3.head import Eagle3Head
from specdec.loading import TOY, check_ids, load_model, load_tokenizer

_PROMPTS = (
    "The history of the steam engine begins",
    'def quicksort(values):\n    """Sort a list."""\n',
    "To make a simple tomato soup, first",
    "Question: What causes the seasons?\nAnswer:",
    "The three most important things to know about compound interest are",
    "Once upon a time, in a village by the sea,",
    "In 1905, Albert Einstein published",
    "Dear Ms Lee,\n\nthank you for your letter of",
)
_MOST_PROMPTS, _MOST_TOKENS = 64, 256
_SHOWN = 12  # candidates in the table
_POOR = 0.1  # agreement at the first step below which no candidate fits


def show_probe(options: InspectOptions, head: Eagle3Head, found: HeadDescription) -> None:
    """Prints a table of candidates and a sentence on what the head was trained with.

    Args:
        options: Of `specdec inspect`, with a target.
        head: As loaded; moved to the target's device and dtype.
        found: What is known of it.

    Raises:
        SpecdecError: The target cannot be loaded, or there are no prompts.
    """
    model = load_model(options.target, options.dtype, options.device)
    output = model.get_output_embeddings()
    head = head.to(model.device, model.dtype)
    head.attach(model.get_input_embeddings().weight, None if output is None else output.weight)
    layers = model.config.get_text_config().num_hidden_layers
    tried = candidates(head.config, layers, found.layers_known)
    if not tried:
        raise ConfigError(
            "there is nothing to try: the head names no layers that this target has; say which, "
            "for example --set aux_output_layers=[1,2,3]"
        )
    prompts = _token_ids(options)
    for ids in prompts:
        check_ids(ids, model, "a prompt of --probe")
    say(f"probing {len(tried)} candidates on the target's own text after {len(prompts)} prompts")
    with tqdm(total=len(prompts), unit="prompt", file=sys.stderr, leave=False) as bar:
        scores = probe(head, model, tried, prompts, options.new_tokens, bar.update)
    _show(scores, bold_wanted=colour_wanted(sys.stdout, options.no_colour))
    say(wrapped(verdict(scores)))


def verdict(scores: list[Score]) -> str:
    """A sentence on what the head was trained with, as far as these scores can tell."""
    best = scores[0]
    if best.hits.shape[1] == 0:
        return "no prompt gave enough text to compare with; give other --prompts"
    if best.agreement[0] < _POOR:
        return (
            f"no candidate fits: the best agrees at {best.agreement[0]:.1%} of the slots; the head "
            "was made for another target, or hardly trained"
        )
    tied = [score for score in scores if not best.clearly_above(score)]
    known, open_ = [], []
    for name in ("layers", "norm_before_residual", "feed_post_norm"):
        values = list(dict.fromkeys(getattr(score.candidate, name) for score in tied))
        field = "aux_output_layers" if name == "layers" else name
        shown = [json.dumps(value).replace(" ", "") for value in values]
        if len(values) == 1:
            known.append(f"{field}={shown[0]}")
        else:
            open_.append(f"{field} ({' or '.join(shown)})")
    said = f"the head was trained with {', '.join(known)}; --set takes these" if known else ""
    if not open_:
        return said
    rest = f"this text does not tell {', '.join(open_)}; more --prompts may"
    return f"{said}. {rest[0].upper()}{rest[1:]}" if said else rest


def _show(scores: list[Score], bold_wanted: bool) -> None:
    names = [f"step {step}" for step in range(STEPS)]
    rows = [["target layers", "norm_before_residual", "feed_post_norm", *names, "log-prob."]]
    for score in scores[:_SHOWN]:
        one = score.candidate
        label = f"{list(one.layers)} {one.layers_from}"
        flags = ["yes" if on else "no" for on in (one.norm_before_residual, one.feed_post_norm)]
        shares = [f"{share:.1%}" for share in score.agreement]
        rows.append([label, *flags, *shares, f"{score.likelihood:.3f}"])
    for index, line in enumerate(columns(rows)):
        say("  " + (bold(line, bold_wanted) if index == 1 else line))
    if len(scores) > _SHOWN:
        say(f"  and {len(scores) - _SHOWN} more, below these")


def _token_ids(options: InspectOptions) -> list[Tensor]:
    texts: list[str] = list(_PROMPTS)
    if options.prompts is not None:
        texts = _read(options.prompts)
    elif options.target == TOY:
        texts = list(PROMPTS.values())
    tokenizer = load_tokenizer(options.target)
    rows = [tokenizer(text).input_ids[:_MOST_TOKENS] for text in texts[:_MOST_PROMPTS]]
    found = [torch.tensor(row, dtype=torch.long) for row in rows if len(row) > 1]
    if not found:
        raise ConfigError(f"--prompts {options.prompts} holds no prompt of two tokens or more")
    return found


def _read(path: Path) -> list[str]:
    lines = read_input_text(path, "--prompts").splitlines()
    lines = [line for line in lines if line.strip()]
    if path.suffix not in (".jsonl", ".json"):
        return lines
    return [_prompt(line, number, path) for number, line in enumerate(lines, 1)]


def _prompt(line: str, number: int, path: Path) -> str:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"line {number} of --prompts {path} is not JSON: {problem}") from problem
    if isinstance(row, dict):
        row = row.get("prompt", row.get("text"))
    if not isinstance(row, str):
        raise ConfigError(f'line {number} of --prompts {path} has no "prompt" or "text"')
    try:
        row.encode("utf-8")
    except UnicodeEncodeError as problem:  # JSON can name half a character
        raise ConfigError(
            f"line {number} of --prompts {path} is no text: {problem.reason}"
        ) from problem
    return row
