"""What `specdec bench replay` can be told: one frozen dataclass.

Field docstrings are the help texts. Imports nothing heavy, so that the help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from specdec.artifacts.arguments import Flag, arg, check_numbers, check_repeats, each
from specdec.errors import ConfigError
from specdec_bench.output_files import check_replaceable


@dataclass(frozen=True)
class ReplayOptions:
    """Measure how many recorded tokens n-gram methods would have drafted; no model, no GPU."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, arg("FILE [FILE ...]")] = ()
    """Recorded answers: JSON lines (also gzip) with prompt and answer, with messages, or as
    FastChat writes them; several files are reported one by one."""
    methods: Annotated[tuple[str, ...], *each("METHOD", "all that can be replayed")] = ()
    """Method with options as in prompt_lookup:max_ngram=3, or several with commas between: any that
    drafts from text alone, or suffix+store, which fills a store with the answers to other
    prompts."""
    chains: Flag = False
    """One path a round instead of a tree, as for engines without tree verification."""
    counters: Flag = False
    """Instead of replaying, read the step counts that the files themselves hold."""

    tokenizer: Annotated[str | None, arg("NAME")] = None
    """Folder or hub id of a tokenizer, best the one that the answers were written with; demo is
    the bundled toy's."""
    prompts: Annotated[Path | None, arg("FILE")] = None
    """Prompts of FastChat answers, which hold only a question_id."""
    prompt_field: Annotated[str | None, arg("NAME", "the first known one")] = None
    """Field of the prompt; a dot steps into an object."""
    answer_field: Annotated[str | None, arg("NAME", "the first known one")] = None
    """Field of the answer; a dot steps into an object, as in 175b_verification.solution."""
    chat_template: Flag = False
    """Arrange a conversation with the tokenizer's chat template instead of line breaks."""
    turn: Annotated[int | None, arg("N", "all")] = None
    """Only the answers of this turn, from 1."""
    limit: Annotated[int | None, arg("N", "all")] = None
    """Rows to read from each file, from its beginning."""
    keep_loops: Flag = False
    """Do not cut answers where they begin to repeat themselves."""

    output: Annotated[Path | None, arg("FILE", "none")] = None
    """Write the histogram of every answer and method there, as JSON lines."""
    profile: Annotated[Path | None, arg("FILE", "none")] = None
    """Also write the acceptance of the first method, over all files, as
    speculation_profile.json."""
    overwrite: Flag = False
    """Replace these files."""

    def check(self) -> None:
        """Raises `ConfigError` as `check_replay_options`."""
        check_replay_options(self)


def check_replay_options(options: ReplayOptions) -> None:
    """Refuses what can be seen to be wrong without reading anything.

    Raises:
        ConfigError: Names the option, its value, and what it may be.
    """
    if not options.files:
        raise ConfigError("no FILE; give recorded answers as JSON lines")
    check_repeats(options)
    check_numbers(options, {"turn": 1, "limit": 1})
    if options.counters and (options.methods or options.tokenizer):
        raise ConfigError("--counters replays nothing; leave out methods and tokenizers")
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
    if options.tokenizer is None and not options.counters:
        raise ConfigError(
            "no --tokenizer; name that of the model that wrote the answers, or demo, the toy's"
        )
