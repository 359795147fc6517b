"""The subcommands of `specdec data`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specdec.artifacts.terminal import colour_wanted, facts, say, say_next
from specdec.errors import ConfigError
from specdec.loading import load_model
from specdec_training.commands.data_report import (
    show_data,
    show_problems,
    show_samples,
    show_target,
)
from specdec_training.data.bad_rows import BadDataError, Tally
from specdec_training.data.doctor import examine, examine_with_target
from specdec_training.data.options import (
    DataDoctorOptions,
    DataPrepareOptions,
    DataRegenerateOptions,
)
from specdec_training.data.prepare import prepare
from specdec_training.data.prepared import META, PreparedData
from specdec_training.data.regenerate import regenerate
from specdec_training.data.target import open_target


def run_prepare(options: DataPrepareOptions) -> int:
    """Runs `specdec data prepare`; the exit code.

    Raises:
        SpecdecError: As `prepare`.
    """
    with _bad_rows_listed():
        done = prepare(options)
    meta = done.data.meta
    _show_skipped(done.tally)
    share = 100 * meta.draft_vocab_coverage
    lines = [
        ("examples", f"{meta.rows:,} from {meta.rows_read:,} rows"),
        ("tokens", f"{meta.tokens:,}, {meta.loss_tokens:,} to be learnt"),
        ("held out", f"{meta.held_out:,} prompts"),
        (
            "draft vocabulary",
            f"{meta.draft_vocab_size:,} of {meta.vocab_size:,} tokens, which are {share:.2f} % "
            "of those to be learnt",
        ),
        ("written to", str(options.output)),
    ]
    say("\n".join(facts(lines)))
    say_next(
        "train a head on it",
        *("train", "--target", options.target, "--data", options.output),
        *("--output", f"{options.output}".removesuffix("-data") + "-run"),
    )
    return 0


def run_regenerate(options: DataRegenerateOptions) -> int:
    """Runs `specdec data regenerate`; the exit code.

    Raises:
        SpecdecError: As `regenerate`.
    """
    with _bad_rows_listed():
        done = regenerate(options)
    _show_skipped(done.tally)
    speed = done.new_tokens / done.seconds if done.seconds else 0.0
    ends = ", ".join(f"{count:,} {how}" for how, count in sorted(done.finishes.items()))
    lines = [
        ("answers", f"{done.rows:,}, {done.written:,} of them written now"),
        ("tokens", f"{done.new_tokens:,} in {done.seconds:.1f} s, {speed:,.0f} tokens/s"),
        ("ended by", ends or "nothing new"),
        ("written to", str(options.output)),
    ]
    say("\n".join(facts(lines)))
    say_next(
        "turn them into training data",
        *("data", "prepare", "--target", options.target, "--input", options.output),
        *("--output", f"{options.output}".removesuffix(".jsonl") + "-data"),
    )
    return 0


def run_doctor(options: DataDoctorOptions) -> int:
    """Runs `specdec data doctor`; the exit code, 1 when the data have errors.

    Raises:
        SpecdecError: The data or the target cannot be read.
    """
    if not options.data:
        raise ConfigError("--data is missing; give a prepared folder, or files to prepare")
    for name in ("examples", "sample", "sample_tokens"):
        if getattr(options, name) < 0:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be at least 0, got {getattr(options, name)}")
    path = Path(options.data).expanduser()
    if (path / META).is_file() or (path / "examples").is_dir():
        return _examine(PreparedData.load(path), options)
    if options.target is None:
        raise ConfigError(
            f"--target is missing: {options.data!r} is not prepared, and that is done for a target"
        )
    with tempfile.TemporaryDirectory() as folder:
        raw = DataPrepareOptions(
            input=(options.data,),
            target=options.target,
            output=Path(folder) / "data",
            max_length=options.max_length,
            chat_template=options.chat_template,
            template_option=options.template_option,
            as_chat=options.as_chat,
            ignore_field=options.ignore_field,
            max_bad_fraction=1.0,
            cache_dir=Path(folder) / "cache",
        )
        with _bad_rows_listed():
            done = prepare(raw)
        _show_skipped(done.tally)
        return _examine(done.data, options)


def _examine(data: PreparedData, options: DataDoctorOptions) -> int:
    colour = colour_wanted(sys.stdout, options.no_colour)
    found = examine(data)
    show_data(data, found)
    if options.target is not None:
        target = open_target(options.target)
        model = load_model(options.target, options.dtype, options.device)
        examine_with_target(data, target, model, options.examples, found)
        show_target(found)
        counts = (options.sample, options.sample_tokens)
        show_samples(data, target.tokenizer, counts, colour)
    show_problems(found, colour)
    return 1 if found.errors else 0


@contextmanager
def _bad_rows_listed() -> Iterator[None]:
    """Says what is bad line by line, and keeps the error itself short.

    Raises:
        ConfigError: In place of `BadDataError`.
    """
    try:
        yield
    except BadDataError as problem:
        _show_skipped(problem.tally)
        raise ConfigError(f"{problem.summary}; the reasons stand above") from problem


def _show_skipped(tally: Tally) -> None:
    for line in tally.lines():
        say(f"skipped {line}", sys.stderr)
