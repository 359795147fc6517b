"""What `specdec bench replay` can be told: one frozen dataclass.

Field docstrings are the help texts. Imports nothing heavy, so that the help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from specdec.errors import ConfigError
from specdec_bench.output_files import check_replaceable

_Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


def _arg(metavar: str, default: str = "") -> Any:
    """How a value is called in the help, and what leaving it out means."""
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True)
class ReplayOptions:
    """Measure how many recorded tokens n-gram methods would have drafted; no model, no GPU."""

    files: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint=""),
    ] = ()
    """Recorded answers: JSON lines (also gzip) with prompt and answer, with messages, or as
    FastChat writes them; several files are reported one by one."""
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        _arg("METHOD", "prompt_lookup and suffix; repeatable"),
    ] = ()
    """Method with options as in prompt_lookup:max_ngram=3, or several with commas between: any that
    drafts from text alone, suffix+store (fills a store with the answers to other prompts),
    textbook_lookup (prompt lookup as published), or ngram_pool (lookahead's pool, without its
    window)."""
    ngram: Annotated[int | None, _arg("N", "the method's own")] = None
    """Longest suffix that the lookup methods look for."""
    draft: Annotated[int | None, _arg("N", "the method's own")] = None
    """Tokens that the lookup methods copy, however short the match."""
    chains: _Flag = False
    """One path a round instead of a tree, as for engines without tree verification."""
    counters: _Flag = False
    """Instead of replaying, read the step counts that the files themselves hold."""

    tokenizer: Annotated[str | None, _arg("NAME", "demo, the bundled toy's")] = None
    """Folder or hub id of a tokenizer; best the one that the answers were written with."""
    train_tokenizer: Annotated[int | None, _arg("N")] = None
    """Instead, train a byte-level BPE with this many tokens."""
    tokenizer_text: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        _arg("FILE", "the replayed texts themselves; repeatable"),
    ] = ()
    """Text to train it on: JSON lines, plain text, or stdlib, the sources of Python itself."""
    tokenizer_chars: Annotated[int, tyro.conf.arg(metavar="N")] = 3_000_000
    """Characters to take from each of these, from its beginning."""

    prompts: Annotated[Path | None, _arg("FILE")] = None
    """Prompts of FastChat answers, which hold only a question_id."""
    prompt_field: Annotated[str | None, _arg("NAME", "the first known one")] = None
    """Field of the prompt; a dot steps into an object."""
    answer_field: Annotated[str | None, _arg("NAME", "the first known one")] = None
    """Field of the answer; a dot steps into an object, as in 175b_verification.solution."""
    chat_template: _Flag = False
    """Arrange a conversation with the tokenizer's chat template instead of line breaks."""
    turn: Annotated[int | None, _arg("N", "all")] = None
    """Only the answers of this turn, from 1."""
    limit: Annotated[int | None, _arg("N", "all")] = None
    """Rows to read from each file, from its beginning."""
    keep_loops: _Flag = False
    """Do not cut answers where they begin to repeat themselves."""

    output: Annotated[Path | None, _arg("FILE", "none")] = None
    """Write the histogram of every answer and method there, as JSON lines."""
    profile: Annotated[Path | None, _arg("FILE", "none")] = None
    """Also write the acceptance of the first method, over all files, as
    speculation_profile.json."""
    overwrite: _Flag = False
    """Replace these files."""

    def check(self) -> None:
        """Raises `ConfigError` as `check_replay_options`."""
        check_replay_options(self)


_LEAST = {
    "ngram": 1, "draft": 1, "train_tokenizer": 257, "tokenizer_chars": 1, "turn": 1, "limit": 1,
}  # fmt: skip


def check_replay_options(options: ReplayOptions) -> None:
    """Refuses what can be seen to be wrong without reading anything.

    Raises:
        ConfigError: Names the option, its value, and what it may be.
    """
    if not options.files:
        raise ConfigError("no FILE; give recorded answers as JSON lines")
    repeated = [str(path) for path in options.files if options.files.count(path) > 1]
    if repeated:
        raise ConfigError(f"{repeated[0]} is given twice")
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and not least <= value < 2**31:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be from {least} to {2**31 - 1}, got {value}")
    if options.tokenizer is not None and options.train_tokenizer is not None:
        raise ConfigError("give --tokenizer or --train-tokenizer, not both")
    if options.tokenizer_text and options.train_tokenizer is None:
        raise ConfigError("--tokenizer-text is for --train-tokenizer N, which is missing")
    if options.chat_template and options.train_tokenizer is not None:
        raise ConfigError("--chat-template needs --tokenizer; a new tokenizer has no template")
    if options.counters and (options.methods or options.train_tokenizer or options.tokenizer):
        raise ConfigError("--counters replays nothing; leave out methods and tokenizers")
    _check_outputs(options)


def _check_outputs(options: ReplayOptions) -> None:
    if options.counters and options.profile is not None:
        raise ConfigError("--profile needs positions, which --counters does not have")
    for path in (options.output, options.profile):
        if path is not None and path.exists() and not options.overwrite:
            raise ConfigError(f"{path} is already there; --overwrite replaces it")
    inputs = [*options.files, *([] if options.prompts is None else [options.prompts])]
    if options.output is not None:
        check_replaceable(options.output, "--output", b'"kind": "replay"', inputs)
        inputs.append(options.output)
    if options.profile is not None:
        check_replaceable(options.profile, "--profile", b'"schema_version"', inputs)
